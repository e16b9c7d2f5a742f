"""What else than the suites is run by Triton's interpreter, in the process that test_triton_interpreter.py starts.

Every tile that tuning may try gives right results; and where tensors have more than 2^31 elements, the first and the
last programs of every launch read and write where they should: the others are left out, and the tensors are zeros that
take no memory before they are written.
"""

from __future__ import annotations

import mmap
import os

import pytest
import torch
from column_suite import assert_as_good, outputs_and_gradients, suite_of
from triton.runtime import interpreter

from fastdis import reference
from fastdis.kernels import (
    ddim_step,
    disdiff_terms,
    gaussian_kl,
    jacobian_gram,
    launch,
    prototype_distances,
    prototypical_loss,
    reparameterize,
    style_modulation,
    sum_gradient_fields,
    tangent_activation,
    total_correlation,
)
from fastdis.ops import _backends


# The interpreter knows no warps: only the blocks differ.
@pytest.mark.parametrize("shift", [(1, 0), (-1, 0)], ids=["twice", "half"])
@pytest.mark.parametrize("name", list(_backends.columns()))
def test_every_tile_is_right(name, shift, monkeypatch):
    assert shift in launch._NEIGHBOURS
    tried = []

    def only_one(tiling, neighbours=launch.neighbours):
        tiles = dict(neighbours(tiling))
        tried.append(shift in tiles)
        return [(shift, tiles.get(shift, tiling.tile))]

    monkeypatch.setattr(launch, "tuning", True)
    monkeypatch.setattr(launch, "_fastest", {})
    monkeypatch.setattr(launch, "neighbours", only_one)
    monkeypatch.setattr(launch, "milliseconds", lambda *_: 0.0)
    suite = suite_of(name)
    samples = [s for s in suite.samples() if s.interpreted and not s.empty]
    # One of small tensors, whose tiles stick out, and the large ones, whose tiles have neighbours.
    for sample in samples[:1] + [s for s in samples[1:] if s.slow_in_interpreter]:
        tensors, exact = sample.to(torch.float32, "cpu"), sample.to(torch.float64, "cpu")
        actual = outputs_and_gradients(suite.call(sample, "triton"), tensors, {})
        wanted = outputs_and_gradients(type(suite).reference, exact, sample.options)
        peer = outputs_and_gradients(type(suite).reference, tensors, sample.options)
        assert_as_good(actual, wanted, peer, torch.float32, suite.roundings)
    assert tried, "nothing is launched through fastdis.kernels.launch"


# ---------------------------------------------------------------------------------------------------------------------
# Offsets of more than 32 bits

DTYPE = torch.float16
TOLERANCE = {"rtol": 2e-3, "atol": 2e-3}
roomy = pytest.mark.skipif(
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 16 << 30, reason="needs address space for large tensors"
)


def zeros(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Zeros that take no memory before they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), exact.double(), **TOLERANCE)


@pytest.fixture
def ends_only(monkeypatch):
    """Run the first and the last programs of each launch only; tensors stay where they are."""

    def ends(*limits):
        if len(limits) > 1 or limits[0] < 1000:
            return range(*limits)
        return [*range(4), *range(limits[0] - 4, limits[0])]

    monkeypatch.setattr(interpreter, "range", ends, raising=False)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    torch.manual_seed(0)


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BATCH, FACTORS, LENGTH = 3, 2, 2**30 + 8
TAIL = 8 + 1024  # elements of the last two tiles


def fields_case():
    """Return x and noise [B, M] and fields [B, N, M], zero before the tail of the last sample."""
    rows = zeros(BATCH, LENGTH), zeros(BATCH, LENGTH), zeros(BATCH, FACTORS, LENGTH)
    for t in rows:
        t[-1, ..., -TAIL:] = draw(*t.shape[1:-1], TAIL)
    return rows, tuple(t[-1:, ..., -TAIL:].double().requires_grad_() for t in rows)


def end(tensor):
    return tensor[-1:, ..., -TAIL:]


@roomy
def test_sum_gradient_fields_beyond_32_bits(ends_only):
    (noise, _, fields), (noise_, _, fields_) = fields_case()
    coefficient, weights = draw(BATCH, dtype=torch.float32), draw(BATCH, FACTORS, dtype=torch.float32)
    exact = reference.sum_gradient_fields(noise_, fields_, coefficient[-1:].double(), weights=weights[-1:].double())
    close(end(sum_gradient_fields.forward(noise, fields, coefficient, weights)), exact)
    dfields, _ = sum_gradient_fields.backward(noise, fields, coefficient, weights, True)
    # The last programs work on the last factor.
    close(end(dfields)[:, -1], torch.autograd.grad(exact, fields_, noise_.detach())[0][:, -1])


