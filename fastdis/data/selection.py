"""Which values of a factor a generator draws."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import numpy as np

Selection = int | Iterable[int] | None


def select(values: Selection, name: str, full: int, *, period: int | None = None) -> list[int]:
    """Return positions on a factor's full grid.

    Parameters
    ----------
    values : int, iterable of int or None
        How many positions, evenly spread with the first and the last among them (the middle one for 1); or the
        positions themselves, in the order they are to have; or all.
    name : str
        What an error calls them.
    full : int
        How many positions there are.
    period : int, optional
        After how many positions a cyclic factor is back at the first. A number then spreads over one turn.

    Raises
    ------
    TypeError, ValueError
        Such positions do not exist.
    """
    if values is None:
        return list(range(full))
    if isinstance(values, bool | str | bytes):
        raise TypeError(f"{name} must be a whole number or an iterable of them, got {values!r}")
    if isinstance(values, int | np.integer):
        if not 1 <= values <= full:
            raise ValueError(f"{name} must ask for 1 to {full} values, got {values}")
        if values == full:
            return list(range(full))
        if period is not None:
            return [round(i * period / values) for i in range(values)]
        if values == 1:
            return [(full - 1) // 2]
        return [round(i * (full - 1) / (values - 1)) for i in range(values)]
    try:
        positions = [operator.index(value) for value in values]
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number or an iterable of them, got {values!r}") from error
    if not positions or len(set(positions)) != len(positions) or not all(0 <= p < full for p in positions):
        raise ValueError(f"{name} must hold distinct positions from 0 to {full - 1}, at least one, got {positions}")
    return positions
