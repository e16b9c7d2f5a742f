"""Linear layers and activations of a primal and its tangents, in one autograd function.

A training step of a small decoder spends a fifth of its time on what autograd does beside the products, layer by layer.
Layers together pay for that once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdis import reference
from fastdis.ops import _autograd, _backends, _products
from fastdis.ops.tangent_activation import ACTIVATIONS, PIECEWISE_LINEAR

_kernels = _backends.columns()["tangent_activation"].kernels


class Linear(NamedTuple):
    """A linear layer, and the name and the parameter of the activation after it."""

    weight: Tensor
    bias: Tensor | None
    activation: str | None = None
    parameter: float = 0.0


class _Step(NamedTuple):
    """A layer without its tensors; the activation by number."""

    has_bias: bool
    activation: int | None
    parameter: float

    @property
    def curved(self) -> bool:
        return self.activation is not None and self.activation >= PIECEWISE_LINEAR


class _Plan(NamedTuple):
    """The layers without their tensors, where they start and how they end."""

    steps: tuple[_Step, ...]
    latent: bool
    split: bool
    backend: str

    @property
    def outputs(self) -> int:
        """One of every layer; but the last may be a primal and tangents apart."""
        return len(self.steps) + self.split

    def by_layer(self, values: Sequence[Any]) -> list[tuple[_Step, Any, Any]]:
        """Every step with what belongs to its weight and to its bias, None where it has none."""
        rest = iter(values)
        return [(step, next(rest), next(rest) if step.has_bias else None) for step in self.steps]


def perceptron(
    rows: Tensor, layers: Sequence[Linear], *, latent: bool, split: bool, backend: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Apply linear layers and activations to a primal and its tangents.

    Parameters
    ----------
    rows
        Primal and tangents [1 + K, B, H]; or latents [1, B, K], whose tangents are the unit vectors.
    layers
        In the dtype of the rows. Each has an activation, but the last need not have one if ``split``.
    latent
        Whether the rows are latents; the first layer has an activation then.
    split
        Whether the last output is wanted as primal [B, D] and tangents [K, B, D], each with a gradient of its own.
    backend
        Of the activations; not the reference.

    Returns
    -------
    The outputs [1 + K, B, H] of all layers but the last, and that of the last, or the two it is split into. All are
    differentiable.
    """
    steps: list[_Step] = []
    tensors: list[Tensor] = []
    for layer in layers:
        activation = None if layer.activation is None else ACTIVATIONS.index(layer.activation)
        steps.append(_Step(layer.bias is not None, activation, float(layer.parameter)))
        tensors += [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    plan, inner = _Plan(tuple(steps), latent, split, backend), len(steps) - 1
    outputs = _autograd.apply(_Perceptron, plan, rows, *tensors)
    return outputs[:inner], outputs[inner : plan.outputs]


def linear_of_pair(primal: Tensor, tangents: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Apply a linear layer to a primal [B, H] and tangents [K, B, H], each of which has a gradient of its own."""
    outputs: tuple[Tensor, Tensor] = _autograd.apply(_LinearOfPair, primal, tangents, weight, bias)
    return outputs


def folded_gram(tangents: Tensor, weight: Tensor, backend: str) -> Tensor:
    """Gram matrices [B, K, K] of what a linear layer [D, H] makes of tangents [K, B, H], which is not formed."""
    if backend == "reference":
        return _folded_reference(tangents, weight)
    gram: Tensor = _autograd.apply(_FoldedGram, tangents, weight)[0]
    return gram


class _Perceptron(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(plan: _Plan, rows: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        products: list[Tensor] = []  # before curved activations
        for i, (step, weight, bias) in enumerate(plan.by_layer(tensors)):
            if step.activation is None:
                outputs += _products.linear(rows[0], weight, bias), _products.linear(rows[1:], weight)
                break
            if plan.latent and i == 0:
                product, directions, offset = _products.linear(rows, weight, bias), weight.mT, None
            else:
                product, directions, offset = _products.linear(rows, weight), None, bias
            rows = _kernels[plan.backend].forward(product, directions, offset, step.activation, step.parameter)
            outputs.append(rows)
            if step.curved:
                products.append(product)
        else:
            if plan.split:
                outputs[-1:] = rows[0], rows[1:]
        return *outputs, *products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, *tensors = inputs
        steps = ctx.plan.steps
        products = output[ctx.plan.outputs :]
        # Every output is the next layer's input. A piecewise linear activation shows its slope in its output, too.
        kept = len(steps) - (steps[-1].activation is None or steps[-1].curved)
        ctx.inputs = len(tensors)
        ctx.save_for_backward(*tensors, *output[:kept], *products)
        ctx.mark_non_differentiable(*products)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = grads[: ctx.plan.outputs]
        if all(g is None for g in grads):
            return (None,) * (1 + ctx.inputs)
        inputs, statistics = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        needs = None if torch.is_grad_enabled() else ctx.needs_input_grad[1:]
        kernel, same = partial(_gradients, ctx.plan, needs, ctx.inputs), partial(_reference, ctx.plan)
        with _as_forward(inputs[0]):
            return None, *_autograd.backward(kernel, same, grads, inputs, statistics)


def _gradients(plan: _Plan, needs: Sequence[bool] | None, count: int, *tensors: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the rows and of the layers' tensors: those that are needed, or of all where needs is None."""
    grads, inputs = tensors[: plan.outputs], tensors[plan.outputs : plan.outputs + count]
    kept = list(tensors[plan.outputs + count :])  # outputs, and after them products before curved activations
    needed = (True,) * count if needs is None else needs
    found: list[Tensor | None] = [None] * count
    layers, place = plan.by_layer(inputs[1:]), count
    last = len(layers) - 1
    pair: Sequence[Tensor | None] = grads[last:] if plan.split else _apart(grads[last])
    for i in range(last, -1, -1):
        step, weight, bias = layers[i]
        place -= 1 + step.has_bias
        rows = kept[i - 1] if i > 0 else inputs[0]
        # Of the rows, the weight and the bias; the rows need a gradient if anything before them does.
        wanted = (any(needed[:place]), needed[place], step.has_bias and needed[place + 1])
        if step.activation is None:
            asked = (wanted[0], *wanted)
            *pair, dweight, dbias = _gradients_of_pair(pair, (rows[0], rows[1:]), weight, asked)
        else:
            if step.curved:
                saved = kept.pop()
            elif plan.split and i == last:
                saved = kept[i].unsqueeze(0)
            else:
                saved = kept[i][:1]
            drows, dweight, dbias = _gradients_of_step(plan, i, pair, saved, rows, weight, bias, wanted)
            pair = _apart(drows)
        found[place] = dweight
        if step.has_bias:
            found[place + 1] = dbias
        if not wanted[0]:
            break
        if i == 0:
            found[0] = drows
        else:
            pair = [_sum(*terms) for terms in zip(pair, _apart(grads[i - 1]), strict=True)]
    if needs is None:
        return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True))
    return tuple(found)