@roomy
def test_ddim_step_beyond_32_bits(ends_only):
    (x, noise, fields), leaves = fields_case()
    schedule = [torch.rand(BATCH) * 0.3 + low for low in (0.2, 0.4, 0.1)]
    last = [t[-1:].double() for t in schedule]
    exact = reference.ddim_step(*leaves, *last[:2], sigma=last[2], eta_noise=torch.zeros_like(leaves[0]))
    for ours, wanted in zip(ddim_step.forward(x, noise, fields, *schedule, None, None), exact, strict=True):
        close(end(ours), wanted)
    dx, dnoise, *_ = ddim_step.backward(x, noise, *schedule, True, True, False, False)
    grads = torch.autograd.grad(exact, leaves[:2], [leaf.detach() for leaf in leaves[:2]])
    close(end(dx), grads[0])
    close(end(dnoise), grads[1])


@roomy
def test_disdiff_terms_beyond_32_bits(ends_only):
    (x, noise, fields), leaves = fields_case()
    schedule, selected = [torch.rand(BATCH) * 0.3 + low for low in (0.2, 0.4)], torch.ones(BATCH, dtype=torch.int64)
    exact = reference.disdiff_terms(*leaves, selected[-1:], *(t[-1:].double() for t in schedule))
    ours = disdiff_terms.forward(x, noise, fields, selected, *schedule)
    for result, wanted in zip(ours[:3], exact[:3], strict=True):
        close(end(result), wanted)
    *_, dfields = disdiff_terms.backward(x, None, noise, selected, *schedule, FACTORS, False, False, True)
    (wanted,) = torch.autograd.grad([exact[0], exact[2]], leaves[2], [leaf.detach() for leaf in leaves[:2]])
    close(end(dfields), wanted)


@roomy
@pytest.mark.parametrize(("groups", "channels_last"), [("C", False), (0, False), (0, True)])
def test_style_modulation_beyond_32_bits(ends_only, groups, channels_last):
    batch, channels, size = 2, 2**20 + 8, 1024
    groups = channels if groups == "C" else groups
    stored = [zeros(batch, size, channels) if channels_last else zeros(batch, channels, size) for _ in range(2)]
    x, dy = (t.transpose(1, 2) if channels_last else t for t in stored)
    x[-1, -1], dy[-1, -1] = draw(size), draw(size)
    scale, shift = (zeros(batch, channels, dtype=torch.float32) for _ in range(2))
    scale[-1, -1], shift[-1, -1] = 1.5, -0.3
    y, mean, rstd = style_modulation.forward(x, scale, shift, None, None, groups, 1e-5, style_modulation.SILU.value, 0)
    leaves = [t[-1:, -1:].double().requires_grad_() for t in (x, scale, shift)]
    exact = reference.style_modulation(*leaves, groups=1 if groups else 0, activation="silu")
    # The last programs of a channels-last tensor work on the last pixels.
    last = slice(-8, None) if channels_last else slice(None)
    close(y[-1, -1, last], exact[0, 0, last])
    act = style_modulation.SILU.value
    dx, *_ = style_modulation.backward(dy, x, mean, rstd, scale, shift, None, None, groups, act, 0)
    (wanted,) = torch.autograd.grad(exact, leaves[0], dy[-1:, -1:].double())
    close(dx[-1, -1, last], wanted[0, 0, last])


@roomy
def test_tangent_activation_beyond_32_bits(ends_only):
    rows, grad = zeros(3, 1, 2**30 + 8), zeros(3, 1, 2**30 + 8)
    rows[..., -TAIL:], grad[..., -TAIL:] = draw(3, 1, TAIL), draw(3, 1, TAIL)
    leaf = rows[..., -TAIL:].double().requires_grad_()
    exact = reference.tangent_activation(leaf, None, None, activation="silu")
    silu = tangent_activation.SILU.value
    close(tangent_activation.forward(rows, None, None, silu, 0.0)[..., -TAIL:], exact)
    drows, *_ = tangent_activation.backward(grad[0], grad[1:], rows, None, None, silu, 0.0)
    close(drows[..., -TAIL:], torch.autograd.grad(exact, leaf, grad[..., -TAIL:].double())[0])


