"""An activation on primal rows and its derivative on their tangents: forward-mode differentiation, fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks
from fastdis.reference.tangent_activation import ACTIVATIONS as BY_NAME

ACTIVATIONS = tuple(BY_NAME)
PARAMETERS = {"leaky_relu": "negative_slope", "elu": "alpha", "softplus": "beta"}
# Of these the sign of the output gives the slope, and there is no curvature: backward needs no input.
PIECEWISE_LINEAR = 3


def tangent_activation(
    rows: Tensor,
    directions: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str = "relu",
    parameter: float = 0.0,
    split: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Apply an activation to primal rows and multiply their tangents by its slope there.

    .. math:: y = \varphi(a + b), \qquad t'_k = \varphi'(a + b)\, t_k

    The step of forward-mode differentiation that follows one product for the primal and all K tangents.
    Differentiating it gives :math:`\bar a = \varphi' \bar y + \varphi'' \sum_k \bar t_k t_k`, in one pass as well, so
    that penalties of a Jacobian need no double backward. :func:`decoder_jacobian` is built on it.

    Parameters
    ----------
    rows : Tensor [1 + K, B, C, *]
        The primal rows first, then K tangents: float32, float64, float16 or bfloat16, computed in float32 (float64
        for float64). With ``directions``, the primal alone, [1, B, C, *].
    directions : Tensor [K, C, *], optional
        Tangents that all samples share, as they are before the first nonlinearity.
    bias : Tensor [C], optional
        Added to the primal rows.
    activation : {"none", "relu", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus"}
    parameter : float
        Slope of ``"leaky_relu"`` below 0 (not negative), alpha of ``"elu"``, beta of ``"softplus"``.
    split : bool
        Whether to return the primal and the tangents apart, so that each gets a gradient of its own.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    Tensor [1 + K, B, C, *], or Tensor [B, C, *] and Tensor [K, B, C, *] with ``split``
        In the dtype of ``rows``. Differentiable in every tensor to any order: first derivatives by compiled kernels,
        higher ones through the reference. Forward-mode differentiation is refused.

    Raises
    ------
    TypeError
        If a tensor has the wrong dtype.
    ValueError
        If shapes or devices do not match, the activation is unknown, or its parameter is out of range.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> rows = torch.randn(1 + 3, 8, 64)  # primal and three tangents of eight samples
    >>> y = tangent_activation(rows, bias=torch.zeros(64), activation="silu")
    """
    _checks.floating("rows", rows)
    if rows.dim() < 3 or rows.shape[0] < 1:
        raise ValueError(f"rows has shape {list(rows.shape)}; [1 + K, B, C, *] with the primal first is needed")
    named = {"rows": rows}
    if directions is not None:
        _checks.floating("directions", directions)
        if rows.shape[0] != 1 or directions.dim() != rows.dim() - 1 or directions.shape[1:] != rows.shape[2:]:
            raise ValueError(
                f"directions has shape {list(directions.shape)}; [K, C, *] beside rows [1, B, C, *] is needed, and "
                f"rows has shape {list(rows.shape)}"
            )
        _checks.same_device("directions", directions, "rows", rows)
        named["directions"] = directions
    if bias is not None:
        _checks.beside("bias", bias, rows.shape[2:3], "[C] of rows", "rows", rows)
        named["bias"] = bias
    named = dict(zip(named, _checks.one_dtype(**named), strict=True))
    _checks.one_of("activation", activation, ACTIVATIONS)
    if activation in PARAMETERS and not (parameter >= 0 if activation == "leaky_relu" else parameter > 0):
        least = "0 or more" if activation == "leaky_relu" else "more than 0"
        raise ValueError(f"parameter is {parameter}; as {PARAMETERS[activation]} of {activation} it has to be {least}")
    chosen = _column.choose(backend, rows)
    if chosen == "reference":
        output = reference.tangent_activation(**named, activation=activation, parameter=parameter)
        return (output[0], output[1:]) if split else output
    return _autograd.apply(
        _TangentActivation, named["rows"], named.get("directions"), named.get("bias"),
        ACTIVATIONS.index(activation), float(parameter), split, chosen,
    )  # fmt: skip


