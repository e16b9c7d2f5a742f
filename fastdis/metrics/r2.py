"""Coefficient of determination of a linear regression of factors on codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._centred import centred
from fastdis.metrics._inputs import as_codes, as_latents
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class R2Result(Result):
    """What :func:`r2` found.

    Attributes
    ----------
    score : float
        Mean of ``explained``, in [0, 1].
    explained : ndarray of float64, [K]
        The share of the variance of each factor that a linear map of the codes explains.
    """

    explained: np.ndarray


def r2(codes: np.ndarray | Tensor, factors: np.ndarray | Tensor) -> R2Result:
    r"""Measure how well the factors are a linear map of the codes.

    .. math::
        R^2_k = 1 - \min_{a, b} \frac{\sum_i (v_{ik} - a^\top z_i - b)^2}{\sum_i (v_{ik} - \bar v_k)^2}, \quad
        R^2 = \frac{1}{K} \sum_k R^2_k

    It goes with :func:`mcc` in work on identifiability: codes that tell the factors only up to a linear map, and are
    weakly identified [1]_, may have a low MCC, and have an :math:`R^2` of 1.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means.
    factors : real, [n, K]
        The factors the images were made from. Their values are taken as numbers: the order of an unordered factor,
        such as shape, is arbitrary, and so is how well it is explained.

    Returns
    -------
    R2Result
        The score and what it was computed from. A code that never changes explains nothing, and one that is a linear
        map of others nothing more than they do.

    Raises
    ------
    TypeError
        Codes or factors are not real numbers.
    ValueError
        Shapes do not fit, a code or factor is NaN or infinite, or a factor never varies.

    Notes
    -----
    It tells nothing of disentanglement: any invertible linear map of the codes, and any offset, scores the same.

    The rows measured are those the regression is fitted to, so codes of pure noise score about :math:`d / (n - 1)`, and
    anything scores 1 from :math:`d = n - 1` codes on.

    Codes count as collinear where a singular value of their deviations, each in units of its largest, is below
    :math:`\varepsilon \max(n, d)` of the largest singular value. :math:`O(n d \min(n, d) + n d K)`.

    References
    ----------
    .. [1] I. Khemakhem, R. P. Monti, D. P. Kingma, A. Hyvärinen. ICE-BeeM: Identifiable Conditional Energy-Based Deep
       Models Based on Nonlinear ICA. NeurIPS 2020.
    """
    points = as_codes(codes)
    values = as_latents(factors, len(points))

    directions = _directions(centred(points)[0])
    targets = centred(values)[0]
    # The residual itself, and not what it leaves of the variance: near 1 that would cost half of the digits.
    residuals = targets - (targets @ directions.T) @ directions
    left = np.square(residuals).sum(axis=1) / np.square(targets).sum(axis=1)
    explained = np.maximum(1 - left, 0.0)  # rounding may leave more than there was
    return R2Result(float(explained.mean()), explained)


def _directions(rows: np.ndarray) -> np.ndarray:
    """Return orthonormal rows that span what ``rows`` [d, n], at most 1 in size, span, [rank, n]."""
    # Of codes in alike units: a small singular value then tells that some are collinear, and not of large units.
    _, strengths, directions = np.linalg.svd(rows, full_matrices=False)
    return directions[strengths > np.finfo(np.float64).eps * max(rows.shape) * strengths[0]]
