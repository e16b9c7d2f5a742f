"""Explicitness."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdis.metrics._logistic import LogisticRegression, serial_blas
from fastdis.metrics._split import Split, as_split
from fastdis.metrics.result import Result

LARGEST = 1e150


@dataclass(frozen=True, eq=False)
class ExplicitnessResult(Result):
    """What :func:`explicitness` found.

    Attributes
    ----------
    score : float
        Mean of ``per_factor``: on the test set. 0.5 is chance, 1 perfect.
    train : float
        The same on the training set.
    per_factor : ndarray of float64, [K]
        Of every factor, on the test set.
    """

    train: float
    per_factor: np.ndarray


def explicitness(
    codes: np.ndarray | Tensor,
    factors: np.ndarray | Tensor,
    test_codes: np.ndarray | Tensor,
    test_factors: np.ndarray | Tensor,
) -> ExplicitnessResult:
    r"""Measure how well a linear classifier on all codes ranks the values of each factor.

    .. math::
        \frac{1}{K} \sum_k \frac{1}{C_k} \sum_c \mathrm{AUC}\bigl(p_k(c \mid z),\; v_k = c\bigr)

    where :math:`p_k` is a multinomial logistic regression of factor :math:`v_k` on the codes, and AUC the area under
    the ROC curve of value c against the rest [1]_: how often a row that has the value gets a higher probability than
    one that has not. Settings as in the common study [2]_: codes standardised by mean and deviation of the training
    set, squared penalty with C = 1, L-BFGS for at most 100 iterations.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n training images, usually the posterior means.
    factors : integer, [n, K]
        The factors the training images were made from. Any integers: only which are equal matters.
    test_codes, test_factors : real, [m, d] and integer, [m, K]
        The same for a test set. A training value that no test row has, or all have, has no ROC curve and is left out
        of the mean. A test value that no training row has counts as a miss for all others.

    Returns
    -------
    ExplicitnessResult
        The score, on the test set, and what it was computed from.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors not integers.
    ValueError
        Shapes do not fit, a code is NaN, infinite or beyond 1e150, a factor never varies in the training set, or no
        value of a factor has a ROC curve on the test set.
    ImportError
        SciPy is not installed: ``pip install 'fastdis[metrics]'``.

    Notes
    -----
    A perfect code need not score 1: a linear classifier ranks the middle values of an ordered factor well but not
    without mistakes, and the factors of dSprites themselves score 0.987. Chance is 0.5; some implementations rescale to
    2 score - 1. Before version 0.22 scikit-learn fitted one classifier for each value against the rest where it now
    fits one for all, so older published values differ. The optimiser stops before the optimum, as everyone's does here:
    a score is good to about 1e-5. Cost: tens of passes over n codes for each factor value, some seconds in all on
    10,000 rows of dSprites.

    References
    ----------
    .. [1] K. Ridgeway, M. C. Mozer. Learning Deep Disentangled Embeddings With the F-Statistic Loss. NeurIPS 2018,
       section 3.
    .. [2] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    split = as_split(codes, factors, test_codes, test_factors, largest=LARGEST)
    _refuse_constant_tests(split)
    train, test = _standardized(split.codes, split.test_codes)
    areas, test_areas = [], []
    with serial_blas():
        for classes, test_classes in zip(split.classes, split.test_classes, strict=True):
            model = LogisticRegression(penalty=1.0).fit(train, classes, threads=torch.get_num_threads())
            areas.append(_mean_area(model.probabilities(train), classes))
            test_areas.append(_mean_area(model.probabilities(test), test_classes))
    return ExplicitnessResult(float(np.mean(test_areas)), float(np.mean(areas)), np.array(test_areas))


def _refuse_constant_tests(split: Split) -> None:
    for k, (classes, size) in enumerate(zip(split.test_classes, split.sizes.tolist(), strict=True)):
        met = np.bincount(classes[classes >= 0], minlength=size)
        if not ((met > 0) & (met < len(classes))).any():
            raise ValueError(
                f"test_factors column {k} must have at least two values, one of them known from training, "
                "for a ROC curve needs rows of both kinds"
            )


def _standardized(codes: np.ndarray, test_codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both with mean 0 and deviation 1 of the first, each code that never varies in it as 0."""
    columns = np.ascontiguousarray(codes.T)
    mean, deviation = columns.mean(axis=1), columns.std(axis=1)
    # What the mean of equal values leaves is rounding, which must not be blown up into a code.
    constant = (columns == columns[:, :1]).all(axis=1) | (deviation == 0)
    deviation[constant] = np.inf
    return (codes - mean) / deviation, (test_codes - mean) / deviation


def _mean_area(probabilities: np.ndarray, classes: np.ndarray) -> float:
    """Return the area under the ROC curve, averaged over the columns [n, C] that have rows of both kinds."""
    from scipy.stats import rankdata  # LogisticRegression has said what is missing where SciPy is

    n, size = probabilities.shape
    count = np.bincount(classes[classes >= 0], minlength=size)
    areas = []
    for c in np.flatnonzero((count > 0) & (count < n)):
        ranks = rankdata(probabilities[:, c])[classes == c]
        areas.append((ranks.sum() - count[c] * (count[c] + 1) / 2) / (count[c] * (n - count[c])))
    return float(np.mean(areas))
