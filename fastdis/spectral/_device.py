"""Numerics of neighbourhoods on the device that points lie on: what ``_host`` computes, by torch.

Points are float32 or float64 [n, D]. Rows, candidates and neighbours may be arrays: these are few numbers, which the
host needs too. So are the neighbours and bases that an alignment matrix is made of: as its sum by atomic additions
would differ from run to run, it is made on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 2**28  # of neighbours gathered at a time
CHUNK = 2048  # dimensions whose sums stay in the points' own precision
MATRICES = 2**13  # that eigenvectors are sought of at a time
MOST_ROUNDS = 40  # of the iteration that finds them


@contextmanager
def full_precision() -> Iterator[None]:
    """Let products of float32 have its digits, whatever was allowed for the products of a network."""
    backends: Any = torch.backends
    products = backends.cuda.matmul, backends.mkldnn.matmul
    before = [product.fp32_precision for product in products]
    try:
        for product in products:
            product.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


def smallest(values: Tensor, rows: np.ndarray | Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return where the smallest of some rows of values, float32 [*, n], are, int64 [m, count], and what they are.

    Smallest first, of equal ones any. No value is NaN.
    """
    found = torch.topk(values[torch.as_tensor(rows, device=values.device)], count, largest=False)
    return found.indices, found.values


def squared_distances(points: Tensor, queries: Tensor, candidates: np.ndarray | Tensor) -> Tensor:
    """Return abs(queries[q] - points[candidates[q, c]])**2, float64 [m, count], by differences."""
    candidates = torch.as_tensor(candidates, device=points.device)
    at_once = max(1, BLOCK_BYTES // (candidates.shape[1] * points.shape[1] * points.element_size()))
    return torch.cat(
        [
            points[rows].sub_(near[:, None]).square_().sum(dim=2, dtype=torch.float64)
            for near, rows in zip(queries.split(at_once), candidates.split(at_once), strict=True)
        ]
    )


@full_precision()
def local_grams(points: Tensor, neighbours: np.ndarray | Tensor) -> Tensor:
    """Return the products of all pairs of neighbours less their mean, float64 [m, k, k].

    Differences to the first neighbour are taken first: an offset costs no digits.
    """
    neighbours = torch.as_tensor(neighbours, device=points.device)
    (m, k), D = neighbours.shape, points.shape[1]
    grams = points.new_zeros((m, k, k), dtype=torch.float64)
    at_once = max(1, BLOCK_BYTES // (k * min(D, CHUNK) * points.element_size()))
    for gram, rows in zip(grams.split(at_once), neighbours.split(at_once), strict=True):
        for first in range(0, D, CHUNK):
            near = points[:, first : first + CHUNK][rows]
            apart = near - near[:, :1]
            gram += apart @ apart.mT
    grams -= grams.mean(dim=1, keepdim=True)
    grams -= grams.mean(dim=2, keepdim=True)
    return 0.5 * (grams + grams.mT)


def leading_vectors(grams: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors [m, k, d] of the d largest eigenvalues of grams, and the d + 1 largest [m, d + 1].

    Largest first; d < k.
    """
    vectors, values = zip(*(_leading(some, d) for some in grams.split(MATRICES)), strict=True)
    return torch.cat(vectors), torch.cat(values)


def hessian_bases(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases [m, k, d (d + 1) / 2] of what products of tangent coordinates [m, k, d] add to them.

    They are orthogonal to constants and to the coordinates. The second result says, bool [m], where they were
    independent.
    """
    d = vectors.shape[2]
    first, second = torch.triu_indices(d, d, device=vectors.device)
    constants = torch.ones_like(vectors[:, :, :1])
    design = torch.cat([constants, vectors, vectors[:, :, first] * vectors[:, :, second]], dim=2).mT.contiguous()
    left = _orthonormalize(design)
    return design[:, 1 + d :].mT.contiguous(), left > 1e-8


def cholesky_solver(matrix: Any, shift: float, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that solves (matrix + shift) x = b on a device, by a dense factor of a sparse array [n, n].

    The right-hand sides, float64 [n, r], and what solves them are arrays: they are few.

    Raises
    ------
    torch.linalg.LinAlgError
        The shifted matrix is not definite.
    """
    entries = matrix.tocoo()
    rows, columns, values = (torch.as_tensor(x, device=device) for x in (entries.row, entries.col, entries.data))
    dense = torch.zeros(matrix.shape, dtype=torch.float64, device=device)
    dense[rows.long(), columns.long()] = values
    dense.diagonal().add_(shift)
    factor = torch.linalg.cholesky(dense)
    return lambda b: torch.cholesky_solve(torch.as_tensor(b, device=device), factor).cpu().numpy()


def _leading(grams: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Return what :func:`leading_vectors` returns.

    Subspace iteration with Rayleigh-Ritz steps, as on the host: the library's own solver takes matrices of more than
    32 rows one by one, but is given what does not converge.
    """
    m, k, _ = grams.shape
    vectors, values = grams.new_empty(m, k, d), grams.new_empty(m, d + 1)
    pending = torch.arange(m, device=grams.device)
    # Any start that is no eigenvector's complement does: fixed, so that results are.
    start = torch.rand(min(k, d + 4), k, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    found = start.to(grams.device).repeat(m, 1, 1)
    for _ in range(MOST_ROUNDS):
        for _ in range(3):
            found = found @ grams
            _orthonormalize(found)
        images = found @ grams
        small = found @ images.mT
        ritz, turn = torch.linalg.eigh(0.5 * (small + small.mT))
        ritz, turn = ritz.flip(1), turn.flip(2).mT
        found, images = turn @ found, turn @ images
        # A residual turns the wanted subspace by its length over the gap, so it is the gap that it is measured with.
        gap = ritz[:, d - 1] - ritz[:, d]
        worst = (images[:, :d] - ritz[:, :d, None] * found[:, :d]).norm(dim=2).amax(dim=1)
        settled = (worst <= torch.maximum(1e-11 * gap, 4e-15 * ritz[:, 0])) & (gap > 0)
        vectors[pending[settled]] = found[settled, :d].mT
        values[pending[settled]] = ritz[settled, : d + 1]
        pending, grams, found = pending[~settled], grams[~settled], found[~settled]
        if not len(pending):
            return vectors, values
    every, columns = torch.linalg.eigh(grams)
    vectors[pending] = columns.flip(2)[:, :, :d]
    values[pending] = every.flip(1)[:, : d + 1]
    return vectors, values


def _orthonormalize(rows: Tensor) -> Tensor:
    """Make rows [m, count, length] orthonormal in place; return the smallest share of a row's length left, [m].

    Row by row and twice: a Cholesky factor of their products would lose rows of less than 1e-8 of the others' length,
    and such are what a Gram matrix leaves of all but its leading vectors.
    """
    least = rows.new_ones(len(rows))
    for i in range(rows.shape[1]):
        row, units = rows[:, i : i + 1], rows[:, :i]
        before = row.norm(dim=2)
        for _ in range(2):
            row -= row @ units.mT @ units
        after = row.norm(dim=2)
        row /= torch.where(after > 0, after, 1.0)[:, :, None]
        least = torch.minimum(least, torch.where(before > 0, after / before, 0.0)[:, 0])
    return least
