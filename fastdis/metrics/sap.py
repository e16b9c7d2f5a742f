"""Separated attribute predictability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._centred import centred, correlations
from fastdis.metrics._histogram import second_largest
from fastdis.metrics._host_hinge import hinge_accuracy, hinge_lines
from fastdis.metrics._split import as_split
from fastdis.metrics.result import Result

PENALTY = 0.01
LEAST_VARIANCE = 1e-12
LARGEST = 1e150


@dataclass(frozen=True, eq=False)
class SAPResult(Result):
    """What :func:`sap` found.

    Attributes
    ----------
    score : float
        Mean of ``gaps``, in [0, 1].
    matrix : ndarray of float64, [d, K]
        How well every code alone predicts every factor: the share of the test set that is classified right or, for
        ``continuous=True``, the squared correlation.
    gaps : ndarray of float64, [K]
        Per factor, how far the best code leads the next.
    """

    matrix: np.ndarray
    gaps: np.ndarray


def sap(
    codes: np.ndarray | Tensor,
    factors: np.ndarray | Tensor,
    test_codes: np.ndarray | Tensor,
    test_factors: np.ndarray | Tensor,
    *,
    continuous: bool = False,
) -> SAPResult:
    r"""Measure how far one code leads all others in predicting each factor on its own.

    .. math::
        \mathrm{SAP} = \frac{1}{K} \sum_k S_{(1)k} - S_{(2)k}

    where :math:`S_{(1)k}` and :math:`S_{(2)k}` are the two largest entries of column k of a matrix of scores [1]_. With
    the settings of the common study [2]_, :math:`S_{jk}` is the accuracy on the test set of a linear support vector
    machine that sees code j alone, fitted on the training set: a line for each of the :math:`C_k` values against the
    rest, squared hinge loss, C = 0.01 over the number of rows of the value times :math:`C_k / n` and C = 0.01 for the
    rest, the intercept regularised like the slope, codes neither centred nor scaled. A factor of two values has one
    line, its classes weighted alike.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n training images, usually the posterior means.
    factors : integer, [n, K]
        The factors the training images were made from. Where factors are classes, only which are equal matters.
    test_codes, test_factors : real, [m, d] and integer, [m, K]
        The same for a test set. A test value that never occurs in training counts as not predicted. With
        ``continuous=True`` the test set is checked but has no part in the score, as in [2]_.
    continuous : bool, optional
        Take factors as numbers and :math:`S_{jk} = \mathrm{cov}(z_j, v_k)^2 / (\mathrm{var}(z_j) \mathrm{var}(v_k))`
        over the training set, 0 where :math:`\mathrm{var}(z_j) \le 10^{-12}`. Published tables use the default.

    Returns
    -------
    SAPResult
        The score and what it was computed from. With one code only, the runner-up's score is 0.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors not integers.
    ValueError
        Shapes do not fit, a code is NaN, infinite or beyond 1e150, or a factor never varies in the training set.

    Notes
    -----
    A perfect code need not score 1, far from it: on one axis, a line against the rest cannot single out a value from
    the middle. The factors of dSprites themselves score 0.18 (0.9995 with ``continuous=True``), because of 32 positions
    about two are ever predicted. Codes are not scaled, so their scale changes the score.

    Every classifier is solved to its exact minimum, by Newton's method on two parameters. The solver of common
    implementations stops within a tolerance; of its predictions, about one in 100,000 differs from the minimum's.
    Cost: d sorts of n codes, then about 40 binary searches for each code and factor value; all of 10 codes against the
    factors of dSprites, with 10,000 training and 5,000 test images, take a twentieth of a second on one core.

    References
    ----------
    .. [1] A. Kumar, P. Sattigeri, A. Balakrishnan. Variational Inference of Disentangled Latent Concepts from Unlabeled
       Observations. ICLR 2018, section 3.
    .. [2] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    split = as_split(codes, factors, test_codes, test_factors, largest=LARGEST)
    if continuous:
        matrix = _squared_correlations(split.codes, split.factors)
    else:
        lines = hinge_lines(split.codes, split.classes, split.sizes, PENALTY)
        matrix = hinge_accuracy(split.test_codes, split.test_classes, split.sizes, *lines)
    gaps = matrix.max(axis=0) - second_largest(matrix)
    return SAPResult(float(gaps.mean()), matrix, gaps)


def _squared_correlations(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return the squared correlation of every code and factor [d, K], 0 for codes that hardly vary."""
    deviations, largest = centred(codes)
    varies = np.square(deviations).sum(axis=1) * np.square(largest) / (len(codes) - 1) > LEAST_VARIANCE
    squares = np.square(correlations(deviations, centred(factors.astype(np.float64))[0]))
    return np.where(varies[:, None], squares, 0.0)
