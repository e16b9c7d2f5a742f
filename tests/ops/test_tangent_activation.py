import pytest
import torch
from column_suite import ColumnSuite, Sample
from test_sum_gradient_fields import draw

import fastdis
from fastdis import reference
from fastdis.ops.tangent_activation import ACTIVATIONS, PARAMETERS


def tangent_sample(activation, tangents, batch, *size, directions=False, bias=False, name="", **flags):
    tensors = {"rows": draw(1 if directions else 1 + tangents, batch, *size, seed=1) * 2}
    if directions:
        tensors["directions"] = draw(tangents, *size, seed=2)
    if bias:
        tensors["bias"] = draw(size[0], seed=3)
    options = {"activation": activation}
    if activation in PARAMETERS:
        options["parameter"] = 0.3
    return Sample(name or activation, tensors, options, **flags)


class TestTangentActivation(ColumnSuite):
    name = "tangent_activation"
    op = staticmethod(fastdis.tangent_activation)
    reference = staticmethod(reference.tangent_activation)
    roundings = 8  # slopes and curvatures are sums of a few products

    @staticmethod
    def samples():
        return [
            *(tangent_sample(name, 3, 2, 5, bias=index % 2 == 0) for index, name in enumerate(ACTIVATIONS)),
            tangent_sample("silu", 2, 3, 4, 5, directions=True, bias=True, name="directions"),
            tangent_sample("relu", 3, 2, 4, directions=True, name="relu_directions"),
            tangent_sample("leaky_relu", 2, 3, 4, 2, 3, bias=True, name="image"),
            tangent_sample("gelu", 0, 3, 4, bias=True, name="no_tangent"),
            tangent_sample("tanh", 1, 1, 1, name="one_of_each"),
            tangent_sample("silu", 3, 9, 5, 11, 13, bias=True, name="threads", gradcheck=False,
                           slow_in_interpreter=True),
            tangent_sample("relu", 4, 40, 600, directions=True, bias=True, name="columns", gradcheck=False,
                           slow_in_interpreter=True),
            tangent_sample("silu", 2, 0, 4, bias=True, name="no_sample", empty=True),
        ]  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("part", [0, 1])
def test_split_outputs_are_differentiated_apart(activation, part):
    rows, bias = draw(4, 2, 5).requires_grad_(), draw(5, seed=2).requires_grad_()
    whole = reference.tangent_activation(rows, None, bias, activation=activation)
    exact = torch.autograd.grad((whole[0] if part == 0 else whole[1:]).sum(), (rows, bias))
    halves = fastdis.tangent_activation(rows, None, bias, activation=activation, split=True)
    ours = torch.autograd.grad(halves[part].sum(), (rows, bias))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_it_is_forward_mode_differentiation():
    primal, direction = draw(3, 7), draw(3, 7, seed=2)
    for name in ACTIVATIONS:
        function = lambda a, name=name: reference.tangent_activation.__globals__["ACTIVATIONS"][name](a, 0.7)  # noqa: E731
        value, slope = torch.func.jvp(function, (primal,), (direction,))
        rows = fastdis.tangent_activation(torch.stack([primal, direction]), activation=name, parameter=0.7)
        torch.testing.assert_close(rows, torch.stack([value, slope]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation):
    x = torch.tensor([-1e4, -90.0, -30.0, -10.0, 10.0, 30.0, 90.0, 1e4])
    rows = torch.stack([x, torch.ones(8)])[:, None]
    ours = fastdis.tangent_activation(rows, activation=activation, parameter=0.5)
    exact = reference.tangent_activation(rows.double(), activation=activation, parameter=0.5)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-7)


def test_bad_arguments_are_refused_by_name():
    rows, op = torch.randn(3, 2, 5), fastdis.tangent_activation
    for kind, message, call in (
        (ValueError, r"rows has shape \[2, 5\]; \[1 \+ K, B, C, \*\]", lambda: op(rows[0])),
        (ValueError, r"directions has shape \[2, 5\]; \[K, C, \*\] beside", lambda: op(rows, rows[1])),
        (ValueError, r"bias has shape \[4\]; \[C\] of rows", lambda: op(rows, None, torch.ones(4))),
        (TypeError, "bias has dtype torch.float64; that of rows", lambda: op(rows, None, torch.ones(5).double())),
        (ValueError, "activation is 'swish'; allowed are 'none', 'relu'", lambda: op(rows, activation="swish")),
        (ValueError, "parameter is -1; as negative_slope of leaky_relu it has to be 0 or more",
         lambda: op(rows, activation="leaky_relu", parameter=-1)),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()