def _gradients_of_step(
    plan: _Plan, i: int, pair: Sequence[Tensor | None], saved: Tensor, rows: Tensor, weight: Tensor,
    bias: Tensor | None, wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of rows, weight and bias of a layer with an activation."""
    step, (primal, tangents) = plan.steps[i], pair
    from_latents = plan.latent and i == 0
    if tangents is None:  # and nothing would tell the kernel how many there are
        count = rows.shape[2] if from_latents else rows.shape[0] - 1
        tangents = _autograd.stand_in((count, *saved.shape[1:]), saved)
    dproducts, ddirections, dbias = _kernels[plan.backend].backward(
        primal, tangents, saved, weight.mT if from_latents else None, None if from_latents else bias,
        step.activation, step.parameter,
    )  # fmt: skip
    flat = dproducts.reshape(-1, dproducts.shape[-1])
    dweight = _products.matmul(flat.mT, rows.reshape(-1, rows.shape[-1])) if wanted[1] else None
    if from_latents:
        dweight = None if dweight is None else dweight + ddirections.mT
        dbias = flat.sum(0) if wanted[2] else None
    return _products.matmul(dproducts, weight) if wanted[0] else None, dweight, dbias


def _as_forward(tensor: Tensor) -> AbstractContextManager[Any]:
    """Out of autocast, as forward was, even if backward is called under it."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _apart(rows: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rows is None else (rows[0], rows[1:])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _reference(plan: _Plan, rows: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    outputs: list[Tensor] = []
    if plan.latent:
        units = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device).unsqueeze(1)
        rows = torch.cat([rows, units.expand(-1, rows.shape[1], -1)])
    for step, weight, bias in plan.by_layer(tensors):
        products = F.linear(rows, weight)
        if step.activation is None:
            return *outputs, products[0] if bias is None else products[0] + bias, products[1:]
        name = ACTIVATIONS[step.activation]
        rows = reference.tangent_activation(products, None, bias, activation=name, parameter=step.parameter)
        outputs.append(rows)
    return (*outputs[:-1], rows[0], rows[1:]) if plan.split else tuple(outputs)


