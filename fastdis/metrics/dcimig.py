"""Mutual information gap with the terms of DCI."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._histogram import as_bins, information, second_largest
from fastdis.metrics._inputs import as_codes, as_factors
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class DCIMIGResult(Result):
    """What :func:`dcimig` found.

    Attributes
    ----------
    score : float
        In [0, 1].
    mutual_information : ndarray of float64, [d, K]
        Between every code and every factor, in nats.
    entropy : ndarray of float64, [K]
        Of every factor, in nats.
    gaps : ndarray of float64, [d]
        Per code, how far the factor it tells most of leads the next, in nats.
    factor_gaps : ndarray of float64, [K]
        Per factor, the largest gap of the codes that tell most of it, in nats; 0 where there is no such code.
    """

    mutual_information: np.ndarray
    entropy: np.ndarray
    gaps: np.ndarray
    factor_gaps: np.ndarray


def dcimig(codes: np.ndarray | Tensor, factors: np.ndarray | Tensor, *, bins: int = 10) -> DCIMIGResult:
    r"""Measure how much of the factors' entropy is in codes that are about one factor each.

    .. math::
        \mathrm{DCIMIG} = \frac{\sum_k \max_{j : k_j = k} g_j}{\sum_k H(v_k)}, \qquad
        g_j = I(z_j; v_{k_j}) - \max_{k \ne k_j} I(z_j; v_k)

    where :math:`k_j` is the factor that code j tells most of. One number for disentanglement (the gap),
    completeness (only a factor's best code counts) and informativeness (of all there is to know) [1]_, as a review
    implements it [2]_.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means.
    factors : integer, [n, K]
        The factors the images were made from. Any integers: only which are equal matters.
    bins : int, optional
        Number of equal-width bins each code's own range is cut into, from 1 to 65536; the review's 10 by default.

    Returns
    -------
    DCIMIGResult
        The score and what it was computed from; its parts are in nats, the score is a ratio and has no unit. A code
        that never changes has gap 0. With one factor only, the runner-up's information is 0.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors or ``bins`` not integers.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies, or ``bins`` is out of range.

    Notes
    -----
    Perfect codes score 1 where every value of a factor has a bin of its own, and less otherwise. Codes that nobody
    uses do not count. One pass over the rows, :math:`O(n d K)`.

    References
    ----------
    .. [1] A. Sepliarskaia, J. Kiseleva, M. de Rijke. How to Not Measure Disentanglement. 2019.
    .. [2] M.-A. Carbonneau, J. Zaidi, J. Boilard, G. Gagnon. Measuring Disentanglement: A Review of Metrics. 2020.
    """
    codes = as_codes(codes)
    factors = as_factors(factors, len(codes))
    found = information(codes, factors, as_bins(bins))
    gaps = found.mutual.max(axis=1) - second_largest(found.mutual.T)
    factor_gaps = np.zeros(len(found.factors))
    np.maximum.at(factor_gaps, found.mutual.argmax(axis=1), gaps)
    return DCIMIGResult(float(factor_gaps.sum() / found.factors.sum()), found.mutual, found.factors, gaps, factor_gaps)
