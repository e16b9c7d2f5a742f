"""Penalties on the pull-back metric of a decoder in Triton.

Every kind is, per sample, the sum of squares of a deviation ``G - c I`` of the Gram matrix, and its gradient is a
multiple of such a deviation times J. J is read once forward, and read and written once backward; the rest is [K, K].
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdis.kernels import on_device
from fastdis.kernels.gram import gram, product
from fastdis.kernels.launch import block

ISOMETRY, SCALED_ISOMETRY, CONFORMAL, RELAXED_DISTORTION, ORTHOGONALITY = (tl.constexpr(code) for code in range(5))


def forward(jacobian: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Compute the penalty and the Gram matrices that backward needs.

    Parameters
    ----------
    jacobian : Tensor [B, K, D]
        Contiguous or a transposed contiguous [K, B, D]; anything else is copied.
    kind : int
        0 isometry, 1 scaled_isometry, 2 conformal, 3 relaxed_distortion, 4 orthogonality.

    Returns
    -------
    loss : Tensor []
        In the statistics dtype.
    gram : Tensor [B, K, K]
        In the statistics dtype.
    """
    metric = gram(jacobian)
    batch, latents, _ = metric.shape
    loss = metric.new_empty(())
    if metric.numel() == 0:
        # The mean over no samples, or of zeros; and 0 / 0.
        return loss.fill_(math.nan if batch == 0 or kind == RELAXED_DISTORTION.value else 0.0), metric
    moments = _moments(metric, kind)
    with on_device(metric):
        _loss_kernel[(1,)](*moments, loss, batch, latents, KIND=kind, BLOCK=block(batch, 1024, least=32))
    return loss, metric


def backward(grad: Tensor, jacobian: Tensor, gram: Tensor, kind: int) -> Tensor:
    """Gradient of :func:`forward` from grad [], J and its Gram matrices: [B, K, D] in J's dtype and layout.

    With t = tr G and q = ||G||^2 a sample, and means over the batch::

        4 grad / B (G - c I) J                      c = 1, mean t / K, t / K for kinds 0 to 2
        4 grad / (B mean(t)^2) (G - c I) J          c = mean q / mean t for relaxed_distortion
        4 grad / B offdiag(G) J                     for orthogonality
    """
    gram = gram.contiguous()
    batch, latents, _ = gram.shape
    weights = torch.empty_like(gram)
    if weights.numel() > 0:
        moments = _moments(gram, kind) if kind in (SCALED_ISOMETRY.value, RELAXED_DISTORTION.value) else (None, None)
        with on_device(gram):
            _weights_kernel[(batch,)](
                grad, gram, *moments, weights, batch, latents, latents * latents, KIND=kind,
                BLOCK=block(latents * latents, 1024, least=32), BLOCK_B=block(batch, 1024, least=32),
            )  # fmt: skip
    return product(weights, jacobian)


def _moments(gram: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Mean diagonal entry, and sum of squares of the deviation, of each Gram matrix: [B] each."""
    batch, latents, _ = gram.shape
    means, squares = gram.new_empty(batch), gram.new_empty(batch)
    with on_device(gram):
        _moments_kernel[(batch,)](
            gram, means, squares, latents, latents * latents, KIND=kind, BLOCK=block(latents * latents, 1024, least=32)
        )
    return means, squares


@triton.jit
def _mean_diagonal(gram, latents, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), gram.dtype.element_ty)
    for start in range(0, latents, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(gram + k.to(tl.int64) * (latents + 1), k < latents, other=0.0)
    return tl.sum(total, 0) / latents


@triton.jit
def _deviation(gram, index, latents, entries, center, KIND: tl.constexpr):
    """Entries [index] of a Gram matrix minus the center on the diagonal; zero outside it."""
    value = tl.load(gram + index, index < entries, other=0.0)
    diagonal = (index % (latents + 1) == 0) & (index < entries)
    if KIND == ORTHOGONALITY:
        value = tl.where(diagonal, 0.0, value)
    else:
        value -= tl.where(diagonal, center, 0.0)
    return value


@triton.jit
def _moments_kernel(gram, means, squares, latents, entries, KIND: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    gram += sample * entries
    mean = _mean_diagonal(gram, latents, BLOCK)
    center = mean
    if KIND == ISOMETRY:
        center = mean * 0.0 + 1.0
    elif KIND == RELAXED_DISTORTION:
        center = mean * 0.0
    total = tl.zeros((BLOCK,), gram.dtype.element_ty)
    for start in range(0, entries, BLOCK):
        off = _deviation(gram, start + tl.arange(0, BLOCK), latents, entries, center, KIND)
        total += off * off
    tl.store(means + sample, mean)
    tl.store(squares + sample, tl.sum(total, 0))


@triton.jit
def _mean_over_batch(values, batch, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), values.dtype.element_ty)
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)
        total += tl.load(values + b, b < batch, other=0.0)
    return tl.sum(total, 0) / batch


@triton.jit
def _loss_kernel(means, squares, loss, batch, latents, KIND: tl.constexpr, BLOCK: tl.constexpr):
    value = _mean_over_batch(squares, batch, BLOCK)
    if KIND == SCALED_ISOMETRY:
        # ||G - c I||^2 = ||G - (t / K) I||^2 + K (t / K - c)^2: nothing cancels.
        c = _mean_over_batch(means, batch, BLOCK)
        total = tl.zeros((BLOCK,), means.dtype.element_ty)
        for start in range(0, batch, BLOCK):
            b = start + tl.arange(0, BLOCK)
            off = tl.where(b < batch, tl.load(means + b, b < batch, other=0.0) - c, 0.0)
            total += off * off
        value += latents * (tl.sum(total, 0) / batch)
    elif KIND == RELAXED_DISTORTION:
        trace = latents * _mean_over_batch(means, batch, BLOCK)
        value /= trace * trace
    tl.store(loss, value)


@triton.jit
def _weights_kernel(
    grad,
    gram,
    means,
    squares,
    weights,
    batch,
    latents,
    entries,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Write the matrix that multiplies one sample's J."""
    sample = tl.program_id(0).to(tl.int64)
    gram += sample * entries
    scale = 4.0 * tl.load(grad) / batch
    center = scale * 0.0 + 1.0
    if KIND == SCALED_ISOMETRY:
        center = _mean_over_batch(means, batch, BLOCK_B)
    elif KIND == CONFORMAL:
        center = _mean_diagonal(gram, latents, BLOCK)
    elif KIND == RELAXED_DISTORTION:
        trace = latents * _mean_over_batch(means, batch, BLOCK_B)
        center = _mean_over_batch(squares, batch, BLOCK_B) / trace
        scale /= trace * trace
    for start in range(0, entries, BLOCK):
        index = start + tl.arange(0, BLOCK)
        value = scale * _deviation(gram, index, latents, entries, center, KIND)
        tl.store(weights + sample * entries + index, value, index < entries)
