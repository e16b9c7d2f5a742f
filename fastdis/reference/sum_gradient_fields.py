"""Sums of sub-gradient fields in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_gradient_fields(
    noise: Tensor, fields: Tensor, coefficient: Tensor | float, *, weights: Tensor | None = None
) -> Tensor:
    """``noise + coefficient * sum_n weights_n fields_n`` (DisDiff, Yang et al., 2023).

    Noise is [B, *], fields [B, N, *], the coefficient [B] or a number, weights [N] or [B, N].
    """
    return (noise + per_sample(coefficient, noise) * total_field(fields, weights)).to(noise.dtype)


def total_field(fields: Tensor, weights: Tensor | None) -> Tensor:
    """``sum_n weights_n fields_n`` of fields [B, N, *], as [B, *]."""
    if weights is not None:
        fields = fields * weights.reshape(*weights.shape, *(1,) * (fields.dim() - 2))
    return fields.sum(1)


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """One number for each sample, [B], or one for all, with the dimensions of ``like`` [B, *]."""
    if not isinstance(value, Tensor):
        value = torch.tensor([value], dtype=torch.float64, device=like.device)
    return value.reshape(-1, *(1,) * (like.dim() - 1))
