"""One-feature support vector machines: compiled, or the same in NumPy where nothing was compiled.

Codes are float64 [n, d]. Classes are int32 [K, n], numbered from 0, with how many there are of each in ``sizes``,
int32 [K]. Every class has a line, but a factor of two has one in all; over all factors they are L in number, those of
the first factor first.
"""

from __future__ import annotations

import numpy as np
import torch

from fastdis.ops._backends import extension

MAX_ITERATIONS = 200
MAX_HALVINGS = 60
ROUNDING = 1e-8


def hinge_lines(
    codes: np.ndarray, classes: np.ndarray, sizes: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit one line of every code for each class of every factor against the rest.

    A line is ``slope * (x - centre) + height``. It minimises half its squared slope and half its squared value at
    x = 0, plus the squared hinge losses, weighted by ``penalty`` and, for the class, by how rare it is.

    Returns
    -------
    centre : ndarray of float64, [d]
    slope, height : ndarray of float64, [d, L]
    """
    if extension is None:
        return hinge_lines_numpy(codes, classes, sizes, penalty)
    return extension.hinge_lines(codes, classes, sizes, penalty, torch.get_num_threads())


def hinge_lines_numpy(
    codes: np.ndarray, classes: np.ndarray, sizes: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what :func:`hinge_lines` returns."""
    n, d = codes.shape
    centre = np.sort(codes, axis=0)[n // 2]
    points = codes - centre
    scale = np.maximum.reduce([np.abs(points).max(axis=0), np.abs(centre) * 2.0**-53, np.full(d, 1e-100)])
    points /= scale
    slope, height = [], []
    for labels, size in zip(classes, sizes.tolist(), strict=True):
        balanced = penalty * (n / (float(size) * np.bincount(labels, minlength=size)))
        for c in range(size == 2, size):
            sign = np.where(labels == c, 1.0, -1.0)
            weight = np.where(labels == c, balanced[c], balanced[0] if size == 2 else penalty)
            lines = [
                _solve(points[:, j], sign, weight, centre[j] / scale[j], 1 / scale[j] / scale[j]) for j in range(d)
            ]
            slope.append([line[0] for line in lines] / scale)
            height.append([line[1] for line in lines])
    return centre, np.stack(slope, axis=1), np.stack(height, axis=1)


def hinge_accuracy(
    codes: np.ndarray,
    classes: np.ndarray,
    sizes: np.ndarray,
    centre: np.ndarray,
    slope: np.ndarray,
    height: np.ndarray,
) -> np.ndarray:
    """Return how often the class of the highest line is right, as a share, float64 [d, K].

    The first of equally high lines wins; the only line of two classes votes for the second where it is above zero. A
    class that is not from 0 to ``sizes - 1`` is never met.
    """
    if extension is None:
        return hinge_accuracy_numpy(codes, classes, sizes, centre, slope, height)
    return extension.hinge_accuracy(codes, classes, sizes, centre, slope, height, torch.get_num_threads())


def hinge_accuracy_numpy(
    codes: np.ndarray,
    classes: np.ndarray,
    sizes: np.ndarray,
    centre: np.ndarray,
    slope: np.ndarray,
    height: np.ndarray,
) -> np.ndarray:
    """Return what :func:`hinge_accuracy` returns."""
    accuracy = np.empty((codes.shape[1], len(sizes)))
    last = np.cumsum(np.where(sizes == 2, 1, sizes)).tolist()
    for j, points in enumerate((codes - centre).T):
        heights = slope[j, :, None] * points + height[j, :, None]
        for k, (start, stop) in enumerate(zip([0, *last[:-1]], last, strict=True)):
            chosen = heights[start] > 0 if sizes[k] == 2 else heights[start:stop].argmax(axis=0)
            accuracy[j, k] = np.mean(chosen == classes[k])
    return accuracy


def _solve(points: np.ndarray, sign: np.ndarray, weight: np.ndarray, m: float, r: float) -> tuple[float, float]:
    """Minimise (r slope² + (height - m slope)²) / 2 + the weighted squared hinge losses, by Newton's method."""
    slope = height = 0.0

    def look(slope: float, height: float) -> tuple[np.ndarray, float, float]:
        margin = sign * (slope * points + height)
        inside = margin < 1
        pull = np.where(inside, 2 * weight * sign * (margin - 1), 0.0)
        through_origin = height - m * slope
        return inside, r * slope - m * through_origin + pull @ points, through_origin + pull.sum()

    inside, by_slope, by_height = look(slope, height)
    for _ in range(MAX_ITERATIONS):
        count, first, second = (2 * np.sum((weight * points**power)[inside]) for power in range(3))
        # Of the Hessian [[r + m² + second, first - m], [first - m, 1 + count]], summed so that m² cancels beforehand.
        determinant = (
            r * (1 + count) + max(second * count - first * first, 0) + max(second + m * (2 * first + m * count), 0)
        )
        step_slope = -((1 + count) * by_slope - (first - m) * by_height) / determinant
        step_height = -((r + m * m + second) * by_height - (first - m) * by_slope) / determinant
        descent = -(by_slope * step_slope + by_height * step_height)
        if not descent > 0:
            break
        length, low, high = 1.0, 0.0, 1.0
        for _ in range(MAX_HALVINGS):
            there = look(slope + length * step_slope, height + length * step_height)
            if length == 1 and np.array_equal(there[0], inside):
                return slope + step_slope, height + step_height
            rise = there[1] * step_slope + there[2] * step_height
            if rise > ROUNDING * descent:
                high = length
            elif length < 1 and rise < -descent / 4:
                low = length
            else:
                break
            length = (low + high) / 2
        if length * step_slope + slope == slope and length * step_height + height == height:
            break
        slope, height = slope + length * step_slope, height + length * step_height
        inside, by_slope, by_height = there
    return slope, height
