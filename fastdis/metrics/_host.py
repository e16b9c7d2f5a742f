"""Host numerics of the histogram and correlation metrics: compiled, or the same in NumPy where nothing was compiled.

Codes are float64 [d, n], each contiguous. Classes are int32 [K, n], numbered from 0; ``sizes``, int32 [K], says how
many there are of each factor, and over all factors they are S in number, those of the first factor first.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from fastdis.ops._backends import extension


def dense_classes(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Number the values of each factor [n, K] from 0 in rising order.

    Returns
    -------
    classes : ndarray of int32, [K, n]
        The number of each value.
    sizes : ndarray of int32, [K]
        How many different values each factor has.
    values : list of ndarray of int64
        What these values are, in rising order.
    """
    if extension is None:
        return dense_classes_numpy(factors)
    return extension.dense_classes(factors, torch.get_num_threads())


def dense_classes_numpy(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return what :func:`dense_classes` returns."""
    n, K = factors.shape
    classes = np.empty((K, n), np.int32)
    values = []
    for k, column in enumerate(factors.T):
        distinct, inverse = np.unique(column, return_inverse=True)
        values.append(distinct)
        classes[k] = inverse.reshape(n)
    return classes, np.array([len(distinct) for distinct in values], np.int32), values


def group_rows(classes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group rows by their class of each factor: uint32 [K, n] and int64 [S + K].

    The first holds all rows, sorted by the class of factor k and then by number; the second, of each factor one more
    than it has classes, where in them each class begins.
    """
    if extension is None:
        return group_rows_numpy(classes, sizes)
    return extension.group_rows(classes, sizes, torch.get_num_threads())


def group_rows_numpy(classes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what :func:`group_rows` returns."""
    rows = np.argsort(classes, axis=1, kind="stable").astype(np.uint32)
    counts = [np.bincount(column, minlength=size) for column, size in zip(classes, sizes.tolist(), strict=True)]
    return rows, np.concatenate([np.concatenate([[0], np.cumsum(count)]) for count in counts])


def discretize(codes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the bin of every code, int32 [d, n]: how many of the inner edges of its row are not above it.

    ``edges`` [d, bins + 1] rise. The first and the last bound nothing, so that every value has a bin.
    """
    if extension is None:
        return discretize_numpy(codes, edges)
    return extension.discretize(codes, edges, torch.get_num_threads())


def discretize_numpy(codes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return what :func:`discretize` returns."""
    bins = [np.searchsorted(inner, code, side="right") for inner, code in zip(edges[:, 1:-1], codes, strict=True)]
    return np.array(bins, np.int32)


def joint_histogram(rows: np.ndarray, limit: int, columns: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return how often each class of ``columns`` [K, n] meets each of ``rows`` [d, n], int64 [d, S, limit].

    ``rows`` hold classes too, ``limit`` of them in every row.
    """
    if extension is None:
        return joint_histogram_numpy(rows, limit, columns, sizes)
    return extension.joint_histogram(rows, limit, columns, sizes, torch.get_num_threads())


def joint_histogram_numpy(rows: np.ndarray, limit: int, columns: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return what :func:`joint_histogram` returns."""
    counts = np.empty((len(rows), int(sizes.sum()), limit), np.int64)
    for j, row in enumerate(rows):
        tables = [
            np.bincount(column * np.int64(limit) + row, minlength=size * limit)
            for column, size in zip(columns, sizes.tolist(), strict=True)
        ]
        counts[j] = np.concatenate(tables).reshape(-1, limit)
    return counts


def gaussian_histogram(
    mean: np.ndarray, std: np.ndarray, edges: np.ndarray, columns: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Return the expected joint histogram of Gaussian codes and ``columns``, float64 [d, S, bins].

    ``mean`` and ``std`` [d, n] say where each code lies; of the bins between ``edges`` [d, bins + 1] the first
    and the last take the tails.
    """
    if extension is None:
        return gaussian_histogram_numpy(mean, std, edges, columns, sizes)
    return extension.gaussian_histogram(mean, std, edges, columns, sizes, torch.get_num_threads())


def gaussian_histogram_numpy(
    mean: np.ndarray, std: np.ndarray, edges: np.ndarray, columns: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Return what :func:`gaussian_histogram` returns."""
    erf = np.frompyfunc(math.erf, 1, 1)
    mass = np.zeros((len(mean), int(sizes.sum()), edges.shape[1] - 1))
    for j, inner in enumerate(edges[:, 1:-1]):
        center, spread = mean[j, :, None], std[j, :, None]
        distance = np.where(inner > center, np.inf, -np.inf)
        np.divide(inner - center, spread, out=distance, where=(spread > 0) & np.isfinite(inner))
        below = 0.5 + 0.5 * np.asarray(erf(distance / math.sqrt(2)), np.float64)
        share = np.diff(below, axis=1, prepend=0.0, append=1.0)
        for column, offset in zip(columns, np.cumsum(sizes) - sizes, strict=True):
            np.add.at(mass[j], offset + column, share)
    return mass


def segment_spread(codes: np.ndarray, classes: np.ndarray, sizes: np.ndarray, quantile: float) -> np.ndarray:
    """Return the quantile of the distance of codes to their mean, within each class, float64 [d, S].

    The quantile lies on a straight line between order statistics, as NumPy's; it is 0 for a class that has no rows.
    """
    if extension is None:
        return segment_spread_numpy(codes, classes, sizes, quantile)
    return extension.segment_spread(codes, classes, sizes, quantile, torch.get_num_threads())


def segment_spread_numpy(codes: np.ndarray, classes: np.ndarray, sizes: np.ndarray, quantile: float) -> np.ndarray:
    """Return what :func:`segment_spread` returns."""
    spread = np.zeros((len(codes), int(sizes.sum())))
    rows, starts = group_rows_numpy(classes, sizes)
    first = 0
    for row, offset, size in zip(rows, np.cumsum(sizes) - sizes, sizes.tolist(), strict=True):
        inner = starts[first + 1 : first + size]
        first += size + 1
        for place, members in enumerate(np.split(row, inner), start=offset):
            if len(members):
                segment = codes[:, members] - codes[:, members[:1]]
                distance = np.abs(segment - segment.mean(axis=1, keepdims=True))
                spread[:, place] = np.quantile(distance, quantile, axis=1)
    return spread