class _LinearOfPair(torch.autograd.Function):
    """Autograd would write each product's gradient of the weight and add them.

    For a wide output that takes longer than either product; here the second product adds to what the first has left.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(primal: Tensor, tangents: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return _products.linear(primal, weight, bias), _products.linear(tangents, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        primal, tangents, weight, _ = inputs
        ctx.save_for_backward(primal, tangents, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, weight = ctx.saved_tensors
        with _as_forward(weight):
            return _gradients_of_pair(grads, inputs, weight, ctx.needs_input_grad)


def _gradients_of_pair(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor], weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of primal, tangents, weight and bias: those that are needed and do depend on something."""
    dprimal, dtangents = (
        _products.matmul(grad, weight) if grad is not None and needed else None
        for grad, needed in zip(grads, needs, strict=False)
    )
    dweight: Tensor | None = None
    for grad, rows in zip(grads, inputs, strict=True):
        if grad is None or not needs[2]:
            continue
        left, right = grad.reshape(-1, grad.shape[-1]).mT, rows.reshape(-1, rows.shape[-1])
        if dweight is None:
            dweight = _products.matmul(left, right)
        elif torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            dweight = torch.addmm(dweight, left, right)
        else:
            _products.add_matmul_(dweight, left, right)
    dbias = grads[0].sum(0) if needs[3] and grads[0] is not None else None
    return dprimal, dtangents, dweight, dbias


class _FoldedGram(torch.autograd.Function):
    """T (W^T W) T^T with two large products backward, where autograd would take four: all of it is symmetric."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tangents: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        pulled = _products.matmul(tangents, _products.matmul(weight.mT, weight))
        return pulled.transpose(0, 1) @ tangents.permute(1, 2, 0), pulled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        tangents, weight, pulled = ctx.saved_tensors
        needs = (True, True) if torch.is_grad_enabled() else ctx.needs_input_grad
        kernel = partial(_gradients_of_folded, needs)
        with _as_forward(weight):
            return _autograd.backward(kernel, _folded_reference, (grad,), (tangents, weight), (pulled,))


def _gradients_of_folded(
    needs: Sequence[bool], grad: Tensor, tangents: Tensor, weight: Tensor, pulled: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    symmetric = grad + grad.mT
    dtangents = (symmetric @ pulled.transpose(0, 1)).transpose(0, 1) if needs[0] else None
    if not needs[1]:
        return dtangents, None
    by_sample = tangents.transpose(0, 1)
    weighted = (symmetric @ by_sample).flatten(0, 1)
    return dtangents, _products.matmul(weight, _products.matmul(weighted.mT, by_sample.flatten(0, 1)))


def _folded_reference(tangents: Tensor, weight: Tensor) -> Tensor:
    return (tangents @ (weight.mT @ weight)).transpose(0, 1) @ tangents.permute(1, 2, 0)
