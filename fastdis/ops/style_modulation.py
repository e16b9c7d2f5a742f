"""Style modulation: group or instance normalisation, per-sample scale and shift, and activation, in one op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _batching, _checks
from fastdis.reference.style_modulation import ACTIVATIONS


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
    backend: str = "auto",
) -> Tensor:
    r"""Normalise, modulate by a per-sample style, and activate, reading ``x`` from memory once.

    .. math:: y = \mathrm{act}(\hat x \cdot \mathrm{scale} + \mathrm{shift}), \qquad
              \hat x = \mathrm{GroupNorm}(x) \cdot \mathrm{weight} + \mathrm{bias}

    This is AdaIN (Huang and Belongie, 2017) with ``groups == C``, the adaptive group normalisation of diffusion
    U-Nets (Dhariwal and Nichol, 2021) with ``scale = 1 + s``, the fusion block of C-S DisMo (Ren et al., 2021) with
    ``groups == 0``, and FiLM. Two chained scale/shift pairs (weight and bias, then scale and shift) fold into one.

    Parameters
    ----------
    x : Tensor [B, C, *]
        float32, float64, float16 or bfloat16; any number of spatial dimensions. Contiguous and channels-last tensors
        are read where they lie; others are copied first.
    scale, shift : Tensor [B, C]
        Any of the four dtypes, whatever that of ``x``; they are used in float32 (float64 for a float64 ``x``).
    groups : int
        0 for no normalisation, else a divisor of C: each group of ``C // groups`` channels is normalised with its mean
        and biased variance over channels and positions. ``groups == C`` is instance normalisation.
    weight, bias : Tensor [C], optional
        Applied after the normalisation and before the style.
    eps : float
        Added to the variance.
    activation : {"none", "relu", "leaky_relu", "silu"}
    negative_slope : float
        Of ``"leaky_relu"``.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        A backend asked for by name fails rather than give way to another.

    Returns
    -------
    Tensor [B, C, *]
        In the dtype and memory layout of ``x``. Differentiable in every tensor to any order: first derivatives by
        compiled kernels, higher ones through the reference. Forward-mode differentiation is refused.

    Raises
    ------
    TypeError
        If a tensor is not of a floating dtype.
    ValueError
        If shapes or devices do not match, ``groups`` does not divide C, or a name is unknown.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> x, style = torch.randn(8, 64, 32, 32), torch.randn(8, 2, 64)
    >>> y = style_modulation(x, 1 + style[:, 0], style[:, 1], groups=32, activation="silu")
    """
    _check(x, scale, shift, groups, weight, bias, activation)
    chosen = _column.choose(backend, x)
    dtype = x.dtype if chosen == "reference" else _checks.statistics_dtype(x.dtype)
    scale, shift = scale.to(dtype), shift.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if chosen == "reference":
        return reference.style_modulation(
            x, scale, shift, groups=groups, weight=weight, bias=bias, eps=eps, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip
    return _autograd.apply(
        _StyleModulation, x, scale, shift, weight, bias, groups, float(eps), ACTIVATIONS.index(activation),
        float(negative_slope), chosen,
    )[0]  # fmt: skip


def adain(
    content: Tensor, style: Tensor, *, eps: float = 1e-5, unbiased: bool = False, backend: str = "auto"
) -> Tensor:
    r"""Adaptive instance normalisation: give ``content`` the channel means and deviations of ``style``.

    .. math:: y = \sqrt{\mathrm{var}(s) + \epsilon}\,
              \frac{c - \mathrm{mean}(c)}{\sqrt{\mathrm{var}(c) + \epsilon}} + \mathrm{mean}(s)

    Huang and Belongie (2017), eq. 8. With the biased variance, ``adain(x, x)`` is ``x``.

    Parameters
    ----------
    content : Tensor [B, C, *]
        The dtypes and layouts of :func:`style_modulation`.
    style : Tensor [B, C, *]
        Its spatial size may differ from the content's.
    eps : float
        Added to both variances.
    unbiased : bool
        Whether the style's variance divides by ``n - 1``, as the authors' Lua code does; the content's is biased.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        As in :func:`style_modulation`.

    Returns
    -------
    Tensor [B, C, *]
        Like ``content``; differentiable in both.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`style_modulation`; also where ``style`` has no position, or one with ``unbiased=True``.
    """
    _checks.floating("content", content)
    _checks.floating("style", style)
    if content.dim() < 3:
        raise ValueError(f"content has shape {list(content.shape)}; [B, C, *] with a spatial dimension is needed")
    if style.dim() < 3 or style.shape[:2] != content.shape[:2]:
        raise ValueError(
            f"style has shape {list(style.shape)}; [B, C, *] with B and C of content, {list(content.shape[:2])}, "
            "is needed"
        )
    _checks.same_device("style", style, "content", content)
    positions = style[0, 0].numel() if style.shape[0] and style.shape[1] else style.shape[2:].numel()
    if positions < 1 + int(unbiased):
        raise ValueError(f"style has {positions} positions; at least {1 + int(unbiased)} are needed for its variance")
    dtype = _checks.statistics_dtype(content.dtype)
    positions_of_style = style.flatten(2).to(dtype)
    variance, mean = torch.var_mean(positions_of_style, dim=-1, correction=int(unbiased))
    return style_modulation(
        content, torch.sqrt(variance + eps), mean, groups=content.shape[1], eps=eps, backend=backend
    )


def _check(
    x: Tensor, scale: Tensor, shift: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, activation: str
) -> None:
    _checks.floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {list(x.shape)}; [B, C, *] is needed")
    batch, channels = x.shape[0], x.shape[1]
    for name, value in (("scale", scale), ("shift", shift)):
        _checks.beside(name, value, (batch, channels), "[B, C] of x", "x", x)
    for name, optional in (("weight", weight), ("bias", bias)):
        if optional is not None:
            _checks.beside(name, optional, (channels,), "[C] of x", "x", x)
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups is {groups!r}; an integer is needed: 0, or a divisor of the channels")
    if groups < 0 or (groups > 0 and channels % groups != 0):
        raise ValueError(f"groups is {groups}; allowed are 0 and the divisors of the {channels} channels of x")
    _checks.one_of("activation", activation, ACTIVATIONS)


class _StyleModulation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float,
        activation: int, negative_slope: float, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        kernel = _column.kernels[backend].forward
        return kernel(x, scale, shift, weight, bias, groups, eps, activation, negative_slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, scale, shift, weight, bias, *ctx.options = inputs
        _, mean, rstd = output
        ctx.has_weight, ctx.has_bias = weight is not None, bias is not None
        ctx.save_for_backward(*(t for t in (x, scale, shift, weight, bias) if t is not None), mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        *inputs, mean, rstd = ctx.saved_tensors
        options = (ctx.has_weight, ctx.has_bias, *ctx.options)
        gradients = iter(
            _autograd.backward(
                partial(_backward_kernel, *options),
                partial(_reference, *options),
                (dy,),
                tuple(inputs),
                (mean, rstd),
            )
        )
        present = (True, True, True, ctx.has_weight, ctx.has_bias)
        return (*(next(gradients) if there else None for there in present), *[None] * 5)


def _named(has_weight: bool, has_bias: bool, optional: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias out of those that are there."""
    return optional[0] if has_weight else None, optional[-1] if has_bias else None