class _TangentActivation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, directions: Tensor | None, bias: Tensor | None, activation: int, parameter: float, split: bool,
        backend: str,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        output = _column.kernels[backend].forward(rows, directions, bias, activation, parameter)
        return (output[0], output[1:]) if split else output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rows, directions, bias, *ctx.options = inputs
        activation, _, split, _ = ctx.options
        ctx.tangents = len(rows) - 1 if directions is None else len(directions)
        ctx.has_directions, ctx.has_bias = directions is not None, bias is not None
        # A piecewise linear activation shows its slope in the output, which lives on as the next layer's input.
        kept = rows if activation >= PIECEWISE_LINEAR else output[0] if split else output
        ctx.save_for_backward(kept, *(t for t in (directions, bias) if t is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 7
        activation, parameter, split, backend = ctx.options
        rows, *optional = ctx.saved_tensors
        statistics: tuple[Tensor, ...] = ()
        if activation < PIECEWISE_LINEAR:
            statistics = (rows.unsqueeze(0) if split else rows[:1],)
            rows = statistics[0]
            if torch.is_grad_enabled() and not ctx.has_directions:
                # What the reference is differentiated at: tangents do not matter, only the slopes do.
                rows = torch.cat([rows, rows.new_zeros(()).expand(ctx.tangents, *rows.shape[1:])])
            if torch.is_grad_enabled() and ctx.has_bias:
                optional[-1] = torch.zeros_like(optional[-1])
        options = (ctx.has_directions, ctx.has_bias, activation, parameter)
        gradients = iter(
            _autograd.backward(
                partial(_gradients, *options, split, backend, ctx.tangents),
                partial(_reference, *options, split),
                grads,
                (rows, *optional),
                statistics,
            )
        )
        present = (True, ctx.has_directions, ctx.has_bias)
        return (*(next(gradients) if there else None for there in present), *[None] * 4)


def _named(has_directions: bool, has_bias: bool, optional: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Directions and bias out of those that are there."""
    return optional[0] if has_directions else None, optional[-1] if has_bias else None


def _gradients(
    has_directions: bool, has_bias: bool, activation: int, parameter: float, split: bool, backend: str, tangents: int,
    *tensors: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads, inputs = tensors[: 1 + split], tensors[1 + split :]
    grad_primal, grad_tangents = grads if split else (grads[0][0], grads[0][1:])
    if grad_tangents is None and not has_directions and activation < PIECEWISE_LINEAR:
        grad_tangents = _autograd.stand_in((tangents, *grad_primal.shape), grad_primal)  # or nothing tells their number
    directions, bias = _named(has_directions, has_bias, inputs[1 : 1 + has_directions + has_bias])
    # The last of the tensors are the statistics: the output's primal where that is what backward reads.
    saved = inputs[0] if activation >= PIECEWISE_LINEAR else inputs[-1]
    drows, ddirections, dbias = _column.kernels[backend].backward(
        grad_primal, grad_tangents, saved, directions, bias, activation, parameter
    )
    return (drows, *([ddirections] if has_directions else []), *([dbias] if has_bias else []))


def _reference(
    has_directions: bool, has_bias: bool, activation: int, parameter: float, split: bool, rows: Tensor,
    *optional: Tensor,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    directions, bias = _named(has_directions, has_bias, optional)
    output = reference.tangent_activation(
        rows, directions, bias, activation=ACTIVATIONS[activation], parameter=parameter
    )
    return (output[0], output[1:]) if split else output


def _forward_fake(
    rows: Tensor, directions: Tensor | None, bias: Tensor | None, activation: int, parameter: float
) -> Tensor:
    count = rows.shape[0] if directions is None else 1 + directions.shape[0]
    return rows.new_empty((count, *rows.shape[1:]))


def _backward_fake(
    grad_primal: Tensor | None, grad_tangents: Tensor | None, saved: Tensor, directions: Tensor | None,
    bias: Tensor | None, activation: int, parameter: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if directions is not None:
        count = 1
    elif activation >= PIECEWISE_LINEAR:
        count = saved.shape[0]
    else:
        count = 1 if grad_tangents is None else 1 + grad_tangents.shape[0]
    drows = saved.new_empty((count, *saved.shape[1:]))
    ddirections = saved.new_empty((0,) if directions is None else directions.shape)
    return drows, ddirections, saved.new_empty((0,) if bias is None else bias.shape)


def _into_batch(size: int, in_dim: int | None, rows: Tensor | None) -> Tensor | None:
    """Fold the mapped dimension of rows [R, B, *] into B."""
    return None if rows is None else _batching.in_front(size, in_dim, rows).movedim(0, 1).flatten(1, 2)


def _forward_vmap(op: Any) -> Callable[..., Any]:
    """Fold the mapped dimension into the batch; mapped directions and biases into rows of their own."""

    def rule(
        info: Any, in_dims: Any, rows: Tensor, directions: Tensor | None, bias: Tensor | None, *options: Any
    ) -> Any:
        size = info.batch_size
        rows, directions, bias, _ = _unshared(size, in_dims, rows, directions, bias)
        return op(rows, directions, bias, *options).unflatten(1, (size, -1)), 1

    return rule


def _unshared(
    size: int, in_dims: Any, rows: Tensor, directions: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Rows [R, V B, C, *] with the directions and the bias that are mapped worked in, those that are not, and B."""
    batched = _batching.in_front(size, in_dims[0], rows)
    batch = batched.shape[2]
    if bias is not None and in_dims[2] is not None:
        shape = (size, 1, 1, -1, *(1,) * (rows.dim() - (3 if in_dims[0] is None else 4)))
        primal = batched[:, :1] + _batching.in_front(size, in_dims[2], bias).reshape(shape)
        batched, bias = torch.cat([primal, batched[:, 1:]], 1), None
    if directions is not None and in_dims[1] is not None:
        shared = _batching.in_front(size, in_dims[1], directions).unsqueeze(2).expand(-1, -1, batch, *batched.shape[3:])
        batched, directions = torch.cat([batched, shared], 1), None
    return batched.movedim(0, 1).flatten(1, 2), directions, bias, batch


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(
        info: Any, in_dims: Any, grad_primal: Any, grad_tangents: Any, saved: Tensor, directions: Any, bias: Any,
        activation: int, parameter: float,
    ) -> Any:  # fmt: skip
        size = info.batch_size
        if grad_primal is not None:
            grad_primal = _batching.in_front(size, in_dims[0], grad_primal).flatten(0, 1)
        grad_tangents = _into_batch(size, in_dims[1], grad_tangents)
        if activation < PIECEWISE_LINEAR:
            rows = _into_batch(size, in_dims[2], saved)
        else:
            rows, unmapped, unmapped_bias, _ = _unshared(size, in_dims[2:5], saved, directions, bias)
            if directions is not None and unmapped is not None:  # each map needs the gradient of its own sum
                shared = unmapped.unsqueeze(1).expand(-1, *rows.shape[1:])
                rows = torch.cat([rows, shared])
            if unmapped_bias is not None:
                primal = rows[:1] + unmapped_bias.reshape(-1, *(1,) * (rows.dim() - 3))
                rows = torch.cat([primal, rows[1:]])
        assert rows is not None
        drows = op(grad_primal, grad_tangents, rows, None, None, activation, parameter)[0]
        drows = drows.unflatten(1, (size, -1)).movedim(1, 0)
        ddirections, dbias = drows.new_empty((size, 0)), drows.new_empty((size, 0))
        if bias is not None:
            dbias = drows[:, 0].flatten(3).sum((1, 3)) if drows.dim() > 4 else drows[:, 0].sum(1)
        if directions is not None:
            ddirections, drows = drows[:, 1:].sum(2), drows[:, :1].contiguous()
        return (drows, ddirections, dbias), (0, 0, 0)

    return rule


_column = _backends.register(
    "tangent_activation",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
