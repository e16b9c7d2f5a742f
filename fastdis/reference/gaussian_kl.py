"""The divergence of a diagonal Gaussian from the standard normal in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


def gaussian_kl(mean: Tensor, logvar: Tensor, *, weights: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """``sum_k w_k (mean_k^2 + exp(logvar_k) - 1 - logvar_k) / 2`` (Kingma and Welling, 2014, appendix B).

    mean and logvar are [B, K], weights [K]; per sample [B] where ``reduction`` is ``"none"``, else a scalar.
    """
    divergence = 0.5 * (mean.square() + torch.exp(logvar) - 1 - logvar)
    if weights is not None:
        divergence = divergence * weights
    divergence = divergence.sum(-1)
    if reduction == "mean":
        return divergence.mean()
    return divergence.sum() if reduction == "sum" else divergence