@roomy
@pytest.mark.parametrize("latents", [3, 20])
def test_jacobian_gram_beyond_32_bits(ends_only, latents):
    jacobian = zeros(2**21 // latents + 8, latents, 1024)
    jacobian[-1] = draw(latents, 1024) / 32
    own = jacobian[-1].double()
    close(jacobian_gram.forward(jacobian)[-1], own @ own.mT)
    grad = zeros(len(jacobian), latents, latents, dtype=torch.float32)
    grad[-1] = torch.randn(latents, latents)
    out = jacobian_gram.product(grad, jacobian)
    close(out[-1, :, -64:], (grad[-1].double() @ own)[:, -64:])


@roomy
def test_prototypes_beyond_32_bits(ends_only):
    episodes, count, dims = 2**19 + 1, 64, 64
    q, p, labels = zeros(episodes, count, dims), zeros(episodes, 4, dims), zeros(episodes, count, dtype=torch.int64)
    q[-1], p[-1] = draw(count, dims) / 8, draw(4, dims) / 8
    leaves = [t[-1:].double().requires_grad_() for t in (q, p)]
    exact = reference.prototype_distances(*leaves)
    distances = prototype_distances.forward(q, p)
    close(distances[-1:], exact)
    grads = torch.autograd.grad(exact, leaves, distances[-1:].double())
    for ours, wanted in zip(prototype_distances.backward(distances, q, p), grads, strict=True):
        close(ours[-1:] / 16, wanted / 16)
    loss, logsumexp = prototypical_loss.forward(q, p, labels, prototypical_loss.NONE)
    exact = reference.prototypical_loss(*leaves, labels[-1:], reduction="none")
    close(loss[-1:], exact)
    grads = torch.autograd.grad(exact, leaves, loss[-1:].double())
    ours = prototypical_loss.backward(loss, q, p, labels, logsumexp, prototypical_loss.NONE)
    for result, wanted in zip(ours, grads, strict=True):
        close(result[-1:] / 16, wanted / 16)


@roomy
def test_gaussians_beyond_32_bits(ends_only):
    mean, logvar = zeros(2**27 + 8, 16), zeros(2**27 + 8, 16)
    mean[-8:], logvar[-8:] = draw(8, 16), draw(8, 16)
    leaves = [t[-8:].double().requires_grad_() for t in (mean, logvar)]
    exact = reference.gaussian_kl(*leaves, reduction="none")
    loss = gaussian_kl.forward(mean, logvar, None, gaussian_kl.NONE)
    torch.testing.assert_close(loss[-8:].double(), exact.detach(), rtol=2e-3, atol=2e-3)
    dmean, dlogvar, _ = gaussian_kl.backward(loss, mean, logvar, None, gaussian_kl.NONE)
    grads = torch.autograd.grad(exact, leaves, loss[-8:].double())
    for ours, wanted in zip((dmean, dlogvar), grads, strict=True):
        torch.testing.assert_close(ours[-8:].double(), wanted, rtol=4e-3, atol=4e-3)
    seed = zeros(2**18 + 1, dtype=torch.int64)
    seed[-1] = 1 << 50
    mean, logvar = (t.view(-1)[: len(seed) << 13].view(len(seed), -1) for t in (zeros(len(seed) << 13) for _ in "ab"))
    mean[-1], logvar[-1] = draw(2**13), draw(2**13)
    out, _ = reparameterize.forward(mean, logvar, seed, False)
    exact = reference.reparameterize(mean[-1].double(), logvar[-1].double(), seed[-1:])
    torch.testing.assert_close(out[-1, -512:].double(), exact[-512:], rtol=2e-3, atol=4e-3)


@roomy
def test_total_correlation_planes_beyond_32_bits(ends_only):
    """The four planes that the kernels read have more than 2^31 elements together."""
    shape = (2**20 + 1, 64, 8)
    inputs = [zeros(*shape) for _ in range(3)]
    for t in inputs:
        t[-1] = draw(*shape[1:])
    leaves = [t[-1:].double().requires_grad_() for t in inputs]
    *_, log_joint, log_marginals = total_correlation.forward(*inputs, 1000, 0)
    pairs = (leaves[0].unsqueeze(2) - leaves[1].unsqueeze(1)).square() / leaves[2].exp().unsqueeze(1)
    pairs = -0.5 * (pairs + leaves[2].unsqueeze(1) + torch.tensor(2 * torch.pi).log())
    base = torch.tensor(64_000.0, dtype=torch.float64).log()
    torch.testing.assert_close(log_joint[-1:].double(), torch.logsumexp(pairs.sum(-1), 2) - base, rtol=1e-4, atol=1e-4)
    exact = torch.logsumexp(pairs, 2) - base
    torch.testing.assert_close(log_marginals[-1, :, -1].double(), exact[0, :, -1], rtol=1e-4, atol=1e-4)
