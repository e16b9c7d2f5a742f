"""Prototypical loss in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdis.reference.prototype_distances import prototype_distances

REDUCTIONS = ("none", "mean", "sum")


def prototypical_loss(queries: Tensor, prototypes: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross entropy of ``softmax(-||q - p||^2)`` (Snell et al., 2017, eq. 2).

    Queries are [*, Q, D], prototypes [*, N, D], labels [*, Q] int64; per query [*, Q] where ``reduction`` is
    ``"none"``, else a scalar.
    """
    log_p = torch.log_softmax(-prototype_distances(queries, prototypes), dim=-1)
    loss = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if reduction == "mean":
        return loss.mean()
    if reduction == "sum":
        return loss.sum()
    return loss
