"""Flatness of factor traversals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._host import dense_classes
from fastdis.metrics._inputs import as_codes, as_count, as_factors, as_generator
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class FlatnessResult(Result):
    """What :func:`flatness` found.

    Attributes
    ----------
    score : float
        Mean of ``flatness``, in [0, 1].
    flatness : ndarray of float64, [K']
        For each factor that varies, ``widths / lengths``; 0 where no traversal moves any code.
    widths : ndarray of float64, [K']
        Mean over traversals of the largest Euclidean distance between two points, in units of the codes.
    lengths : ndarray of float64, [K']
        Mean over traversals of the length of the path, in the same units.
    factors : ndarray of int64, [K']
        Which columns of ``factors`` these are.
    """

    flatness: np.ndarray
    widths: np.ndarray
    lengths: np.ndarray
    factors: np.ndarray


def flatness(
    codes: np.ndarray | Tensor, factors: np.ndarray | Tensor, *, repeats: int | None = 1024, seed: int = 0
) -> FlatnessResult:
    r"""Measure how straight, and how well aligned with an axis, codes move as one factor runs through its values.

    A traversal of factor k fixes all other factors and takes the codes :math:`z_1, \dots, z_C` of its C values. With
    steps :math:`s_i = \|z_{i+1} - z_i\|_1`, the last back to the first,

    .. math::
        w = \max_{i,j} \|z_i - z_j\|_2, \qquad l = (C - 1)\,\frac{1}{C-1} \sum_{i \ne i^*} s_i, \qquad
        \mathrm{flatness} = \frac1K \sum_k \frac{\overline{w}_k}{\overline{l}_k}

    with :math:`i^*` the largest step, which is left out, so that a factor that is cyclic may be cut anywhere, and bars
    for means over traversals [1]_.

    Parameters
    ----------
    codes : real, [n, d]
        Of all images of a complete grid of factors, in the order of ``factors``.
    factors : integer, [n, K]
        Every combination of values exactly once, in any order of rows. Values are traversed in rising order. A factor
        with one value is left out.
    repeats : int or None, optional
        How many traversals of each factor to draw, with replacement; None takes all there are.
    seed : int, optional
        From 0 to 2**63 - 1.

    Returns
    -------
    FlatnessResult
        The score and what it was computed from.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors, ``repeats`` or ``seed`` not integers.
    ValueError
        Shapes do not fit, a code is NaN or infinite, the rows are not a complete grid, no factor varies, or a number
        is out of range.

    Notes
    -----
    A code that holds each factor in a number of its own, rising with it, scores 1: width and length are then equal.
    Steps are measured in L1, so that a straight line scores 1 only along an axis; in d dimensions a diagonal scores
    :math:`1/\sqrt d`. A factor of two values always has a straight traversal.

    This is what the disent library computes; its ratio too is that of the means, not the mean of ratios. No paper that
    we know defines it under this name, and the scores of different libraries are not comparable.

    Cost is O(repeats C (C + log C) d) for each factor.

    References
    ----------
    .. [1] N. Michlo. Disent: a modular disentangled representation learning framework for PyTorch. 2021.
    """
    codes = as_codes(codes)
    factors = as_factors(factors, len(codes), varying=False)
    count = None if repeats is None else as_count(repeats, "repeats")
    generator = as_generator(seed)
    varying = np.flatnonzero((factors != factors[:1]).any(axis=0))
    if len(varying) == 0:
        raise ValueError("factors must have a column that varies, got a single combination of values")
    order, sizes = _grid(factors[:, varying])

    # In units of a power of two near the largest code, so that no square leaves the range of float64.
    exponent = int(np.frexp(np.abs(codes).max())[1])
    points = np.ldexp(codes, -exponent)[order]
    widths, lengths = np.empty(len(varying)), np.empty(len(varying))
    stride = len(points)
    for k, size in enumerate(sizes):
        stride //= size
        total = len(points) // size
        chosen = np.arange(total) if count is None else generator.integers(total, size=count)
        first = chosen // stride * stride * size + chosen % stride
        rows = first[:, None] + stride * np.arange(size)
        measured = [_measure(points[some]) for some in np.array_split(rows, -(-len(rows) // _AT_ONCE))]
        widths[k], lengths[k] = np.concatenate(measured, axis=1).mean(axis=1)
    ratios = np.divide(widths, lengths, out=np.zeros(len(varying)), where=lengths > 0)
    return FlatnessResult(
        float(ratios.mean()), ratios, np.ldexp(widths, exponent), np.ldexp(lengths, exponent), varying
    )


# Traversals measured together: few enough for the cache, many enough for NumPy.
_AT_ONCE = 256


def _grid(factors: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return the rows in the order of the grid, the last factor fastest, and its sizes; refuse what is not a grid."""
    classes, counts, _ = dense_classes(factors)
    sizes = counts.tolist()
    n, points = len(factors), 1
    for size in sizes:
        points *= size
    if points != n:
        raise ValueError(
            f"factors must be a complete grid: their {' x '.join(map(str, sizes))} values make {points} combinations, "
            f"but there are {n} rows"
        )
    place = np.ravel_multi_index(tuple(classes), sizes)
    if np.bincount(place).max() > 1:
        raise ValueError("factors must be a complete grid: some combinations occur twice, and others never")
    order = np.empty(n, np.int64)
    order[place] = np.arange(n)
    return order, sizes


def _measure(traversals: np.ndarray) -> np.ndarray:
    """Return the widths and the lengths of traversals [m, C, d], [2, m]."""
    C = traversals.shape[1]
    squared = np.zeros(len(traversals))
    for apart in range(1, C):
        differences = traversals[:, apart:] - traversals[:, :-apart]
        np.maximum(squared, np.einsum("mcd,mcd->mc", differences, differences).max(axis=1), out=squared)
    steps = np.abs(np.roll(traversals, -1, axis=1) - traversals).sum(axis=2)
    # Less the largest, rather than a sum minus the largest, which would leave rounding where nothing moves.
    return np.stack([np.sqrt(squared), np.sort(steps, axis=1)[:, :-1].sum(axis=1)])
