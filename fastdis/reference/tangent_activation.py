"""An activation and its derivative on tangents, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda x, parameter: x,
    "relu": lambda x, parameter: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": lambda x, parameter: F.silu(x),
    # F.gelu gives NaN at infinity on some machines.
    "gelu": lambda x, parameter: 0.5 * x * (1 + torch.erf(0.5**0.5 * x)),
    "gelu_tanh": lambda x, parameter: F.gelu(x, approximate="tanh"),
    "tanh": lambda x, parameter: torch.tanh(x),
    "sigmoid": lambda x, parameter: torch.sigmoid(x),
    "softplus": F.softplus,
}


def tangent_activation(
    rows: Tensor,
    directions: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "relu",
    parameter: float = 0.0,
) -> Tensor:
    """``phi(a + bias)`` of primal rows and ``phi'(a + bias) * t`` of tangent rows.

    Rows are [1 + K, B, C, *], the primal first; or, where all samples share their tangents, [1, B, C, *] beside
    directions [K, C, *]. The bias is [C]. Returns [1 + K, B, C, *].
    """
    primal, tangents = rows[0], rows[1:]
    if directions is not None:
        tangents = directions.unsqueeze(1).expand(-1, *primal.shape)
    if bias is not None:
        primal = primal + bias.reshape(-1, *(1,) * (primal.dim() - 2))
    value, slope = value_and_slope(lambda a: ACTIVATIONS[activation](a, parameter), primal)
    return torch.cat([value.unsqueeze(0), slope * tangents])


def value_and_slope(activation: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """An activation and its derivative at x: it acts on each element alone, so one product with ones gives all."""
    pulled: tuple[Any, ...] = torch.func.vjp(activation, x)
    return pulled[0], pulled[1](torch.ones_like(x))[0]
