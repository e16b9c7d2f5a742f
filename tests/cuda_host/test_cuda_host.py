"""The CUDA kernels, compiled with the system compiler and run on the CPU, against the references in float64.

Arrays handed to the kernels are filled with NaN before, so that an element nobody writes shows; they start or end at
inaccessible pages, so that an access outside them fails the test that makes it.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastdis import reference

HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
TOLERANCES = {torch.float32: 4e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")
REDUCTIONS = ("none", "mean", "sum")
WHOLE = 1 << 20  # bytes of shared memory that hold every group of these tests
NONE = 0  # and that hold no group


def statistics_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the CUDA kernels for the host")
    folder = tmp_path_factory.mktemp("cuda_host")
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-fsanitize=bounds", "-U_FORTIFY_SOURCE"]
    includes = [f"-I{HERE}", f"-I{HERE.parents[1] / 'csrc' / 'cuda'}"]
    compile_command = [compiler, *flags, "-Wno-unknown-pragmas", *includes, "-c", str(HERE / "host_kernels.cpp")]
    subprocess.run([*compile_command, "-o", str(folder / "host.o")], check=True)
    # Linked without the sanitizer's runtime: its one handler is ours.
    subprocess.run([compiler, "-shared", "-o", str(folder / "host.so"), str(folder / "host.o")], check=True)
    loaded = ctypes.CDLL(str(folder / "host.so"))
    loaded.guarded_allocate.restype = ctypes.c_void_p
    loaded.guarded_data.restype = ctypes.c_void_p
    for name in ("style_modulation", "prototype_distances", "prototypical_loss"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


class Arena:
    """Guarded tensors that live as long as the ``with`` block, at whose end nothing around them may have changed."""

    def __init__(self, library, at_end=True, reversed_order=False):
        self.library, self.at_end, self.memory = library, at_end, []
        library.set_reversed(int(reversed_order))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.library.set_reversed(0)
        if error[0] is None:  # else the memory stays: the failure report prints the tensors
            clean = [self.library.guarded_free(ctypes.c_void_p(memory)) for memory in self.memory]
            assert all(clean), "a kernel wrote outside an array"

    def empty(self, size, dtype):
        """Return a tensor full of NaN (integers: -1)."""
        count = torch.Size(size).numel()
        length = count * dtype.itemsize
        memory = self.library.guarded_allocate(ctypes.c_size_t(length), int(self.at_end))
        self.memory.append(memory)
        if count == 0:
            return torch.empty(size, dtype=dtype)
        address = self.library.guarded_data(ctypes.c_void_p(memory))
        return torch.frombuffer((ctypes.c_char * length).from_address(address), dtype=dtype).view(size)

    def copy(self, tensor):
        return None if tensor is None else self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(function, *arguments):
    """Call a function of the library: tensors as pointers, floats as doubles, integers as they are."""
    converted = []
    for argument in arguments:
        if argument is None or isinstance(argument, torch.Tensor):
            converted.append(pointer(argument))
        elif isinstance(argument, float):
            converted.append(ctypes.c_double(argument))
        else:
            converted.append(argument)
    error = function(*converted)
    assert error is None, error.decode()


def assert_near(actual, expected, tolerance, what):
    assert actual.shape == expected.shape, what
    expected = expected.double()
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 1.0
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=tolerance,
        atol=tolerance * max(scale, 1.0),
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )


# ------------------------------------------------------------------------------------------- style_modulation


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


# ----------------------------------------------------------------------------------------------- prototypes

# Episodes, queries, prototypes, depth, multiprocessors: many of the latter make the plans cut columns and depth.
EPISODES = [
    (1, 1, 1, 1, 4),
    (2, 5, 3, 7, 200),
    (1, 33, 34, 65, 1),
    (3, 17, 1, 64, 4),
    (1, 40, 6, 1600, 8),
    (1, 300, 5, 12, 1),
    (1, 300, 5, 12, 16),
    (1, 7, 290, 9, 2),
    (1, 66, 130, 36, 2),
]


def make_episodes(case, dtype, seed=0, offset=0.0):
    episodes, queries, prototypes, depth, _ = case
    generator = torch.Generator().manual_seed(seed)
    spread = depth**-0.5
    q = torch.randn(episodes, queries, depth, generator=generator, dtype=torch.float64) * spread * 1.5 + offset
    p = torch.randn(episodes, prototypes, depth, generator=generator, dtype=torch.float64) * spread + offset
    labels = torch.randint(prototypes, (episodes, queries), generator=generator)
    return q.to(dtype), p.to(dtype), labels


def sizes(q, p):
    return [ctypes.c_int64(value) for value in (q.shape[0], q.shape[1], p.shape[1], q.shape[2])]


def prototype_distances(library, q, p, grad, multiprocessors, **arena):
    """Return the distances and the two gradients of the kernels."""
    with Arena(library, **arena) as memory:
        q_, p_, grad_ = memory.copy(q), memory.copy(p), memory.copy(grad)
        distances = memory.empty(grad.shape, q.dtype)
        dq, dp = memory.empty(q.shape, q.dtype), memory.empty(p.shape, q.dtype)
        for backward in (0, 1):
            arrays = (q_, p_, grad_, distances, dq, dp)
            call(library.prototype_distances, backward, DTYPES[q.dtype], *arrays, *sizes(q, p), multiprocessors)
        return distances.clone(), dq.clone(), dp.clone()


def prototypical_loss(library, q, p, labels, grad, reduction, multiprocessors, **arena):
    """Return the loss, the log-sum-exp and the two gradients of the kernels."""
    with Arena(library, **arena) as memory:
        q_, p_, labels_, grad_ = (memory.copy(t) for t in (q, p, labels, grad))
        loss = memory.empty(grad.shape, q.dtype)
        logsumexp = memory.empty(labels.shape, statistics_dtype(q.dtype))
        dq, dp = memory.empty(q.shape, q.dtype), memory.empty(p.shape, q.dtype)
        for backward in (0, 1):
            arrays = (q_, p_, labels_, grad_, loss, logsumexp, dq, dp, REDUCTIONS.index(reduction))
            call(library.prototypical_loss, backward, DTYPES[q.dtype], *arrays, *sizes(q, p), multiprocessors)
        return loss.clone(), logsumexp.clone(), dq.clone(), dp.clone()


def exact_gradients(output, leaves, grad):
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", EPISODES)
def test_prototype_distances_match_reference(library, case, dtype):
    q, p, _ = make_episodes(case, dtype)
    grad = torch.randn(case[:3], dtype=torch.float64).to(dtype)
    leaves = [q.double().requires_grad_(), p.double().requires_grad_()]
    expected = exact_gradients(reference.prototype_distances(*leaves), leaves, grad)
    for at_end in (True, False):
        actual = prototype_distances(library, q, p, grad, case[4], at_end=at_end, reversed_order=at_end)
        for name, ours, exact in zip(("distances", "dqueries", "dprototypes"), actual, expected, strict=True):
            assert_near(ours, exact, TOLERANCES[dtype], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", EPISODES)
def test_prototypical_loss_matches_reference(library, case, dtype):
    q, p, labels = make_episodes(case, dtype)
    leaves = [q.double().requires_grad_(), p.double().requires_grad_()]
    centred = [leaf.detach() - leaves[1].detach().mean(1, keepdim=True) for leaf in leaves]
    logits = 2 * centred[0] @ centred[1].mT - centred[1].square().sum(-1).unsqueeze(1)
    for reduction in REDUCTIONS:
        loss = reference.prototypical_loss(*leaves, labels, reduction=reduction)
        grad = torch.randn(loss.shape, dtype=torch.float64).to(dtype)
        expected = exact_gradients(loss, leaves, grad)
        expected.insert(1, logits.logsumexp(-1))
        even = reduction == "mean"
        actual = prototypical_loss(library, q, p, labels, grad, reduction, case[4], at_end=even, reversed_order=even)
        for name, ours, exact in zip(("loss", "logsumexp", "dqueries", "dprototypes"), actual, expected, strict=True):
            assert_near(ours, exact, TOLERANCES[dtype], name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [64, 37])
def test_prototypes_in_low_precision(library, dtype, depth):
    case = (2, 35, 9, depth, 8)
    q, p, labels = make_episodes(case, dtype)
    leaves = [q.double().requires_grad_(), p.double().requires_grad_()]
    grad = torch.randn(case[:3]).to(dtype)
    expected = exact_gradients(reference.prototype_distances(*leaves), leaves, grad)
    for ours, exact in zip(prototype_distances(library, q, p, grad, 8), expected, strict=True):
        assert_near(ours, exact, TOLERANCES[dtype], "prototype_distances")
    one = torch.ones((), dtype=dtype)
    expected = exact_gradients(reference.prototypical_loss(*leaves, labels), leaves, one)
    loss, _, dq, dp = prototypical_loss(library, q, p, labels, one, "mean", 8)
    for ours, exact in zip((loss, dq, dp), expected, strict=True):
        assert_near(ours, exact, TOLERANCES[dtype], "prototypical_loss")


def test_a_common_offset_keeps_small_distances(library):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1, 12, 64, generator=generator) * 5e-3 + 50
    q = p[:, :5] + torch.randn(1, 5, 64, generator=generator) * 5e-3
    exact = reference.prototype_distances(q.double(), p.double())
    distances, _, _ = prototype_distances(library, q, p, torch.ones(exact.shape), 4)
    assert exact.max() < 1e-2
    assert (distances - exact).abs().max() < 1e-4 * exact.max()


def test_distances_are_never_negative_and_carry_nan_and_inf_as_the_reference(library):
    q, p, _ = make_episodes((1, 35, 20, 10, 4), torch.float32)
    q[0, :20] = p[0]
    q[0, 30, 3], q[0, 31, 4], p[0, 7, 2], p[0, 9, 1] = float("nan"), float("inf"), float("nan"), float("-inf")
    expected = reference.prototype_distances(q, p)
    distances, _, _ = prototype_distances(library, q, p, torch.ones(expected.shape), 4)
    torch.testing.assert_close(distances, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert not (distances < 0).any()


def test_an_infinitely_far_prototype_has_no_weight(library):
    q, p, labels = make_episodes((1, 6, 40, 10, 4), torch.float32)
    p[0, 35, 2] = float("inf")
    labels[labels == 35] = 0
    expected = reference.prototypical_loss(q.double(), p.double(), labels, reduction="none")
    loss, _, dq, _ = prototypical_loss(library, q, p, labels, torch.ones(labels.shape), "none", 4)
    assert_near(loss, expected, 1e-5, "loss")
    assert dq[..., :2].isfinite().all()
    assert dq[..., 3:].isfinite().all()


@pytest.mark.parametrize("bad", [-1, 3, 1 << 40])
def test_a_label_out_of_range_gives_nan_for_its_query_only(library, bad):
    q, p, labels = make_episodes((1, 5, 3, 8, 4), torch.float64)
    expected = reference.prototypical_loss(q, p, labels, reduction="none")
    labels[0, 2] = bad
    grad = torch.ones(labels.shape, dtype=torch.float64)
    loss, logsumexp, dq, _ = prototypical_loss(library, q, p, labels, grad, "none", 4)
    others = [0, 1, 3, 4]
    assert loss[0, 2].isnan()
    assert dq[0, 2].isnan().all()
    assert logsumexp.isfinite().all()
    assert_near(loss[0, others], expected[0, others], 1e-11, "loss")
    assert dq[0, others].isfinite().all()
    total, _, _, _ = prototypical_loss(library, q, p, labels, grad[0, 0], "mean", 4)
    assert total.isnan()


# --------------------------------------------------------------------------------------------- the emulation


def test_an_access_outside_an_array_is_reported(library):
    q, p, _ = make_episodes((1, 5, 3, 8, 4), torch.float32)
    with Arena(library) as memory:
        q_, p_, grad = memory.copy(q), memory.copy(p), memory.empty((1, 5, 3), torch.float32)
        too_many = [ctypes.c_int64(value) for value in (1, 6, 3, 8)]
        with pytest.raises(AssertionError, match="access outside an array"):
            call(library.prototype_distances, 0, 0, q_, p_, grad, grad, None, None, *too_many, 4)
