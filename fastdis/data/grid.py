"""Tables of factors beside the images: what grid they make, if any."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def grid_values(values: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return what each position of each factor means, from a table with a row for every image of a grid in order.

    Parameters
    ----------
    values : ndarray, [n, K]
        The value of each factor in each image.
    sizes : sequence of int, [K]
        How many values each factor takes; the last varies fastest.

    Returns
    -------
    list of ndarray of float64, [sizes_k]
        One array for each factor.

    Raises
    ------
    ValueError
        The table has another shape, or a factor has two values at one position.
    """
    if values.shape != (math.prod(sizes), len(sizes)):
        raise ValueError(f"its factor values are {list(values.shape)}, expected {[math.prod(sizes), len(sizes)]}")
    table = values.astype(np.float64).reshape(*sizes, len(sizes))
    columns = []
    for k in range(len(sizes)):
        column = np.moveaxis(table[..., k], k, -1)
        first = column.reshape(-1, sizes[k])[0].copy()
        # A tolerance, because files hold values that were computed anew for every image.
        if not np.allclose(column, first, rtol=1e-5, atol=1e-6):
            raise ValueError(f"its values of factor {k} are not those of a grid of sizes {tuple(sizes)} in order")
        columns.append(first)
    return columns


def sizes_in_order(values: np.ndarray) -> tuple[int, ...]:
    """Return how many values each factor takes, from the values of each factor in each image, [n, K].

    Values are told apart to six decimals. Whether they make a grid is not checked.

    Raises
    ------
    ValueError
        The table is empty, is not two-dimensional, or holds NaN or infinity.
    """
    if values.ndim != 2 or not values.size or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError(f"its labels are {values.dtype} {list(values.shape)}, expected finite numbers [n, factors]")
    return tuple(len(np.unique(np.round(column.astype(np.float64), 6))) for column in values.T)
