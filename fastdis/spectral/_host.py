"""Host numerics of neighbourhoods: compiled, or the same in NumPy where nothing was compiled.

Points are float32 or float64 [n, D], each row contiguous; neighbours are int64 [m, k], rows of points.
"""

from __future__ import annotations

import numpy as np
import torch

from fastdis.ops._backends import extension

SparseRows = tuple[np.ndarray, np.ndarray, np.ndarray]


def smallest(values: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the smallest of some rows of values, float32 [*, n], are, int64 [m, count], and what they are.

    Smallest first, of equal ones the first first. No value is NaN.
    """
    if extension is None:
        return smallest_numpy(values, rows, count)
    return extension.smallest(values, rows, count, torch.get_num_threads())


def smallest_numpy(values: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what :func:`smallest` returns."""
    columns = np.argsort(values[rows], axis=1, kind="stable")[:, :count]
    return columns, np.take_along_axis(values[rows], columns, axis=1)


def squared_distances(points: np.ndarray, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return abs(queries[q] - points[candidates[q, c]])**2, float64 [m, count], by differences."""
    if extension is None:
        return squared_distances_numpy(points, queries, candidates)
    return extension.squared_distances(points, queries, candidates, torch.get_num_threads())


def squared_distances_numpy(points: np.ndarray, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Return what :func:`squared_distances` returns."""
    rows = [
        np.square(points[row] - query).sum(axis=1, dtype=np.float64)
        for query, row in zip(queries, candidates, strict=True)
    ]
    return np.array(rows).reshape(candidates.shape)


def local_grams(points: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Return the products of all pairs of neighbours less their mean, float64 [m, k, k].

    Only differences between neighbours are computed with: an offset costs no digits.
    """
    if extension is None:
        return local_grams_numpy(points, neighbours)
    return extension.local_grams(points, neighbours, torch.get_num_threads())


def local_grams_numpy(points: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Return what :func:`local_grams` returns."""
    m, k = neighbours.shape
    grams = np.empty((m, k, k))
    for gram, row in zip(grams, neighbours, strict=True):
        apart = (points[row] - points[row[0]]).astype(np.float64)
        apart -= apart.mean(axis=0)
        gram[:] = apart @ apart.T
    return grams


def leading_vectors(grams: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvectors [m, k, d] of the d largest eigenvalues of grams, and the d + 1 largest [m, d + 1].

    Largest first; d < k.
    """
    if extension is None:
        return leading_vectors_numpy(grams, d)
    vectors, values, settled = extension.leading_vectors(grams, d, torch.get_num_threads())
    missing = np.flatnonzero(~settled)
    if len(missing):
        vectors[missing], values[missing] = leading_vectors_numpy(grams[missing], d)
    return vectors, values


def leading_vectors_numpy(grams: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what :func:`leading_vectors` returns."""
    values, vectors = np.linalg.eigh(grams)
    return np.ascontiguousarray(vectors[:, :, ::-1][:, :, :d]), np.ascontiguousarray(values[:, ::-1][:, : d + 1])


def hessian_bases(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return orthonormal bases [m, k, d (d + 1) / 2] of what products of tangent coordinates [m, k, d] add to them.

    They are orthogonal to constants and to the coordinates. The second result says, bool [m], where they were
    independent.
    """
    if extension is None:
        return hessian_bases_numpy(vectors)
    return extension.hessian_bases(vectors, torch.get_num_threads())


def hessian_bases_numpy(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what :func:`hessian_bases` returns."""
    m, k, d = vectors.shape
    first, second = np.triu_indices(d)
    products = vectors[:, :, first] * vectors[:, :, second]
    design = np.concatenate([np.ones((m, k, 1)), vectors, products], axis=2)
    q, r = np.linalg.qr(design)
    left = np.abs(np.diagonal(r, axis1=1, axis2=2)) / np.linalg.norm(design, axis=1)
    return np.ascontiguousarray(q[:, :, 1 + d :]), left.min(axis=1) > 1e-8


def alignment(neighbours: np.ndarray, bases: np.ndarray, n: int, *, complement: bool) -> SparseRows:
    """Return the sum over neighbourhoods of S^T P S [n, n], as starts, columns and values of sparse rows.

    S picks the neighbours; P is the projector onto ``bases`` [m, k, r], or what it leaves of the identity.
    """
    if extension is None:
        return alignment_numpy(neighbours, bases, n, complement=complement)
    return extension.alignment(neighbours, bases, n, complement, torch.get_num_threads())


def alignment_numpy(neighbours: np.ndarray, bases: np.ndarray, n: int, *, complement: bool) -> SparseRows:
    """Return what :func:`alignment` returns."""
    from scipy.sparse import coo_array

    m, k = neighbours.shape
    projectors = bases @ bases.transpose(0, 2, 1)
    if complement:
        projectors = np.eye(k) - projectors
    rows, columns = (np.broadcast_to(x, (m, k, k)).ravel() for x in (neighbours[:, :, None], neighbours[:, None, :]))
    matrix = coo_array((projectors.ravel(), (rows, columns)), shape=(n, n)).tocsr()
    matrix.sort_indices()
    return matrix.indptr, matrix.indices, matrix.data
