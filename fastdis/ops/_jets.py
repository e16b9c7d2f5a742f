"""Values that carry their tangents through any Python code: forward-mode differentiation for all latents at once.

A ``Jet`` stands in a tensor's place while a decoder runs: the primal and its K tangents as rows of one tensor. Each
function that the decoder calls is looked up in a table of handlers; a linear function maps all rows alike, an
activation is :func:`fastdis.ops.tangent_activation`, and a function that is not in the table is differentiated by
``torch.func``.
Layers and activations wait until something needs them, so that what follows may be folded into them, and so that linear
layers and their activations run together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fastdis.ops import _checks, _perceptron, _products
from fastdis.ops.tangent_activation import tangent_activation


class Parts(NamedTuple):
    """A primal and its tangents.

    Rows are [1 + K, B, *], the primal first, and ``offset``, which broadcasts to [1, 1, *], is still to be added to the
    primal. As long as all samples share their tangents, rows are [1, B, *] beside directions [K, 1, *], and no offset.
    """

    rows: Tensor
    directions: Tensor | None = None
    offset: Tensor | None = None

    def map(self, linear: Callable[[Tensor], Tensor]) -> Parts:
        """Map every part by a linear function of [rows, batch, *]."""
        directions, offset = self.directions, self.offset
        return Parts(
            linear(self.rows),
            None if directions is None else linear(directions),
            None if offset is None else linear(offset.expand(1, 1, *self.rows.shape[2:])),
        )

    def shift(self, constant: Tensor) -> Parts:
        """Add [1, 1, *], which broadcasts, to the primal."""
        if self.directions is not None:
            return self._replace(rows=self.rows + constant)
        return self._replace(offset=constant if self.offset is None else self.offset + constant)

    def joint(self) -> Parts:
        """The same as rows alone."""
        if self.directions is not None:
            return Parts(torch.cat([self.rows, self.directions.expand(-1, *self.rows.shape[1:])]))
        if self.offset is None:
            return self
        primal, tangents = self.rows.split([1, self.rows.shape[0] - 1])
        return Parts(torch.cat([(primal + self.offset).to(primal.dtype), tangents]))

    def pair(self) -> tuple[Tensor, Tensor]:
        """The primal [B, *], and the tangents [K, B, *]."""
        if self.directions is not None:
            return self.rows.squeeze(0), self.directions.expand(-1, *self.rows.shape[1:])
        # Split, not indexed: its backward joins the two gradients in one copy.
        primal, tangents = self.rows.split([1, self.rows.shape[0] - 1])
        if self.offset is not None:
            primal = (primal + self.offset).to(primal.dtype)
        return primal.squeeze(0), tangents


class Layer(NamedTuple):
    """A linear or convolution layer that has not run: a BatchNorm may yet be folded into it, or it may be the last."""

    source: Jet
    function: Callable[..., Tensor]
    weight: Tensor
    bias: Tensor | None
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def parts(self) -> Parts:
        rows, directions, offset = self.source.parts
        if directions is not None:
            rows = self._apply(rows, self.bias)
            if self.function is F.linear and self.source.latent:
                return Parts(rows, self.weight.mT.unsqueeze(1).to(rows.dtype))
            return Parts(rows, self._apply(directions))
        if offset is not None:
            offset = self._apply(offset.expand(1, 1, *rows.shape[2:]), self.bias)
        elif self.bias is not None:
            offset = self.bias if self.function is F.linear else self.bias.reshape(-1, *(1,) * (rows.dim() - 3))
        return Parts(self._apply(rows), None, offset)

    def pair(self) -> tuple[Tensor, Tensor]:
        """As the last layer: the primal and the tangents in a product each, so that neither is ever copied.

        After one product for both, backward would first copy the two gradients into one tensor of the Jacobian's size.
        """
        if self.source.shared:
            return self.parts().pair()
        before = self.source.pending
        if isinstance(before, _Activation) and before.layer is not None and self.joins():
            primal, tangents = _run_together(self, split=True)
            return primal, tangents
        primal, tangents = self.source.pair()
        one_dtype = primal.dtype == tangents.dtype == self.weight.dtype
        if self.function is F.linear and primal.dim() == 2 and one_dtype and not _autocast(primal):
            return _perceptron.linear_of_pair(primal, tangents, self.weight, self.bias)
        return self._call(primal, self.bias), self._apply(tangents)

    def joins(self) -> bool:
        """Whether it may run in one autograd function with linear layers before it and the activation after it."""
        source = self.source
        if self.function is not F.linear or source.backend == "reference" or not torch.is_grad_enabled():
            return False
        if source.dim() != 2 or _autocast_dtype("cpu") is not None or _autocast_dtype("cuda") is not None:
            return False
        if not source.latent and not isinstance(source.pending, _Activation):
            _, directions, offset = source.parts
            if directions is not None or offset is not None:
                return False
        return all(t.dtype == source.dtype for t in (self.weight, self.bias) if t is not None)

    def scaled(self, scale: Tensor, shift: Tensor) -> Layer:
        """The layer followed by ``* scale + shift`` of each channel, computed in the dtype of these."""
        weight = self.weight.to(scale.dtype)
        if self.function in _TRANSPOSED:  # [in, out / groups, *]
            scales = scale.reshape(-1, 1, weight.shape[1], *(1,) * (weight.dim() - 2))
            weight = (weight.unflatten(0, (len(scales), -1)) * scales).flatten(0, 1)
        else:
            weight = weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
        bias = shift if self.bias is None else self.bias * scale + shift
        return self._replace(weight=weight.to(self.weight.dtype), bias=bias.to(self.weight.dtype))

    def _call(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.function is F.linear:
            return _products.linear(x, self.weight, bias)
        if self.function in _IMAGES and x.device.type == "cpu" and x.dtype != torch.float64:
            x = x.contiguous(memory_format=torch.channels_last)  # transposed convolutions are up to thrice as fast so
        return self.function(x, self.weight, bias, *self.arguments, **self.options)

    def _apply(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.function is F.linear:
            return self._call(rows, bias)  # in any number of dimensions
        return _flat(lambda x: self._call(x, bias))(rows)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


class _Activation(NamedTuple):
    """An activation that has not run: what follows decides whether primal and tangents are wanted apart."""

    source: Jet
    name: str
    parameter: float

    @property
    def layer(self) -> Layer | None:
        """The linear layer that waits to run together with it."""
        return self.source.pending if isinstance(self.source.pending, Layer) else None

    def parts(self) -> Parts:
        return Parts(*(self._run(split=False) if self.layer is None else _run_together(self, split=False)))

    def pair(self) -> tuple[Tensor, Tensor]:
        if self.layer is None:
            primal, tangents = self._run(split=True)
            return primal.squeeze(0), tangents
        primal, tangents = _run_together(self, split=True)
        return primal, tangents

    def _run(self, split: bool) -> list[Tensor]:
        """Bring the parts to [rows, B, C, *] where they lie, and the result back to their shape."""
        rows, directions, bias = self.source.parts
        batch, sample = rows.shape[1], rows.shape[2:]
        channels = sample[0] if sample else 1
        if bias is not None:
            at = bias.dim() - len(sample)
            by_channels = bias.numel() == channels and (not sample or (at >= 0 and bias.shape[at] == channels))
            if not by_channels:
                channels, bias = sample.numel(), bias.expand(1, 1, *sample)
            bias = (bias if bias.dim() == 1 else bias.reshape(-1)).to(rows.dtype)
        by_channel = rows.movedim(2, -1) if len(sample) > 1 and channels == sample[0] else rows
        channels_last = not rows.is_contiguous() and by_channel.is_contiguous()
        if not channels_last:
            if len(sample) != 1:  # each view costs what a small layer does
                rows = rows.reshape(rows.shape[0], batch, channels, sample.numel() // max(channels, 1))
            directions = None if directions is None else directions.reshape(directions.shape[0], *rows.shape[2:])
        elif directions is None:
            rows = by_channel.reshape(rows.shape[0], -1, channels)
        else:  # there is no bias beside directions, so that channels do not matter
            rows = by_channel.reshape(1, batch, -1)
            directions = directions.movedim(2, -1).reshape(directions.shape[0], -1)
        output = tangent_activation(
            rows, directions, bias, activation=self.name, parameter=self.parameter, split=split,
            backend=self.source.backend,
        )  # fmt: skip
        outputs = [output] if isinstance(output, Tensor) else [output[0].unsqueeze(0), output[1]]
        if channels_last:
            return [t.reshape(t.shape[0], *by_channel.shape[1:]).movedim(-1, 2) for t in outputs]
        return outputs if len(sample) == 1 else [t.reshape(t.shape[0], batch, *sample) for t in outputs]


def _run_together(last: Layer | _Activation, split: bool) -> tuple[Tensor, ...]:
    """Run the linear layers and activations that wait, up to this one, in one autograd function."""
    step: Any = last
    layers: list[_perceptron.Linear] = []
    inner: list[Jet] = []
    while True:
        layer, *activation = (step,) if isinstance(step, Layer) else (step.layer, step.name, step.parameter)
        layers.insert(0, _perceptron.Linear(layer.weight, layer.bias, *activation))
        source, step = layer.source, layer.source.pending
        if not isinstance(step, _Activation) or step.layer is None:
            break
        inner.insert(0, source)
    hidden, outputs = _perceptron.perceptron(
        source.parts.rows, layers, latent=source.latent, split=split, backend=source.backend
    )
    for jet, rows in zip(inner, hidden, strict=True):
        jet.settle(Parts(rows))
    return outputs


class _Mapped(NamedTuple):
    """A linear function, such as a view, of what has not run."""

    source: Jet
    linear: Callable[[Tensor], Tensor]

    def parts(self) -> Parts:
        return self.source.parts.map(self.linear)

    def pair(self) -> tuple[Tensor, Tensor]:
        primal, tangents = self.source.pair()
        return self.linear(primal.unsqueeze(0)).squeeze(0), self.linear(tangents)


_Mode = tuple[bool, torch.dtype | None, torch.dtype | None]


def _mode() -> _Mode:
    """What a call depends on besides its arguments: whether gradients are recorded, and autocast's dtypes."""
    return torch.is_grad_enabled(), _autocast_dtype("cpu"), _autocast_dtype("cuda")


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


