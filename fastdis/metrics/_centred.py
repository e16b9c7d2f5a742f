"""Codes of any magnitude and offset, made safe to multiply and add up."""

from __future__ import annotations

import numpy as np


def centred(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each code's deviations from its mean in units of the largest, [n, d] -> [d, n], and the largest, [d].

    The deviations lie in [-1, 1]: no sum or product of them overflows, and a large offset costs no digits. A code
    that never changes has deviations 0, and 0 for the largest.
    """
    columns = np.array(codes.T, order="C")
    deviations = with_headroom(columns)
    scaled = deviations is not columns
    # Equal values differ by exactly 0 from the first, so that nothing but 0 is left of them.
    deviations -= deviations[:, :1].copy()
    deviations -= deviations.mean(axis=1, keepdims=True)
    largest = np.maximum(deviations.max(axis=1), -deviations.min(axis=1))
    deviations /= np.where(largest > 0, largest, 1.0)[:, None]
    if scaled:
        largest = np.minimum(largest, np.finfo(np.float64).max * HEADROOM) / HEADROOM
    return deviations, largest


def with_headroom(codes: np.ndarray) -> np.ndarray:
    """Return codes, scaled down alike by ``HEADROOM`` where differences or sums of them could overflow."""
    return codes * HEADROOM if max(codes.max(), -codes.min()) > 2.0**900 else codes


HEADROOM = 2.0**-100


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of rows from :func:`centred`, [a, n] and [b, n] -> [a, b]; 0 for a constant."""
    norms = np.sqrt(np.outer(np.square(first).sum(axis=1), np.square(second).sum(axis=1)))
    products = first @ second.T
    return np.clip(np.divide(products, norms, out=np.zeros(norms.shape), where=norms > 0), -1.0, 1.0)
