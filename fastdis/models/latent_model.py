"""What training, checkpoints and evaluation need of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class LatentModel(nn.Module, ABC):
    """A model that makes codes of images or points, and can say what it is to minimise.

    Attributes
    ----------
    latent_dim : int
        Number of latents, N.
    """

    latent_dim: int

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image or point."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the arguments that make a model like this one."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return the codes [B, N] of images or points [B, *input_shape]."""

    @abstractmethod
    def loss(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return what to minimise on images or points [B, *input_shape] as ``loss``, and its parts by name."""

    def _check_input(self, x: Tensor) -> None:
        """Refuse inputs of another shape."""
        expected = self.input_shape
        if x.dim() != 1 + len(expected) or x.shape[1:] != expected:
            raise ValueError(f"x must have shape [B, {', '.join(map(str, expected))}], got {list(x.shape)}")
