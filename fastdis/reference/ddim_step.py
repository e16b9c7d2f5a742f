"""A DDIM step under sub-gradient fields in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdis.reference.sum_gradient_fields import per_sample, total_field


def ddim_step(
    x: Tensor,
    noise: Tensor,
    fields: Tensor,
    alpha_bar: Tensor | float,
    alpha_bar_prev: Tensor | float,
    *,
    weights: Tensor | None = None,
    sigma: Tensor | float = 0.0,
    eta_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The previous sample and the predicted clean one, both [B, *] (Song et al., 2021, eq. 12; DisDiff's guidance).

    x, noise and eta_noise are [B, *], fields [B, N, *]; alpha_bar, alpha_bar_prev and sigma [B] or numbers; weights
    [N] or [B, N].
    """
    a, previous, s = (per_sample(v, x) for v in (alpha_bar, alpha_bar_prev, sigma))
    e = noise - torch.sqrt(1 - a) * total_field(fields, weights)
    x0 = (x - torch.sqrt(1 - a) * e) / torch.sqrt(a)
    x_prev = torch.sqrt(previous) * x0 + torch.sqrt((1 - previous - s.square()).clamp(min=0)) * e
    if eta_noise is not None:
        x_prev = x_prev + s * eta_noise
    return x_prev.to(x.dtype), x0.to(x.dtype)
