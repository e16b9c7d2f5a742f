"""Codes and factors of a training and a test set, for the metrics that learn to predict factors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._host import dense_classes
from fastdis.metrics._inputs import as_codes, as_factors

ABSENT = -1


@dataclass(frozen=True, eq=False)
class Split:
    """A training and a test set, with the values of every factor numbered from 0 in rising order.

    Attributes
    ----------
    codes, test_codes : ndarray of float64, [n, d] and [m, d]
    factors, test_factors : ndarray of int64, [n, K] and [m, K]
    classes, test_classes : ndarray of int32, [K, n] and [K, m]
        The number of each value. A test value that no training row has is ``ABSENT``.
    sizes : ndarray of int32, [K]
        How many values each factor has in the training set.
    """

    codes: np.ndarray
    factors: np.ndarray
    classes: np.ndarray
    sizes: np.ndarray
    test_codes: np.ndarray
    test_factors: np.ndarray
    test_classes: np.ndarray


def as_split(
    codes: np.ndarray | Tensor,
    factors: np.ndarray | Tensor,
    test_codes: np.ndarray | Tensor,
    test_factors: np.ndarray | Tensor,
    *,
    largest: float,
) -> Split:
    """Return the arguments of a metric that learns, or say which does not fit; no code may be beyond ``largest``."""
    codes_ = as_codes(codes)
    factors_ = as_factors(factors, len(codes_))
    test_codes_ = as_codes(test_codes, "test_codes")
    test_factors_ = as_factors(
        test_factors, len(test_codes_), name="test_factors", codes_name="test_codes", varying=False
    )
    for name, one, other in (("codes", codes_, test_codes_), ("factors", factors_, test_factors_)):
        if one.shape[1] != other.shape[1]:
            raise ValueError(
                f"{name} and test_{name} must have as many columns, got {one.shape[1]} and {other.shape[1]}"
            )
    for name, array in (("codes", codes_), ("test_codes", test_codes_)):
        found = np.abs(array).max()
        if found > largest:
            raise ValueError(f"{name} must lie between {-largest:g} and {largest:g}, got one of size {found:g}")
    classes, sizes, values = dense_classes(factors_)
    test_classes = [_numbered(column, known) for column, known in zip(test_factors_.T, values, strict=True)]
    return Split(codes_, factors_, classes, sizes, test_codes_, test_factors_, np.stack(test_classes))


def _numbered(column: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the place of each number of a column among values in rising order."""
    place = np.minimum(np.searchsorted(values, column), len(values) - 1)
    return np.where(values[place] == column, place, ABSENT).astype(np.int32)
