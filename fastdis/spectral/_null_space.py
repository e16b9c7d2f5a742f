"""The smooth functions on a neighbourhood graph: eigenvectors of the smallest eigenvalues, but for constants."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from fastdis.spectral._device import cholesky_solver

Solve = Callable[[np.ndarray], np.ndarray]

DEVICE_POINTS = 20000  # up to which a dense factor fits on a device
DENSE_POINTS = 4000  # up to which a dense factor costs less than a sparse one
SHIFTS = (1e-14, 1e-12, 1e-10)  # of the diagonal's mean: makes a singular matrix definite; the least that does it
TOLERANCE = 1e-9  # of the subspace wanted, an angle
GAP_TOLERANCE = 0.1  # of the next eigenvalue, which only shows how wide the gap is
MOST_ROUNDS = 200


def null_space(matrix: Any, d: int, device: torch.device | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return d eigenvectors and d + 1 eigenvalues of a positive semidefinite matrix with constant rows in its kernel.

    Parameters
    ----------
    matrix : sparse array of float64, [n, n]
        Symmetric.
    d : int
        Smaller than n - 1.
    device : torch.device, optional
        Where the matrix is factored if its factor fits; by default on the host.

    Returns
    -------
    vectors : ndarray of float64, [n, d]
        Orthonormal, and orthogonal to constants; smallest eigenvalue first, of either sign: the entry of each that is
        largest in size is positive.
    values : ndarray of float64, [d + 1]
        In rising order; the last, which is not wanted, is bounded from above only.

    Warns
    -----
    ConvergenceWarning
        The eigenvalues wanted are not told from the next ones.

    Notes
    -----
    Inverse iteration on a few vectors more than are wanted, on one factorisation. The vectors stay on the host.
    """
    n = matrix.shape[0]
    solve = _solver(matrix, device)
    width = min(n - 1, d + max(4, d // 2))
    vectors = _orthonormal(np.random.default_rng(0).standard_normal((n, width)))
    wanted = vectors[:, :d]
    values = np.zeros(width)
    gap = min(d, width - 1)
    for _ in range(MOST_ROUNDS):
        images = solve(vectors)
        before = values[gap]
        # Where the inverse stretches most comes first; these are the inverse's eigenvalues, of vectors without means.
        stretch, turn = np.linalg.eigh(vectors.T @ images)
        values = 1 / stretch[::-1]
        vectors = _orthonormal(images @ turn[:, ::-1])
        # The sine of the largest angle between the last subspace and this.
        change = np.linalg.norm(wanted - vectors[:, :d] @ (vectors[:, :d].T @ wanted), 2)
        wanted = vectors[:, :d]
        if change < TOLERANCE and abs(values[gap] - before) <= GAP_TOLERANCE * values[gap]:
            break
    else:
        warnings.warn(
            f"the null space was still turning by {change:.1e} after {MOST_ROUNDS} rounds: eigenvalues {d} and "
            f"{d + 1}, {values[d - 1]:.2e} and {values[gap]:.2e}, are too near; n_components may be wrong",
            ConvergenceWarning,
            stacklevel=4,
        )
    values, turn = np.linalg.eigh(vectors.T @ (matrix @ vectors))  # without what made the matrix definite
    wanted = vectors @ turn[:, :d]
    largest = np.abs(wanted).argmax(axis=0)
    signs = np.where(wanted[largest, np.arange(d)] < 0, -1.0, 1.0)
    return wanted * signs, np.append(values, np.inf)[: d + 1]


def _orthonormal(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.qr(vectors - vectors.mean(axis=0))[0]


def _solver(matrix: Any, device: torch.device | None) -> Solve:
    """Return a function that solves (matrix + shift) x = b."""
    from scipy import sparse
    from scipy.sparse.linalg import splu

    n = matrix.shape[0]
    shifts = [shift * matrix.diagonal().mean() for shift in SHIFTS]
    if device is not None and n <= DEVICE_POINTS:
        with suppress(torch.OutOfMemoryError):  # the host has more
            return _by_least_shift(lambda shift: cholesky_solver(matrix, shift, device), shifts)
    if n <= DENSE_POINTS or matrix.nnz > 0.05 * n**2:
        return _by_least_shift(lambda shift: _dense_solver(matrix, shift), shifts)
    # The matrix is symmetric and definite: what is best for sparsity is stable.
    shifted = (matrix + shifts[1] * sparse.eye_array(n, format="csr")).tocsc()
    return splu(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}).solve


def _by_least_shift(solver: Callable[[float], Solve], shifts: Sequence[float]) -> Solve:
    """Return the solver of the first shift, of rising ones, that makes the matrix definite."""
    for shift in shifts[:-1]:
        with suppress(np.linalg.LinAlgError, torch.linalg.LinAlgError):
            return solver(shift)
    return solver(shifts[-1])


def _dense_solver(matrix: Any, shift: float) -> Solve:
    from scipy import linalg

    shifted = matrix.toarray()
    shifted.flat[:: len(shifted) + 1] += shift
    # Transposed it is the same, in the order that is factored in place.
    factor = linalg.cho_factor(shifted.T, lower=True, overwrite_a=True, check_finite=False)
    return lambda b: linalg.cho_solve(factor, b, check_finite=False)
