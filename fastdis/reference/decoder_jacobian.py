"""A decoder's Jacobian in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import jacrev, vmap


def decoder_jacobian(decoder: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """``decoder(z)`` [B, *] of latents [B, K], and the derivatives of each sample by its latents, [B, K, *]."""

    def of_one_sample(latents: Tensor) -> Tensor:
        return decoder(latents.unsqueeze(0)).squeeze(0)

    # Not jacfwd: torch's gradients of the tangents of layer_norm and instance_norm are wrong (pytorch#196700).
    return decoder(z), vmap(jacrev(of_one_sample))(z).movedim(-1, 1)
