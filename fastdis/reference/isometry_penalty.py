"""Penalties on the pull-back metric of a decoder in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdis.reference.jacobian_gram import jacobian_gram

KINDS = ("isometry", "scaled_isometry", "conformal", "relaxed_distortion", "orthogonality")


def isometry_penalty(jacobian: Tensor, kind: str = "isometry") -> Tensor:
    """The penalty of tangents [B, K, D], a scalar, at least in float32."""
    return penalty_of_gram(jacobian_gram(jacobian), kind)


def penalty_of_gram(gram: Tensor, kind: str) -> Tensor:
    """The penalty of the Gram matrices G [B, K, K], with t = tr G and q = ||G||^2 a sample.

    isometry ``mean ||G - I||^2``; scaled_isometry ``mean ||G - c I||^2``, c = mean t / K (Chen et al., 2020);
    conformal ``mean ||G - (t / K) I||^2``; relaxed_distortion ``mean q / (mean t)^2`` (Lee et al., 2022);
    orthogonality ``mean sum_{i != j} G_ij^2`` (Wei et al., 2021).
    """
    diagonal = torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if kind == "relaxed_distortion":
        return gram.square().sum((-2, -1)).mean() / trace.mean().square()
    if kind == "isometry":
        off = gram - diagonal.to(gram.dtype)
    elif kind == "scaled_isometry":
        off = gram - trace.mean() / gram.shape[-1] * diagonal
    elif kind == "conformal":
        off = gram - (trace / gram.shape[-1]).reshape(-1, 1, 1) * diagonal
    else:
        off = gram.masked_fill(diagonal, 0)
    return off.square().sum((-2, -1)).mean()
