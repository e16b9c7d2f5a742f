"""Draws from a diagonal Gaussian posterior in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def reparameterize(mean: Tensor, logvar: Tensor, seed: Tensor) -> Tensor:
    """``mean + exp(logvar / 2) * noise``, the noise by :func:`standard_normal` from seed [S]."""
    return mean + torch.exp(0.5 * logvar) * standard_normal(mean.shape, seed).to(mean.dtype)


def standard_normal(shape: torch.Size, seed: Tensor) -> Tensor:
    """Standard normal numbers in float64, a function of their position and of seed [S] int64 alone.

    The elements, in order, are cut into S runs of one length, one for each seed. Element i of a run comes from words
    x of Philox4x32-10 (Salmon et al., 2011) with the key ``seed`` and the counter ``i // 4``, by Box and Muller:
    radius ``sqrt(-2 log((x_0 + 1/2) / 2^32))`` and angle ``2 pi x_1 / 2^32`` give elements 0 (cosine) and 1 (sine)
    of the four, x_2 and x_3 elements 2 and 3.
    """
    run = shape.numel() // max(len(seed), 1)
    counter = torch.arange((run + 3) // 4, device=seed.device)
    zero = torch.zeros_like(counter)
    words = torch.stack([torch.stack(_philox((counter & _LOW, counter >> 32, zero, zero), s)) for s in seed])
    uniform = words.double() * 2.0**-32  # [S, 4, run / 4]
    radius = torch.sqrt(-2 * torch.log(uniform[:, 0::2] + 2.0**-33))
    angle = 2 * math.pi * uniform[:, 1::2]
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 2)  # [S, 2, 2, run / 4]
    return pairs.flatten(1, 2).mT.flatten(1)[:, :run].reshape(shape)


def _philox(counter: tuple[Tensor, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Ten rounds on four 32-bit words, held in int64, whose products wrap around as 64 bits do."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3
