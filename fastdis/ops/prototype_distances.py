"""Squared Euclidean distances between queries and prototypes, without the [Q, N, D] differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks


def prototype_distances(queries: Tensor, prototypes: Tensor, *, backend: str = "auto") -> Tensor:
    r"""Squared Euclidean distances, :math:`\|q - p\|^2`, never negative.

    Both sides are centred on the episode's mean prototype before the product, so a common offset costs no digits:
    with an offset of 50 and true distances of 5e-3, float32 results are right to 1e-4.

    Parameters
    ----------
    queries : Tensor [*, Q, D]
        float32, float64, float16 or bfloat16; products and sums are in float32 (float64 for float64).
    prototypes : Tensor [*, N, D]
        In the dtype of ``queries`` (under autocast, mixed dtypes are promoted). Leading dimensions broadcast.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    Tensor [*, Q, N]
        In the dtype of ``queries``. Differentiable in both to any order: first derivatives by compiled kernels as
        matrix products, higher ones through the reference. Forward-mode differentiation is refused.

    Raises
    ------
    TypeError
        If a tensor is not of a floating dtype, or the dtypes differ.
    ValueError
        If the shapes or devices do not match.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> distances = prototype_distances(torch.randn(75, 64), torch.randn(5, 64))
    >>> nearest = distances.argmin(-1)
    """
    queries, prototypes, leading = as_episodes(queries, prototypes)
    chosen = _column.choose(backend, queries)
    if chosen == "reference":
        distances = reference.prototype_distances(queries, prototypes)
    else:
        distances = _autograd.apply(_PrototypeDistances, queries, prototypes, chosen)
    return distances if len(leading) == 1 else distances.reshape(*leading, *distances.shape[-2:])


def as_episodes(queries: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """Check queries [*, Q, D] and prototypes [*, N, D]; return them as [E, Q, D] and [E, N, D], and the leading shape.

    Raises
    ------
    TypeError, ValueError
        As :func:`prototype_distances`.
    """
    for name, value in (("queries", queries), ("prototypes", prototypes)):
        _checks.floating(name, value)
        if value.dim() < 2:
            raise ValueError(f"{name} has shape {list(value.shape)}; at least two dimensions, [*, rows, D], are needed")
    _checks.same_device("prototypes", prototypes, "queries", queries)
    if queries.shape[-1] != prototypes.shape[-1]:
        raise ValueError(
            f"prototypes has {prototypes.shape[-1]} dimensions in shape {list(prototypes.shape)}; "
            f"{queries.shape[-1]}, as in queries, are needed"
        )
    queries, prototypes = _checks.one_dtype(queries=queries, prototypes=prototypes)
    leading = queries.shape[:-2]
    if queries.dim() == 3 and leading == prototypes.shape[:-2]:
        return queries, prototypes, leading  # no views, which cost a small input more than its products
    if leading != prototypes.shape[:-2]:
        try:
            leading = torch.broadcast_shapes(leading, prototypes.shape[:-2])
        except RuntimeError as error:
            raise ValueError(
                f"prototypes has leading dimensions {list(prototypes.shape[:-2])}; some that broadcast with those of "
                f"queries, {list(queries.shape[:-2])}, are needed"
            ) from error
    return _spread(queries, leading), _spread(prototypes, leading), leading


def _spread(value: Tensor, leading: torch.Size) -> Tensor:
    """The leading dimensions broadcast to ``leading``, then made one."""
    if value.shape[:-2] != leading:
        value = value.expand(*leading, *value.shape[-2:])
    return value.reshape(leading.numel(), *value.shape[-2:])


class _PrototypeDistances(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(queries: Tensor, prototypes: Tensor, backend: str) -> Tensor:
        return _column.kernels[backend].forward(queries, prototypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        queries, prototypes, ctx.backend = inputs
        ctx.save_for_backward(queries, prototypes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kernel = partial(_backward_kernel, ctx.backend)
        return (*_autograd.backward(kernel, reference.prototype_distances, (grad,), ctx.saved_tensors), None)


def _backward_kernel(backend: str, grad: Tensor, queries: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    return _column.kernels[backend].backward(grad, queries, prototypes)


def _forward_fake(queries: Tensor, prototypes: Tensor) -> Tensor:
    return queries.new_empty((queries.shape[0], queries.shape[1], prototypes.shape[1]))


def _backward_fake(grad: Tensor, queries: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), prototypes.new_empty(prototypes.shape)


def _vmap(op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        output = op(*_batching.fold(info.batch_size, in_dims, *tensors))
        if isinstance(output, Tensor):
            return *_batching.unfold(info.batch_size, output), 0
        return _batching.unfold(info.batch_size, *output), (0, 0)

    return rule


_column = _backends.register(
    "prototype_distances",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_vmap,
    backward_vmap=_vmap,
)