@contextmanager
def _in_mode(mode: _Mode | None) -> Iterator[None]:
    """Run what has waited as if it had not: the decoder may switch autocast or gradients on and off as it goes."""
    now = _mode()
    if mode is None or mode == now:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(mode[0]))
        for device_type, wanted, present in zip(("cpu", "cuda"), mode[1:], now[1:], strict=True):
            if wanted != present:
                stack.enter_context(torch.autocast(device_type, dtype=wanted, enabled=wanted is not None))
        yield


class Jet:
    """What stands for a tensor [B, *] while the decoder runs: its value and its tangents, computed when needed."""

    def __init__(
        self,
        parts: Parts | None = None,
        pending: Layer | _Activation | _Mapped | None = None,
        *,
        backend: str,
        latent: bool = False,
    ) -> None:
        self._parts, self._pending, self.backend = parts, pending, backend
        self._mode = None if pending is None else _mode()
        self.latent = latent  # the latents themselves, whose tangents are unit vectors

    @property
    def parts(self) -> Parts:
        if self._parts is None:
            assert self._pending is not None
            with _in_mode(self._mode):
                self.settle(self._pending.parts())
        assert self._parts is not None
        return self._parts

    def settle(self, parts: Parts) -> None:
        """Take what had been waiting to be computed."""
        self._parts, self._pending = parts, None

    @property
    def pending(self) -> Layer | _Activation | _Mapped | None:
        return self._pending

    @property
    def shared(self) -> bool:
        """Whether all samples have the same tangents."""
        if isinstance(self._pending, _Activation):
            return False
        return self.parts.directions is not None if self._pending is None else self._pending.source.shared

    def pair(self) -> tuple[Tensor, Tensor]:
        """The primal [B, *] and the tangents [K, B, *], each of which may then have a gradient of its own."""
        if self._pending is None:
            return self.parts.pair()
        with _in_mode(self._mode):
            return self._pending.pair()

    def last_linear(self) -> Layer | None:
        """The linear layer on [B, H] that this is the output of, if that has not run."""
        layer = self._pending
        return layer if isinstance(layer, Layer) and layer.function is F.linear and layer.source.dim() == 2 else None

    def map(self, linear: Callable[[Tensor], Tensor], *, mixes_samples: bool = False) -> Jet:
        """Map by a linear function of [rows, B, *], which leaves dimension 1 alone unless it ``mixes_samples``."""
        if self._pending is not None and not mixes_samples and not self.shared:
            return self.then(_Mapped(self, linear))
        parts = self.parts.joint() if mixes_samples else self.parts
        return self.like(parts.map(linear))

    def like(self, parts: Parts) -> Jet:
        return Jet(parts, backend=self.backend)

    def then(self, pending: Layer | _Activation | _Mapped) -> Jet:
        return Jet(pending=pending, backend=self.backend)

    def activate(self, name: str, parameter: float = 0.0, *, inplace: bool = False) -> Jet:
        if not isinstance(self._pending, Layer) or not self._pending.joins():
            _ = self.parts
        source = Jet(self._parts, self._pending, backend=self.backend) if inplace else self
        output = self.then(_Activation(source, name, parameter))
        return self.assign(output) if inplace else output

    def assign(self, other: Jet) -> Jet:
        """Become what a function that works in place returns."""
        self._parts, self._pending, self.latent = other._parts, other._pending, False
        return self

    # -- as a tensor -------------------------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        step = self._pending
        if not isinstance(step, _Activation):
            return self.parts.rows.shape[1:]
        if step.layer is None:
            return step.source.shape
        return torch.Size((step.layer.source.shape[0], step.layer.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        step = self._pending
        if not isinstance(step, _Activation):
            return self.parts.rows.dtype
        return step.source.dtype if step.layer is None else step.layer.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.parts.rows.device

    @property
    def ndim(self) -> int:
        return self.dim()

    def dim(self) -> int:
        # A layer keeps the number of dimensions, and asked for that, as every BatchNorm does, need not run.
        step = self._pending
        if isinstance(step, _Activation) and step.layer is not None:
            return 2
        return step.source.dim() if isinstance(step, (Layer, _Activation)) else len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        method = getattr(Tensor, name)
        if not callable(method):
            value = getattr(self.parts.rows, name)
            if isinstance(value, Tensor):
                raise AttributeError(f"decoder uses the attribute {name} of a tensor; a function is needed instead")
            return value
        return lambda *args, **kwargs: _dispatch(method, (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(function, args, kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        return _dispatch(Tensor.__getitem__, (self, index), {})

    def __neg__(self) -> Any:
        return _dispatch(torch.neg, (self,), {})

    def __add__(self, other: Any) -> Any:
        return _dispatch(torch.add, (self, other), {})

    def __radd__(self, other: Any) -> Any:
        return _dispatch(torch.add, (other, self), {})

    def __sub__(self, other: Any) -> Any:
        return _dispatch(torch.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Any:
        return _dispatch(torch.sub, (other, self), {})

    def __mul__(self, other: Any) -> Any:
        return _dispatch(torch.mul, (self, other), {})

    def __rmul__(self, other: Any) -> Any:
        return _dispatch(torch.mul, (other, self), {})

    def __truediv__(self, other: Any) -> Any:
        return _dispatch(torch.div, (self, other), {})

    def __rtruediv__(self, other: Any) -> Any:
        return _dispatch(torch.div, (other, self), {})

    def __pow__(self, exponent: Any) -> Any:
        return _dispatch(torch.pow, (self, exponent), {})

    def __matmul__(self, other: Any) -> Any:
        return _dispatch(torch.matmul, (self, other), {})

    def __rmatmul__(self, other: Any) -> Any:
        return _dispatch(torch.matmul, (other, self), {})

    def __gt__(self, other: Any) -> Any:
        return _dispatch(torch.gt, (self, other), {})

    def __ge__(self, other: Any) -> Any:
        return _dispatch(torch.ge, (self, other), {})

    def __lt__(self, other: Any) -> Any:
        return _dispatch(torch.lt, (self, other), {})

    def __le__(self, other: Any) -> Any:
        return _dispatch(torch.le, (self, other), {})


# -- the table of functions ------------------------------------------------------------------------------------------

_OF_ONE: dict[Any, Callable[..., Any]] = {}  # handlers of calls with one jet, the first argument
_OF_SEVERAL: dict[Any, Callable[..., Any]] = {}  # handlers of calls with jets and tensors anywhere
_warned: set[str] = set()


def _dispatch(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``function`` on jets: by its handler, or by ``torch.func`` where that is absent or does not serve."""
    handler = _OF_SEVERAL.get(function)
    others = (*args[1:], *(value for name, value in kwargs.items() if args or name != "input"))
    if handler is None and not any(isinstance(value, Jet) for value in others):
        handler = _OF_ONE.get(function)
    output = NotImplemented if handler is None else handler(*args, **kwargs)
    return _differentiated(function, args, kwargs) if output is NotImplemented else output


def _differentiated(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any function of jets by forward mode of ``torch.func``, mapped over the K tangents."""
    name = getattr(function, "__name__", type(function).__name__)
    if name.endswith("_") and not name.endswith("__"):
        raise TypeError(f"decoder calls {name}, which works in place; {name[:-1]} is needed for its Jacobian")
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"decoder_jacobian has no rule for {name} with these arguments: torch.func differentiates it, more slowly.",
            stacklevel=4,
        )
    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Jet)]
    like = leaves[places[0]]
    rows = [leaves[i].parts.joint().rows for i in places]

    def of_primals(*primals: Tensor) -> Any:
        filled = list(leaves)
        for i, primal in zip(places, primals, strict=True):
            filled[i] = primal
        filled_args, filled_kwargs = pytree.tree_unflatten(filled, structure)
        return function(*filled_args, **filled_kwargs)

    def along(*tangents: Tensor) -> Any:
        return torch.func.jvp(of_primals, tuple(r[0] for r in rows), tangents)

    primal, tangents = torch.func.vmap(along, randomness="same")(*(r[1:] for r in rows))
    return pytree.tree_map(lambda p, t: like.like(Parts(torch.cat([p[:1], t]))), primal, tangents)


def _handles(
    *names: str, of: Iterable[Any] = (torch, F, Tensor), table: dict[Any, Callable[..., Any]] = _OF_ONE
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a handler for the functions of these names in ``torch``, ``torch.nn.functional`` and ``Tensor``."""

    def enter(handler: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            table.update((getattr(place, name), handler) for place in of if hasattr(place, name))
        return handler

    return enter


def _flat(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of a batch as one of [rows, batch, *]."""

    def of_rows(rows: Tensor) -> Tensor:
        output = function(rows.flatten(0, 1))
        return output.reshape(*rows.shape[:2], *output.shape[1:])

    return of_rows


# Layers.

_IMAGES = (F.conv2d, F.conv_transpose2d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _enter_layer(function: Callable[..., Tensor]) -> None:
    def layer(input: Any, weight: Any, bias: Any = None, *arguments: Any, **options: Any) -> Any:
        if (weight.dim() != 2 or input.dim() < 2) if function is F.linear else input.dim() != weight.dim():
            return NotImplemented
        if isinstance(input.pending, Layer):
            _ = input.parts  # so that no two layers wait without an activation between them
        return input.then(Layer(input, function, weight, bias, arguments, options))

    _OF_ONE[function] = layer


for _function in (F.linear, F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED):
    _enter_layer(_function)


@_handles("matmul", "__matmul__")
def _matmul(input: Any, other: Any) -> Any:
    return _OF_ONE[F.linear](input, other.mT) if other.dim() == 2 else NotImplemented


@_handles("batch_norm", of=(F,))
def _batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    if training or running_mean is None:
        raise ValueError(over_the_batch("decoder calls a batch_norm that"))
    dtype = torch.promote_types(running_var.dtype, torch.float32)
    scale = torch.rsqrt(running_var.to(dtype) + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    layer = input.pending
    if isinstance(layer, Layer) and (layer.function is not F.linear or layer.source.dim() == 2):
        return input.then(layer.scaled(scale, shift))
    return _affine(input, scale, shift)


def _affine(input: Jet, scale: Tensor | None, shift: Tensor | None) -> Jet:
    """Scale and shift by channel."""
    parts = input.parts
    shape, dtype = (1, 1, -1, *(1,) * (input.dim() - 2)), parts.rows.dtype
    if scale is not None:
        scales = scale.reshape(shape).to(dtype)
        parts = parts.map(lambda t: t * scales)
    return input.like(parts if shift is None else parts.shift(shift.reshape(shape).to(dtype)))


# Normalisations within a sample.


def _normalised(input: Jet, groups: tuple[int, ...], eps: float) -> Jet:
    """Normalise samples, reshaped to [*groups, elements], over their elements."""
    primal, tangents, offset = input.parts
    if tangents is None:
        primal, tangents = primal.split([1, primal.shape[0] - 1])
    sample = primal.shape[2:]
    size = sample.numel() // max(math.prod(groups), 1)
    dtype = _checks.statistics_dtype(primal.dtype)

    def grouped(rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:2], *groups, size).to(dtype)

    primal, tangents = grouped(primal if offset is None else primal + offset), grouped(tangents)
    centred = primal - primal.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normal = centred * rstd
    # Only what is orthogonal to the constants and to the value itself moves the normalised value.
    along = (normal * tangents).mean(-1, keepdim=True)
    tangents = (tangents - tangents.mean(-1, keepdim=True) - normal * along) * rstd
    rows = torch.cat([normal, tangents]).to(input.dtype)
    return input.like(Parts(rows.reshape(*rows.shape[:2], *sample)))


@_handles("group_norm")
def _group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Any:
    return _affine(_normalised(input, (num_groups,), eps), weight, bias)


@_handles("instance_norm", of=(F,))
def _instance_norm(
    input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is not None:
        raise ValueError(
            "decoder calls an instance_norm that updates running averages; decoder.eval() or "
            "track_running_stats=False is needed"
        )
    return _affine(_normalised(input, (input.shape[1],), eps), weight, bias)


@_handles("layer_norm")
def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    over = len(normalized_shape)
    if over >= input.dim():
        return NotImplemented
    output = _normalised(input, tuple(input.shape[1 : input.dim() - over]), eps).parts
    if weight is not None:
        output = output.map(lambda t: t * weight.to(t.dtype))
    if bias is not None:
        output = output.shift(bias.reshape(*(1,) * (output.rows.dim() - over), *bias.shape).to(output.rows.dtype))
    return input.like(output)


# Activations.


@_handles("relu")
def _relu(input: Any, inplace: bool = False) -> Any:
    return input.activate("relu", inplace=inplace)


@_handles("leaky_relu")
def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if negative_slope < 0:
        return NotImplemented
    return input.activate("leaky_relu", negative_slope, inplace=inplace)


@_handles("elu")
def _elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Any:
    return input.activate("elu", alpha, inplace=inplace) if alpha > 0 else NotImplemented


@_handles("silu")
def _silu(input: Any, inplace: bool = False) -> Any:
    return input.activate("silu", inplace=inplace)


@_handles("gelu")
def _gelu(input: Any, approximate: str = "none") -> Any:
    return input.activate("gelu" if approximate == "none" else "gelu_tanh")


@_handles("tanh")
def _tanh(input: Any) -> Any:
    return input.activate("tanh")


@_handles("sigmoid")
def _sigmoid(input: Any) -> Any:
    return input.activate("sigmoid")


@_handles("softplus")
def _softplus(input: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return input.activate("softplus", beta) if beta > 0 and threshold == 20 else NotImplemented


def _enter_dropout(function: Callable[..., Tensor]) -> None:
    def dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if not training or p == 0:
            return input
        parts = input.parts.joint()
        mask = function(torch.ones_like(parts.rows[0]), p, True)
        output = input.like(parts.map(lambda t: t * mask))
        return input.assign(output) if inplace else output

    _OF_ONE[function] = dropout


for _masking in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
    _enter_dropout(_masking)


# Functions that are linear in the batch as a whole.


def _enter_batched(function: Callable[..., Any], least_dims: int) -> None:
    def batched(input: Any, *arguments: Any, **options: Any) -> Any:
        if input.dim() < least_dims:
            return NotImplemented
        return input.map(_flat(lambda x: function(x, *arguments, **options)))

    _OF_ONE[function] = batched


for _of_a_batch, _least in (
    (F.interpolate, 3), (F.pixel_shuffle, 4), (F.pixel_unshuffle, 4),
    (F.avg_pool1d, 3), (F.avg_pool2d, 4), (F.avg_pool3d, 5),
    (F.adaptive_avg_pool1d, 3), (F.adaptive_avg_pool2d, 4), (F.adaptive_avg_pool3d, 5),
):  # fmt: skip
    _enter_batched(_of_a_batch, _least)


@_handles("pad", of=(F,))
def _pad(input: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    if len(pad) // 2 >= input.dim() or (mode == "constant" and value):
        return NotImplemented
    return input.map(_flat(lambda x: F.pad(x, pad, mode)))


# Shapes. Dimension d of a jet is dimension d + 1 of its rows; counted from the end, it is the same.


def _behind(dim: int) -> int:
    return dim + 1 if dim >= 0 else dim


def _given(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    """The sizes of ``f(2, 3)`` and of ``f((2, 3))``."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _to_shape(input: Jet, shape: tuple[int, ...]) -> Jet:
    if shape[0] != input.shape[0] or math.prod(shape[1:]) != input.shape[1:].numel():
        return input.map(lambda t: t.reshape(t.shape[0], *shape), mixes_samples=True)
    return input.map(lambda t: t.reshape(*t.shape[:2], *shape[1:]))


@_handles("view", "reshape")
def _view(input: Any, *sizes: Any, shape: Any = None) -> Any:
    wanted = list(_given(sizes) if shape is None else shape)
    if not wanted or not all(isinstance(n, (int, torch.SymInt)) for n in wanted):
        return NotImplemented
    if -1 in wanted:
        # An empty batch leaves nothing to divide; its samples do not.
        first = 1 if wanted[0] == input.shape[0] else 0
        missing = wanted.index(-1)
        elements = input.shape[first:].numel()
        others = math.prod(wanted[first:missing] + wanted[missing + 1 :])
        wanted[missing] = elements // max(others, 1)
    return _to_shape(input, tuple(wanted))


@_handles("view_as", "reshape_as", table=_OF_SEVERAL)
def _view_as(input: Any, other: Any) -> Any:
    return _to_shape(input, tuple(other.shape)) if isinstance(input, Jet) and other.dim() > 0 else NotImplemented


@_handles("flatten")
def _flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    mixes = start_dim % input.dim() == 0 and end_dim % input.dim() != 0
    return input.map(lambda t: t.flatten(_behind(start_dim), _behind(end_dim)), mixes_samples=mixes)


@_handles("unflatten")
def _unflatten(input: Any, dim: int, sizes: Any) -> Any:
    return input.map(lambda t: t.unflatten(_behind(dim), sizes), mixes_samples=dim % input.dim() == 0)


@_handles("squeeze")
def _squeeze(input: Any, dim: Any = None) -> Any:
    dims = range(input.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    gone = tuple(d % input.dim() for d in dims if input.shape[d] == 1)
    return input.map(lambda t: t.squeeze(tuple(d + 1 for d in gone)), mixes_samples=0 in gone)


@_handles("unsqueeze")
def _unsqueeze(input: Any, dim: int) -> Any:
    return input.map(lambda t: t.unsqueeze(_behind(dim)), mixes_samples=dim % (input.dim() + 1) == 0)


@_handles("permute")
def _permute(input: Any, *dims: Any) -> Any:
    order = [d % input.dim() for d in _given(dims)]
    return input.map(lambda t: t.permute(0, *(d + 1 for d in order)), mixes_samples=order[0] != 0)


@_handles("transpose", "swapaxes", "swapdims")
def _transpose(input: Any, dim0: int, dim1: int) -> Any:
    mixes = 0 in (dim0 % input.dim(), dim1 % input.dim())
    return input.map(lambda t: t.transpose(_behind(dim0), _behind(dim1)), mixes_samples=mixes)


@_handles("expand", of=(Tensor,))
def _expand(input: Any, *sizes: Any) -> Any:
    wanted = _given(sizes)
    if len(wanted) != input.dim() or wanted[0] not in (-1, input.shape[0]):
        return NotImplemented
    return input.map(lambda t: t.expand(-1, -1, *wanted[1:]))


@_handles("repeat", of=(Tensor,))
def _repeat(input: Any, *sizes: Any) -> Any:
    counts = _given(sizes)
    if len(counts) != input.dim() or counts[0] != 1:
        return NotImplemented
    return input.map(lambda t: t.repeat(1, *counts))


@_handles("contiguous", "clone")
def _same(input: Any, *, memory_format: Any = None) -> Any:
    return input


@_handles("to", of=(Tensor,), table=_OF_SEVERAL)
def _to(input: Any, *arguments: Any, **options: Any) -> Any:
    arguments = tuple(a.parts.rows if isinstance(a, Jet) else a for a in arguments)
    return input.map(lambda t: t.to(*arguments, **options)) if isinstance(input, Jet) else input.to(*arguments)


for _name, _dtype in (
    ("float", torch.float32), ("double", torch.float64), ("half", torch.float16), ("bfloat16", torch.bfloat16)
):  # fmt: skip
    _OF_ONE[getattr(Tensor, _name)] = partial(_to, dtype=_dtype)


@_handles("__getitem__", of=(Tensor,))
def _index(input: Any, index: Any) -> Any:
    items = index if isinstance(index, tuple) else (index,)
    if not all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in items):
        return NotImplemented
    if Ellipsis in items:
        at = items.index(Ellipsis)
        taken = sum(item is not None and item is not Ellipsis for item in items)
        items = (*items[:at], *(slice(None),) * (input.dim() - taken), *items[at + 1 :])
    behind = (slice(None), *items)
    return input.map(lambda t: t[behind], mixes_samples=items[:1] != (slice(None),))


def _pieces(input: Jet, dim: int, cut: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Jet, ...]:
    mixes = dim % input.dim() == 0
    count = len(cut(input.parts.rows))
    return tuple(input.map(lambda t, i=i: cut(t)[i], mixes_samples=mixes) for i in range(count))  # type: ignore[misc]


@_handles("chunk")
def _chunk(input: Any, chunks: int, dim: int = 0) -> Any:
    return _pieces(input, dim, lambda t: t.chunk(chunks, _behind(dim)))


@_handles("split")
def _split(input: Any, split_size: Any, dim: int = 0) -> Any:
    return _pieces(input, dim, lambda t: t.split(split_size, _behind(dim)))


@_handles("unbind")
def _unbind(input: Any, dim: int = 0) -> Any:
    return _pieces(input, dim, lambda t: t.unbind(_behind(dim)))


@_handles("cat", "concat", "concatenate", of=(torch,), table=_OF_SEVERAL)
def _cat(tensors: Any, dim: int = 0) -> Any:
    like = next(t for t in tensors if isinstance(t, Jet))
    mixes = dim % like.dim() == 0
    _run_layers(*tensors)
    parts = [t.parts if isinstance(t, Jet) else constant(t, like) for t in tensors]
    if mixes or any(p.directions is None for p in parts):
        return like.like(Parts(torch.cat([p.joint().rows for p in parts], _behind(dim))))
    rows, directions = [p.rows for p in parts], [p.directions for p in parts if p.directions is not None]
    return like.like(Parts(torch.cat(rows, _behind(dim)), torch.cat(directions, _behind(dim))))


def _run_layers(*values: Any) -> None:
    """Run the layers that wait among these: another of them may be an activation of one, and would run it, too."""
    for value in values:
        if isinstance(value, Jet) and isinstance(value.pending, Layer):
            _ = value.parts


@_handles("stack", of=(torch,), table=_OF_SEVERAL)
def _stack(tensors: Any, dim: int = 0) -> Any:
    return _cat([t.unsqueeze(dim) for t in tensors], dim)


def _enter_reduction(name: str) -> None:
    @_handles(name)
    def reduction(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        if dim is None or dtype is not None:
            return NotImplemented
        dims = [d % input.dim() for d in ((dim,) if isinstance(dim, int) else dim)]
        return input.map(
            lambda t: getattr(t, name)([d + 1 for d in dims], keepdim=keepdim), mixes_samples=not dims or 0 in dims
        )


_enter_reduction("sum")
_enter_reduction("mean")


# Arithmetic.


def constant(value: Tensor, like: Jet) -> Parts:
    """A tensor [B, *] that does not depend on the latents."""
    rows, directions, _ = like.parts
    count = rows.shape[0] - 1 if directions is None else directions.shape[0]
    return Parts(value.unsqueeze(0), value.new_zeros(count, 1, *value.shape[1:]))


def _beside(input: Jet, constant: Any) -> Any:
    """A constant as it broadcasts with rows: a number, or a tensor [1, 1 or B, *]; None if it has more dimensions."""
    if not isinstance(constant, Tensor):
        return constant
    missing = input.dim() - constant.dim()
    return constant.reshape(1, *(1,) * missing, *constant.shape) if missing >= 0 else None


def _by_sample(constant: Any) -> bool:
    return isinstance(constant, Tensor) and constant.shape[1] != 1


@_handles("add", "__add__", "__radd__", table=_OF_SEVERAL)
def _add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        other = other * alpha
    if not isinstance(input, Jet):
        input, other = other, input
    if isinstance(other, Jet):
        return _sum(input, other) if input.dim() == other.dim() else NotImplemented
    constant = _beside(input, other)
    parts = input.parts
    if isinstance(constant, Tensor):
        if torch.broadcast_shapes(parts.rows.shape[1:], constant.shape[1:]) != parts.rows.shape[1:]:
            return NotImplemented
        dtype = torch.result_type(parts.rows, other)
        parts = parts.map(lambda t: t.to(dtype))
    elif constant is None:
        return NotImplemented
    elif parts.directions is None:
        constant = parts.rows.new_full((1,) * parts.rows.dim(), constant)
    if parts.directions is None and _by_sample(constant):
        primal, tangents = parts.joint().rows.split([1, parts.rows.shape[0] - 1])
        return input.like(Parts(torch.cat([primal + constant, tangents])))
    return input.like(parts.shift(constant))


def _sum(input: Jet, other: Jet) -> Jet:
    _run_layers(input, other)
    a, b = input.parts, other.parts
    if a.directions is not None and b.directions is not None:
        return input.like(Parts(a.rows + b.rows, a.directions + b.directions))
    a, b = (p if p.directions is None else p.joint() for p in (a, b))
    total = Parts(a.rows + b.rows, None, a.offset)
    return input.like(total if b.offset is None else total.shift(b.offset))


@_handles("sub", "subtract", "__sub__", table=_OF_SEVERAL)
def _sub(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return _add(input, other, alpha=-alpha)


@_handles("__rsub__", "rsub", table=_OF_SEVERAL)
def _rsub(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return _add(other, input, alpha=-alpha)


@_handles("mul", "multiply", "__mul__", "__rmul__", table=_OF_SEVERAL)
def _mul(input: Any, other: Any) -> Any:
    if not isinstance(input, Jet):
        input, other = other, input
    if isinstance(other, Jet):
        return _product(input, other) if input.dim() == other.dim() else NotImplemented
    constant = _beside(input, other)
    if constant is None:
        return NotImplemented
    return input.map(lambda t: t * constant, mixes_samples=_by_sample(constant))


def _product(input: Jet, other: Jet) -> Jet:
    _run_layers(input, other)
    a, b = input.parts.joint().rows, other.parts.joint().rows
    return input.like(Parts(torch.cat([a[:1] * b[:1], a[:1] * b[1:] + b[:1] * a[1:]])))


@_handles("div", "divide", "true_divide", "__truediv__", table=_OF_SEVERAL)
def _div(input: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    if isinstance(other, Jet) or rounding_mode is not None:
        return NotImplemented
    constant = _beside(input, other)
    if constant is None:
        return NotImplemented
    return input.map(lambda t: t / constant, mixes_samples=_by_sample(constant))


@_handles("neg", "negative", "__neg__")
def _neg(input: Any) -> Any:
    return input.map(torch.neg)


# What does not depend on tangents, and has none.


def _enter_plain(function: Callable[..., Any]) -> None:
    def plain(*arguments: Any, **options: Any) -> Any:
        return function(*(a.parts.pair()[0] if isinstance(a, Jet) else a for a in arguments), **options)

    _OF_SEVERAL[function] = plain


for _name in (
    "gt", "ge", "lt", "le", "eq", "ne", "isnan", "isinf", "isfinite", "argmax", "argmin", "zeros_like", "ones_like",
    "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_empty", "new_full",
    "is_floating_point", "is_complex", "is_contiguous", "stride", "element_size",
):  # fmt: skip
    for _place in (torch, Tensor):
        if hasattr(_place, _name):
            _enter_plain(getattr(_place, _name))


def over_the_batch(what: str) -> str:
    return f"{what} normalises over the batch, so that no sample has a Jacobian of its own; decoder.eval() is needed"