def _backward_kernel(
    has_weight: bool, has_bias: bool, groups: int, eps: float, activation: int, negative_slope: float, backend: str,
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, *rest: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    *optional, mean, rstd = rest
    weight, bias = _named(has_weight, has_bias, tuple(optional))
    dx, dscale, dshift, dweight, dbias = _column.kernels[backend].backward(
        dy, x, mean, rstd, scale, shift, weight, bias, groups, activation, negative_slope
    )
    return (dx, dscale, dshift, *([dweight] if has_weight else []), *([dbias] if has_bias else []))


def _reference(
    has_weight: bool, has_bias: bool, groups: int, eps: float, activation: int, negative_slope: float, backend: str,
    x: Tensor, scale: Tensor, shift: Tensor, *optional: Tensor,
) -> Tensor:  # fmt: skip
    weight, bias = _named(has_weight, has_bias, optional)
    y = reference.style_modulation(
        x, scale, shift, groups=groups, weight=weight, bias=bias, eps=eps, activation=ACTIVATIONS[activation],
        negative_slope=negative_slope,
    )  # fmt: skip
    return y.to(x.dtype)


def _empty_image(x: Tensor) -> Tensor:
    """Allocate what the kernels do: channels-last for a dense channels-last ``x``, else contiguous."""
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)
    return x.new_empty(x.shape)


