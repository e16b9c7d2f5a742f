"""The tail of a DisDiff training step in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdis.reference.sum_gradient_fields import per_sample, total_field


def disdiff_terms(
    x: Tensor, noise: Tensor, fields: Tensor, selected: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the losses of DisDiff (Yang et al., 2023) need from its sub-gradient fields.

    x and noise are [B, *], fields [B, N, *], selected [B] int64, alpha_bar and alpha_bar_prev [B]. Returns the noise
    shifted by the summed field, the clean sample predicted without the fields and with the selected one, [B, *]
    each, and the weight [B] of the disentangling loss, which is a constant to autograd.
    """
    a, previous = per_sample(alpha_bar, x), per_sample(alpha_bar_prev, x)
    shift = -torch.sqrt(a / previous) * (1 - previous) / torch.sqrt(1 - a)
    field = fields[torch.arange(len(fields), device=fields.device), selected]
    shifted = noise + shift * total_field(fields, None)
    x0 = (x - torch.sqrt(1 - a) * noise) / torch.sqrt(a)
    x0_selected = x0 + (1 - a) / torch.sqrt(a) * field
    wide = torch.promote_types(x.dtype, torch.float32)
    mean_square = field.detach().to(wide).flatten(1).square().mean(1)
    weight = (1 - alpha_bar.detach().to(wide)).square() / alpha_bar.detach().to(wide) * mean_square
    return shifted.to(x.dtype), x0.to(x.dtype), x0_selected.to(x.dtype), weight
