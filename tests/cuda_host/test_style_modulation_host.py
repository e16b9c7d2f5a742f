"""The kernels of style_modulation on the CPU against the reference in float64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from harness import DTYPES, TOLERANCES, Arena, assert_near, call, kernels_of, launched, statistics_dtype

from fastdis import reference

SOURCE = "host_style_modulation.cpp"
FILES = ("style_modulation.cu",)
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")
WHOLE = 1 << 20  # bytes of shared memory that hold every group of these tests
NONE = 0  # and that hold no group


def style_modulation(
    library, x, scale, shift, weight, bias, dy, *, groups, activation, layout, shared, multiprocessors=4, **arena
):
    """Return y and the five gradients of the kernels, and whether a group stayed in shared memory."""
    batch, channels, *size = x.shape
    spatial = torch.Size(size).numel()
    last = layout == "channels_last"
    statistics = statistics_dtype(x.dtype)
    kind = ACTIVATIONS.index(activation)
    resident = ctypes.c_int(0)
    long = ctypes.c_int64

    def stored(tensor):
        tensor = tensor.reshape(batch, channels, spatial)
        return tensor.transpose(1, 2).contiguous() if last else tensor.contiguous()

    def loaded(tensor):
        return (tensor.transpose(1, 2) if last else tensor).reshape(x.shape).clone()

    with Arena(library, **arena) as memory:
        x_, dy_ = memory.copy(stored(x)), memory.copy(stored(dy))
        y, dx = memory.empty(x_.shape, x.dtype), memory.empty(x_.shape, x.dtype)
        mean, rstd = (memory.empty((batch, groups), statistics) for _ in range(2))
        scale_, shift_, weight_, bias_ = (memory.copy(t) for t in (scale, shift, weight, bias))
        dscale, dshift = (memory.empty((batch, channels), statistics) for _ in range(2))
        dweight, dbias = (None if t is None else memory.empty((channels,), statistics) for t in (weight, bias))
        shape = [long(value) for value in (batch, channels, spatial, groups)]
        rest = [int(last), 1e-5, kind, 0.2, multiprocessors, long(shared), ctypes.byref(resident)]
        for backward, first, out in ((0, None, y), (1, dy_, dx)):
            call(
                library.style_modulation,
                *(backward, DTYPES[x.dtype], first, x_, out, mean, rstd, scale_, shift_, weight_, bias_),
                *(dscale, dshift, dweight, dbias, *shape, *rest),
            )
        parameters = [None if t is None else t.clone() for t in (dscale, dshift, dweight, dbias)]
        return [loaded(y), loaded(dx), *parameters], bool(resident.value)


def check_style_modulation(
    library, shape, dtype=torch.float32, *, groups, activation="none", affine="both", seed=0, **options
):
    generator = torch.Generator().manual_seed(seed)
    batch, channels = shape[:2]
    statistics = statistics_dtype(dtype)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, dy = (normal(*shape) * 2 + 1).to(dtype), normal(*shape).to(dtype)
    scale, shift = (normal(batch, channels).to(statistics) for _ in range(2))
    weight = normal(channels).to(statistics) if affine in ("weight", "both") else None
    bias = normal(channels).to(statistics) if affine in ("bias", "both") else None
    actual, resident = style_modulation(
        library, x, scale, shift, weight, bias, dy, groups=groups, activation=activation, **options
    )

    leaves = [None if t is None else t.double().requires_grad_() for t in (x, scale, shift, weight, bias)]
    y = reference.style_modulation(
        *leaves[:3], groups=groups, weight=leaves[3], bias=leaves[4], activation=activation, negative_slope=0.2
    )
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(y, present, dy.double()))
    expected = [y.detach(), *(None if leaf is None else next(gradients) for leaf in leaves)]
    for name, ours, exact in zip(("y", "dx", "dscale", "dshift", "dweight", "dbias"), actual, expected, strict=True):
        if exact is None:
            assert ours is None
        else:
            low_precision = name in ("y", "dx") or statistics == dtype
            assert_near(ours, exact, TOLERANCES[dtype if low_precision else statistics], name)
    return resident


SHAPES = [(2, 4, 5, 7), (3, 6, 16), (1, 2, 1), (2, 8, 2, 3, 3), (2, 6, 49), (1, 12, 11)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [0, 1, 2, "C"])
def test_style_modulation_matches_reference(library, layout, activation, groups):
    affines = itertools.cycle(("both", "none", "weight", "bias"))
    for index, shape in enumerate(SHAPES):
        for shared in (WHOLE, NONE):
            resident = check_style_modulation(
                library,
                shape,
                torch.float64 if index % 2 else torch.float32,
                groups=shape[1] if groups == "C" else groups,
                activation=activation,
                affine=next(affines),
                layout=layout,
                shared=shared,
                at_end=index % 3 != 0,
                reversed_order=index % 2 == 1,
                seed=index,
            )
            assert resident == (shared == WHOLE and layout == "contiguous" and groups != 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 3, 130, 67), 3), ((2, 40, 9, 9), 5), ((1, 136, 33), 17), ((2, 16, 600), 1)]
)
def test_style_modulation_in_every_dtype(library, dtype, layout, shape, groups):
    for shared, multiprocessors in ((WHOLE, 4), (NONE, 1), (NONE, 200)):
        check_style_modulation(
            library,
            shape,
            dtype,
            groups=groups,
            activation="silu",
            layout=layout,
            shared=shared,
            multiprocessors=multiprocessors,
        )
    check_style_modulation(library, shape, dtype, groups=0, activation="leaky_relu", layout=layout, shared=NONE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [WHOLE, NONE])
def test_style_modulation_of_offset_input_keeps_its_variance(library, layout, shared):
    x = torch.randn(2, 4, 31, 33, dtype=torch.float64).add(1000).float()
    ones = torch.ones(2, 4)
    (y, *_), _ = style_modulation(
        library, x, ones, 0 * ones, None, None, x, groups=2, activation="none", layout=layout, shared=shared
    )
    expected = reference.style_modulation(x.double(), ones.double(), 0 * ones.double(), groups=2)
    assert (y - expected).abs().max() < 1e-3


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shared", [WHOLE, NONE])
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_style_modulation_lets_nan_and_inf_through(library, layout, shared, groups, value):
    x = torch.randn(2, 4, 3, 5)
    x[1, 2, 1, 1] = value
    ones = torch.ones(2, 4)
    for activation in ACTIVATIONS:
        (y, *_), _ = style_modulation(
            library, x, ones, ones, None, None, x, groups=groups, activation=activation, layout=layout, shared=shared
        )
        expected = reference.style_modulation(x, ones, ones, groups=groups, activation=activation, negative_slope=0.2)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_no_kernel_is_left_out(library):
    launched(library)
    for shared in (WHOLE, NONE):
        check_style_modulation(library, (2, 4, 5, 7), groups=2, layout="contiguous", shared=shared)
    assert launched(library) == kernels_of(*FILES)


# Channels first and last, with and without normalisation: the tensor has more than 2^31 elements, the group or, without
# groups, what a block works through few.
@pytest.mark.parametrize(
    ("layout", "groups", "shape"),
    [
        ("contiguous", "C", (2, 2**20 + 8, 1024)),
        ("contiguous", 0, (2, 2**20 + 8, 1024)),
        ("channels_last", 0, (2, 2**20 + 8, 1024)),
    ],
)
def test_style_modulation_beyond_32_bits(library, layout, groups, shape):
    batch, channels, spatial = shape
    last, dtype = layout == "channels_last", torch.bfloat16
    groups = channels if groups == "C" else groups
    own = torch.randn(2, 8, spatial, dtype=torch.float64).to(dtype)  # x and dy of the last channels
    resident, long = ctypes.c_int(0), ctypes.c_int64
    with Arena(library, window=2) as memory:
        stored = (batch, spatial, channels) if last else shape
        x, dy, y, dx = (memory.empty(stored, dtype) for _ in range(4))

        def end(tensor):
            return tensor[-1, :, -8:].mT if last else tensor[-1, -8:]

        end(x).copy_(own[0])
        end(dy).copy_(own[1])
        scale, shift, dscale, dshift = (memory.empty((batch, channels), torch.float32) for _ in range(4))
        mean, rstd = (memory.empty((batch, groups), torch.float32) for _ in range(2))
        scale[-1, -8:], shift[-1, -8:] = torch.randn(2, 8)
        sizes = [long(value) for value in (*shape, groups)]
        rest = [int(last), 1e-5, ACTIVATIONS.index("silu"), 0.0, 4, long(WHOLE), ctypes.byref(resident)]
        for backward, first, out in ((0, None, y), (1, dy, dx)):
            arrays = (first, x, out, mean, rstd, scale, shift, None, None, dscale, dshift, None, None)
            call(library.style_modulation, backward, DTYPES[dtype], *arrays, *sizes, *rest)
        leaves = [t.double().requires_grad_() for t in (own[:1], scale[-1:, -8:], shift[-1:, -8:])]
        exact = reference.style_modulation(*leaves, groups=8 if groups else 0, activation="silu")
        gradients = torch.autograd.grad(exact, leaves, own[1:].double())
        # A block works on a single channel, or on several: the last one is always the last block's.
        assert_near(end(y)[-1], exact.detach()[0, -1], TOLERANCES[dtype], "y")
        assert_near(end(dx)[-1], gradients[0][0, -1], TOLERANCES[dtype], "dx")
        for name, ours, wanted in zip(("dscale", "dshift"), (dscale, dshift), gradients[1:], strict=True):
            assert_near(ours[-1, -1], wanted[0, -1], TOLERANCES[torch.float32], name)
