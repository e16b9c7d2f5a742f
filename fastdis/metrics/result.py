"""What every metric returns: a score, its parts by name, and both as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Result:
    """What a metric found: ``score``, and the parts it was made from.

    Attributes
    ----------
    score : float
        The metric.
    """

    score: float

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain numbers, strings, lists and dicts."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def to_json(self, *, indent: int | None = None) -> str:
        """Return the same as JSON text; numbers that JSON has no word for (NaN, infinity) become null."""
        return json.dumps(_finite(self.to_dict()), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
