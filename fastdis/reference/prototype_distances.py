"""Squared Euclidean distances to prototypes in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def prototype_distances(queries: Tensor, prototypes: Tensor) -> Tensor:
    """``||q - p||^2`` of queries [*, Q, D] and prototypes [*, N, D], as [*, Q, N]."""
    return (queries.unsqueeze(-2) - prototypes.unsqueeze(-3)).square().sum(-1)
