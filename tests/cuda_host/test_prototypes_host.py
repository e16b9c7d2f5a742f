"""The kernels of prototype_distances and prototypical_loss on the CPU against the references in float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from harness import DTYPES, TOLERANCES, Arena, assert_near, call, kernels_of, launched, statistics_dtype

from fastdis import reference

SOURCE = "host_prototypes.cpp"
FILES = ("common.cuh", "prototype_distances.cu", "prototypes.cuh", "prototypical_loss.cu")
REDUCTIONS = ("none", "mean", "sum")

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


def test_no_kernel_is_left_out(library):
    launched(library)
    case = (1, 40, 6, 1600, 8)
    test_prototype_distances_match_reference(library, case, torch.float32)
    test_prototypical_loss_matches_reference(library, case, torch.float32)
    assert launched(library) == kernels_of(*FILES)


def test_beyond_32_bits(library):
    dtype = torch.bfloat16
    case = (2**19 + 1, 64, 4, 64, 4)
    own_q, own_p, own_labels = make_episodes((1, *case[1:]), dtype)
    with Arena(library, window=4) as memory:
        q, dq = (memory.empty((*case[:2], case[3]), dtype) for _ in range(2))
        p, dp = (memory.empty((case[0], case[2], case[3]), dtype) for _ in range(2))
        grad, distances = (memory.empty(case[:3], dtype) for _ in range(2))
        loss_grad, loss = (memory.empty(case[:2], dtype) for _ in range(2))
        labels, logsumexp = memory.empty(case[:2], torch.int64), memory.empty(case[:2], torch.float32)
        q[-1], p[-1], labels[-1] = own_q[0], own_p[0], own_labels[0]
        grad[-1], loss_grad[-1] = torch.randn(case[1:3]), torch.randn(case[1])
        leaves = [q[-1:].double().requires_grad_(), p[-1:].double().requires_grad_()]
        common = (*sizes(q, p), case[4])
        for backward in (0, 1):
            arrays = (q, p, grad, distances, dq, dp)
            call(library.prototype_distances, backward, DTYPES[dtype], *arrays, *common)
        exact = exact_gradients(reference.prototype_distances(*leaves), leaves, grad[-1:])
        for name, ours, wanted in zip(("distances", "dq", "dp"), (distances, dq, dp), exact, strict=True):
            assert_near(ours[-1:], wanted, TOLERANCES[dtype], name)
        for backward in (0, 1):
            arrays = (q, p, labels, loss_grad, loss, logsumexp, dq, dp, REDUCTIONS.index("none"))
            call(library.prototypical_loss, backward, DTYPES[dtype], *arrays, *common)
        output = reference.prototypical_loss(*leaves, own_labels, reduction="none")
        exact = exact_gradients(output, leaves, loss_grad[-1:])
        for name, ours, wanted in zip(("loss", "dq", "dp"), (loss, dq, dp), exact, strict=True):
            assert_near(ours[-1:], wanted, TOLERANCES[dtype], name)
