"""Style modulation and AdaIN in plain PyTorch: the oracle, and what runs where nothing was compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")


def style_modulation(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    groups: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """``act(x_hat * scale + shift)`` with x [B, C, *], scale and shift [B, C], weight and bias [C].

    ``x_hat`` is ``x`` where ``groups == 0``, else ``x`` group-normalised with the biased variance, then
    ``* weight + bias``.
    """
    spatial = (1,) * (x.dim() - 2)
    x_hat = x
    if groups > 0:
        grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2:].numel())
        mean = grouped.mean(-1, keepdim=True)
        variance = (grouped - mean).square().mean(-1, keepdim=True)
        x_hat = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        x_hat = x_hat * weight.reshape(1, -1, *spatial)
    if bias is not None:
        x_hat = x_hat + bias.reshape(1, -1, *spatial)
    t = x_hat * scale.reshape(*scale.shape, *spatial) + shift.reshape(*shift.shape, *spatial)
    if activation == "relu":
        return F.relu(t)
    if activation == "leaky_relu":
        return F.leaky_relu(t, negative_slope)
    if activation == "silu":
        return F.silu(t)
    return t


def adain(content: Tensor, style: Tensor, *, eps: float = 1e-5, unbiased: bool = False) -> Tensor:
    """Adaptive instance normalisation (Huang and Belongie, 2017, eq. 8) of content [B, C, *] to style [B, C, *]."""
    style = style.flatten(2)
    shift = style.mean(-1)
    scale = torch.sqrt(style.var(-1, correction=int(unbiased)) + eps)
    return style_modulation(content, scale, shift, groups=content.shape[1], eps=eps)
