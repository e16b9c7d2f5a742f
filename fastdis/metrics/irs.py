"""Interventional robustness score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._centred import centred
from fastdis.metrics._histogram import as_bins, equal_width_bins
from fastdis.metrics._host import dense_classes, segment_spread
from fastdis.metrics._inputs import as_codes, as_factors
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class IRSResult(Result):
    """What :func:`irs` found.

    Attributes
    ----------
    score : float
        Mean of ``disentanglement_scores`` weighted by ``max_deviations``, at most 1.
    matrix : ndarray of float64, [d, K]
        How robust every code is to all factors but this one.
    parents : ndarray of int64, [d]
        The factor each code is most robust about; -1 for a code that never changes.
    disentanglement_scores : ndarray of float64, [d]
        The largest entry of each row of ``matrix``.
    max_deviations : ndarray of float64, [d]
        The largest distance of each code to its mean.
    num_active_codes : int
        How many codes change at all.
    """

    matrix: np.ndarray
    parents: np.ndarray
    disentanglement_scores: np.ndarray
    max_deviations: np.ndarray
    num_active_codes: int


def irs(
    codes: np.ndarray | Tensor, factors: np.ndarray | Tensor, *, quantile: float = 0.99, bins: int | None = 20
) -> IRSResult:
    r"""Measure how still a code stays while one factor is held and all others change.

    .. math::
        R_{jk} = 1 - \frac{1}{\delta_j} \operatorname*{mean}_{a}
            Q_q\big( |z_j - \mathbb{E}[z_j \mid v_k = a]| \;\big|\; v_k = a \big), \quad
        \delta_j = \max |z_j - \mathbb{E} z_j|, \quad
        \mathrm{IRS} = \frac{\sum_j \delta_j \max_k R_{jk}}{\sum_j \delta_j}

    where the mean runs over the values of factor k that occur and :math:`Q_q` is the quantile [1]_.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means.
    factors : integer, [n, K]
        The factors the images were made from. Where a factor has more values than fit the bins, their order and
        distances matter; otherwise only which are equal.
    quantile : float, optional
        From 0 to 1. The paper takes the largest deviation, 1; the common implementation [2]_ takes 0.99.
    bins : int, optional
        Number of equal-width bins the range of each factor is cut into, from 1 to 65536, as in the common
        implementation: values in one bin count as one. ``None`` keeps every value.

    Returns
    -------
    IRSResult
        The score and what it was computed from. A code that never changes has robustness 0 everywhere, and no
        weight. Where none changes the score is 0.

    Raises
    ------
    TypeError
        Codes are not real numbers, factors or ``bins`` not integers, or ``quantile`` is not a number.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies, or ``quantile`` or ``bins`` is out of
        range.

    Notes
    -----
    Perfect codes score 1 if no bin holds two values of a factor, else less: 0.9854 on dSprites factors. The score
    changes with the scale of single codes, because a code weighs as much as it deviates; a common scale and offsets
    change nothing. Fewer rows for a value than :math:`1 / (1 - q)` make it look robust: with one row each, everything
    scores 1. Adding codes of pure noise lowers the score.

    The common implementation's count of active codes is wrong: it adds up the values of codes, and may be negative.
    Its scores and ours are equal. :math:`O(n d K)`: quantiles by selection, without sorting.

    References
    ----------
    .. [1] R. Suter, D. Miladinovic, B. Schölkopf, S. Bauer. Robustly Disentangled Causal Mechanisms: Validating Deep
       Representations for Interventional Robustness. ICML 2019.
    .. [2] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    codes = as_codes(codes)
    factors = as_factors(factors, len(codes))
    quantile = _as_quantile(quantile)
    classes, sizes, values = dense_classes(factors)
    if bins is not None:
        sizes = _merge(classes, values, as_bins(bins))
    deviations, largest = centred(codes)
    spread = segment_spread(deviations, classes, sizes, quantile)
    mean_spread = np.add.reduceat(spread, np.cumsum(sizes) - sizes, axis=1) / sizes
    active = largest > 0
    matrix = np.where(active[:, None], 1 - mean_spread, 0.0)
    scores = matrix.max(axis=1)
    score = float(np.average(scores, weights=largest / largest.max())) if active.any() else 0.0
    return IRSResult(
        score, matrix, np.where(active, matrix.argmax(axis=1), -1), scores, largest, int(np.count_nonzero(active))
    )


def _merge(classes: np.ndarray, values: list[np.ndarray], bins: int) -> np.ndarray:
    """Let values of a factor that fall into one bin be one class, in ``classes`` [K, n]; return the sizes [K]."""
    # Few values to bin instead of many rows; those of a factor that has fewer are filled up with its largest.
    table = np.empty((max(map(len, values)), len(values)))
    for k, distinct in enumerate(values):
        table[:, k] = distinct[-1]
        table[: len(distinct), k] = distinct
    # The values rise, and so do their bins.
    numbers = np.zeros(table.shape[::-1], np.int32)
    np.cumsum(np.diff(equal_width_bins(table, bins)) > 0, axis=1, out=numbers[:, 1:])
    for k, number in enumerate(numbers):
        classes[k] = number[classes[k]]
    return numbers[:, -1] + 1


def _as_quantile(quantile: float) -> float:
    try:
        number = float(quantile)
    except (TypeError, ValueError) as error:
        raise TypeError(f"quantile must be a number, got {type(quantile).__name__}") from error
    if not 0 <= number <= 1:
        raise ValueError(f"quantile must be from 0 to 1, got {number}")
    return number
