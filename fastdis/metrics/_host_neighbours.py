"""Mutual information from nearest neighbours: compiled, or the same in NumPy where nothing was compiled."""

from __future__ import annotations

import numpy as np
import torch

from fastdis.ops._backends import extension


def neighbour_information(codes: np.ndarray, classes: np.ndarray, neighbours: int) -> np.ndarray:
    r"""Estimate the mutual information of continuous codes and discrete factors, in nats.

    .. math:: \psi(n) + \frac1n \sum_i \psi(k_i) - \psi(n_i) - \psi(m_i)

    with :math:`n_i` the rows of point i's class, :math:`k_i = \min(k, n_i - 1)`, and :math:`m_i` the points of all
    classes closer to i than the :math:`k_i`-th neighbour in its class, itself among them. Points alone in their class
    are left out [1]_.

    Parameters
    ----------
    codes : ndarray of float64, [d, n]
        Without ties, for which the estimate is not made.
    classes : ndarray of int32, [K, n]
        Numbered from 0.
    neighbours : int
        k.

    Returns
    -------
    ndarray of float64, [d, K]
        Never negative.

    References
    ----------
    .. [1] B. C. Ross. Mutual Information between Discrete and Continuous Data Sets. PLoS ONE 2014.
    """
    if extension is None:
        return neighbour_information_numpy(codes, classes, neighbours)
    return extension.neighbour_information(codes, classes, neighbours, torch.get_num_threads())


def neighbour_information_numpy(codes: np.ndarray, classes: np.ndarray, neighbours: int) -> np.ndarray:
    """Return what :func:`neighbour_information` returns."""
    information = np.empty((len(codes), len(classes)))
    for j, code in enumerate(codes):
        for k, column in enumerate(classes):
            information[j, k] = _between(code, column, neighbours)
    return information


def _between(code: np.ndarray, column: np.ndarray, neighbours: int) -> float:
    counts = np.bincount(column)
    code, column = code[counts[column] > 1], column[counts[column] > 1]
    n = len(code)
    if n == 0:
        return 0.0
    digamma = np.concatenate([[np.nan, 0.0], np.cumsum(1 / np.arange(1, n))]) - np.euler_gamma
    ordered = np.sort(code)
    total = 0.0
    for c in np.flatnonzero(counts > 1):
        members = np.sort(code[column == c])
        k = min(neighbours, len(members) - 1)
        radius = np.nextafter(_neighbour_distance(members, k), 0)
        total += len(members) * (digamma[k] - digamma[len(members)])
        total -= digamma[_within(ordered, members, radius)].sum()
    return max(0.0, digamma[n] + total / n)


def _neighbour_distance(members: np.ndarray, k: int) -> np.ndarray:
    """Return the distance of each sorted member to its k-th nearest other: the best window of k + 1 that holds it."""
    count = len(members)
    distance = np.full(count, np.inf)
    for start in range(-k, 1):
        first = np.arange(count) + start
        fits = (first >= 0) & (first + k < count)
        x, left, right = members[fits], members[first[fits]], members[first[fits] + k]
        distance[fits] = np.minimum(distance[fits], np.maximum(x - left, right - x))
    return distance


def _within(ordered: np.ndarray, x: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return how many of the ordered values lie within a radius of each x."""
    n = len(ordered)
    lower = np.searchsorted(ordered, x - radius)
    upper = np.searchsorted(ordered, x + radius, side="right")
    # x - radius is rounded: what counts is the distance.
    while (move := (lower > 0) & (x - ordered[lower - 1] <= radius)).any():
        lower -= move
    while (move := x - ordered[np.minimum(lower, n - 1)] > radius).any():
        lower += move
    while (move := (upper < n) & (ordered[np.minimum(upper, n - 1)] - x <= radius)).any():
        upper += move
    while (move := ordered[upper - 1] - x > radius).any():
        upper -= move
    return upper - lower
