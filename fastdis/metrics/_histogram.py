"""Joint histograms of codes and factors, and the information in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastdis.metrics._centred import with_headroom
from fastdis.metrics._host import dense_classes, discretize, joint_histogram
from fastdis.metrics._inputs import as_count

MOST_BINS = 65536


@dataclass(frozen=True, eq=False)
class Information:
    """Plug-in estimates, in nats, from a joint histogram.

    Attributes
    ----------
    mutual : ndarray of float64, [d, K]
        Mutual information of every code and every factor, never negative.
    codes : ndarray of float64, [d]
        Entropy of every code.
    factors : ndarray of float64, [K]
        Entropy of every factor.
    """

    mutual: np.ndarray
    codes: np.ndarray
    factors: np.ndarray

    def runner_up(self) -> np.ndarray:
        """Return, for each factor, what the second most informative code tells [K]; 0 where there is one code."""
        return second_largest(self.mutual)


def information(codes: np.ndarray, factors: np.ndarray, bins: int) -> Information:
    """Estimate the information in codes [n, d], cut into equal widths, about factors [n, K]."""
    classes, sizes, _ = dense_classes(factors)
    return information_in(joint_histogram(equal_width_bins(codes, bins), bins, classes, sizes), sizes)


def information_in(counts: np.ndarray, sizes: np.ndarray) -> Information:
    """Read the information off joint counts [d, S, bins] of codes and all values of factors, ``sizes`` [K] of each."""
    starts = np.cumsum(sizes) - sizes
    of_codes = counts[:, : sizes[0]].sum(axis=1)
    of_values = counts[0].sum(axis=1)
    n = of_codes[0].sum()
    # Whole numbers up to the quotient, so that a code that tells nothing gets ratios of exactly 1.
    ratio = np.divide(
        counts * n, of_values[:, None] * of_codes[:, None, :], out=np.ones(counts.shape), where=counts > 0
    )
    terms = np.einsum("dsb,dsb->ds", counts, np.log(ratio, out=ratio)) / n
    return Information(
        # It is never negative; what rounding leaves below 0 is not information.
        mutual=np.maximum(np.add.reduceat(terms, starts, axis=1), 0.0),
        codes=_surprise(of_codes / n).sum(axis=1),
        factors=np.add.reduceat(_surprise(of_values / n), starts),
    )


def second_largest(values: np.ndarray) -> np.ndarray:
    """Return the second largest of every column, [m, K] -> [K]; 0 where there is one row only."""
    if len(values) == 1:
        return np.zeros(values.shape[1])
    return np.partition(values, -2, axis=0)[-2]


def equal_width_bins(codes: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each code, int32 [d, n], as :func:`numpy.histogram` cuts each column's own range [n, d].

    The largest value belongs to the last bin. A column that never changes, or whose range is too narrow to be cut into
    so many distinct widths, is one bin.
    """
    codes = with_headroom(np.ascontiguousarray(codes.T))
    return discretize(codes, equal_width_edges(codes, bins))


def equal_width_edges(codes: np.ndarray, bins: int) -> np.ndarray:
    """Return the edges between the bins of each code, [d, n] -> [d, bins + 1]; infinite where it is one bin."""
    lowest, highest = codes.min(axis=1), codes.max(axis=1)
    # NumPy takes another way to the edges of all codes as soon as one step is 0.
    narrow = (highest - lowest) / bins == 0
    edges = np.linspace(np.where(narrow, 0.0, lowest), np.where(narrow, 1.0, highest), bins + 1, axis=-1)
    narrow |= (edges[:, :-1] >= edges[:, 1:]).any(axis=1)
    edges[narrow, 1:] = np.inf
    return edges


def as_bins(bins: int) -> int:
    """Return a number of bins, or say what was wrong with it."""
    return as_count(bins, "bins", most=MOST_BINS)


def _surprise(share: np.ndarray) -> np.ndarray:
    """Return -p ln p, which is 0 at 0."""
    return -share * np.log(share, out=np.zeros(share.shape), where=share > 0)
