"""Mean correlation coefficient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from fastdis.metrics._centred import centred, correlations
from fastdis.metrics._inputs import as_codes, as_latents
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class MCCResult(Result):
    """What :func:`mcc` found.

    Attributes
    ----------
    score : float
        Mean of ``matched``, in [0, 1].
    correlation : ndarray of float64, [d, K]
        Of every code with every factor, with its sign.
    assignment : ndarray of int64, [K]
        The code matched with each factor; -1 where there are too few codes.
    matched : ndarray of float64, [K]
        Absolute correlation of each factor with its code; 0 where it has none.
    """

    correlation: np.ndarray
    assignment: np.ndarray
    matched: np.ndarray


def mcc(
    codes: np.ndarray | Tensor,
    factors: np.ndarray | Tensor,
    *,
    correlation: Literal["pearson", "spearman"] = "pearson",
) -> MCCResult:
    r"""Measure how well codes, matched one to one with factors, correlate with them.

    .. math::
        \mathrm{MCC} = \frac{1}{K} \max_\pi \sum_k |\operatorname{corr}(z_{\pi(k)}, v_k)|

    over all :math:`\pi` that give no code to two factors [1]_, found exactly by linear assignment. It is the usual
    measure in work on identifiability and independent component analysis [2]_.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means.
    factors : real, [n, K]
        The factors the images were made from. Their values are taken as numbers: the order of an unordered factor,
        such as shape, is arbitrary, and so is its correlation.
    correlation : {"pearson", "spearman"}, optional
        Pearson's asks for a linear relation; Spearman's, the correlation of ranks (equal values share their mean
        rank), for a monotonic one.

    Returns
    -------
    MCCResult
        The score and what it was computed from. A code that never changes correlates 0. With more codes than
        factors, those left over do not count; with fewer, each factor left over counts 0. The literature has equal
        numbers and no convention for others: this one is ours.

    Raises
    ------
    TypeError
        Codes or factors are not real numbers.
    ValueError
        Shapes do not fit, a code or factor is NaN or infinite, a factor never varies, or ``correlation`` is unknown.
    ImportError
        SciPy is missing.

    Notes
    -----
    Perfect codes score 1, and so do they with any signs, scales and offsets. A circular factor (an orientation) coded
    by its sine and cosine scores less: the correlation is with its number. Random codes score above 0, and the more
    the more codes there are to choose from.

    :math:`O(n d K)`, and a sort of each column for Spearman.

    References
    ----------
    .. [1] A. Hyvärinen, H. Morioka. Unsupervised Feature Extraction by Time-Contrastive Learning and Nonlinear ICA.
       NeurIPS 2016.
    .. [2] I. Khemakhem, D. P. Kingma, R. P. Monti, A. Hyvärinen. ICE-BeeM: Identifiable Conditional Energy-Based Deep
       Models Based on Nonlinear ICA. NeurIPS 2020.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("mcc needs SciPy: pip install 'fastdis[metrics]'") from error
    points = as_codes(codes)
    values = as_latents(factors, len(points))
    if correlation == "spearman":
        from scipy.stats import rankdata

        points, values = rankdata(points, axis=0), rankdata(values, axis=0)
    elif correlation != "pearson":
        raise ValueError(f"correlation must be 'pearson' or 'spearman', got {correlation!r}")

    found = correlations(centred(points)[0], centred(values)[0])
    strength = np.abs(found)
    matched_codes, matched_factors = linear_sum_assignment(strength, maximize=True)
    K = values.shape[1]
    assignment, matched = np.full(K, -1), np.zeros(K)
    assignment[matched_factors] = matched_codes
    matched[matched_factors] = strength[matched_codes, matched_factors]
    return MCCResult(float(matched.mean()), found, assignment, matched)