def _forward_fake(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float,
    activation: int, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = scale.new_empty((x.shape[0], groups))
    return _empty_image(x), statistics, torch.empty_like(statistics)


def _backward_fake(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None,
    bias: Tensor | None, groups: int, activation: int, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dscale, dshift = scale.new_empty(scale.shape), scale.new_empty(scale.shape)
    channels = x.shape[1]
    dweight = scale.new_empty((channels if weight is not None else 0,))
    dbias = scale.new_empty((channels if bias is not None else 0,))
    return _empty_image(x), dscale, dshift, dweight, dbias


def _fold_affine(size: int, in_dims: Any, scale: Any, shift: Any, weight: Any, bias: Any) -> tuple[Tensor, ...]:
    """Scale [V, B, C], shift, weight [V, 1, C] and bias in front-batched form, and gamma and beta out of the four."""
    scale, shift = _batching.in_front(size, in_dims[0], scale), _batching.in_front(size, in_dims[1], shift)
    weight = (
        torch.ones_like(scale[:, :1]) if weight is None else _batching.in_front(size, in_dims[2], weight).unsqueeze(1)
    )
    bias = torch.zeros_like(scale[:, :1]) if bias is None else _batching.in_front(size, in_dims[3], bias).unsqueeze(1)
    return scale, weight, bias, scale * weight, scale * bias + shift


def _forward_vmap(op: Any) -> Callable[..., Any]:
    """Fold the mapped dimension into the batch; a mapped weight and bias into scale and shift."""

    def rule(info: Any, in_dims: Any, x: Any, scale: Any, shift: Any, weight: Any, bias: Any, *options: Any) -> Any:
        x = _batching.in_front(info.batch_size, in_dims[0], x)
        *_, gamma, beta = _fold_affine(info.batch_size, in_dims[1:5], scale, shift, weight, bias)
        outputs = op(x.flatten(0, 1), gamma.flatten(0, 1), beta.flatten(0, 1), None, None, *options)
        return tuple(t.unflatten(0, x.shape[:2]) for t in outputs), (0, 0, 0)

    return rule


def _backward_vmap(op: Any) -> Callable[..., Any]:
    def rule(
        info: Any, in_dims: Any, dy: Any, x: Any, mean: Any, rstd: Any, scale: Any, shift: Any, weight: Any, bias: Any,
        *options: Any,
    ) -> Any:  # fmt: skip
        size = info.batch_size
        dy, x, mean, rstd = (_batching.in_front(size, d, t) for d, t in zip(in_dims, (dy, x, mean, rstd), strict=False))
        folded_scale, folded_weight, folded_bias, gamma, beta = _fold_affine(
            size, in_dims[4:8], scale, shift, weight, bias
        )
        flat = (t.flatten(0, 1) for t in (dy, x, mean, rstd, gamma, beta))
        dx, dgamma, dbeta, *_ = (t.unflatten(0, x.shape[:2]) for t in op(*flat, None, None, *options)[:3])
        dscale = dgamma * folded_weight + dbeta * folded_bias
        nothing = dgamma.new_empty((size, 0))
        dweight = nothing if weight is None else (dgamma * folded_scale).sum(1)
        dbias = nothing if bias is None else (dbeta * folded_scale).sum(1)
        return (dx, dscale, dbeta, dweight, dbias), (0,) * 5

    return rule


_column = _backends.register(
    "style_modulation",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    forward_vmap=_forward_vmap,
    backward_vmap=_backward_vmap,
)
