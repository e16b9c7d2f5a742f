"""Joint entropy minus mutual information gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._histogram import as_bins, information
from fastdis.metrics._inputs import as_codes, as_factors
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class JEMMIGResult(Result):
    """What :func:`jemmig` found.

    Attributes
    ----------
    score : float
        Mean of ``factor_scores``, in [0, 1].
    mutual_information : ndarray of float64, [d, K]
        Between every code and every factor, in nats.
    entropy : ndarray of float64, [K]
        Of every factor, in nats.
    joint_entropy : ndarray of float64, [K]
        Of every factor and the code most informative about it, in nats.
    factor_scores : ndarray of float64, [K]
        Per factor, 1 for one code that is the factor and nothing else, and no other code that knows of it.
    """

    mutual_information: np.ndarray
    entropy: np.ndarray
    joint_entropy: np.ndarray
    factor_scores: np.ndarray


def jemmig(codes: np.ndarray | Tensor, factors: np.ndarray | Tensor, *, bins: int = 10) -> JEMMIGResult:
    r"""Measure how far each factor is one code's, and that code the factor's alone.

    .. math::
        \mathrm{JEMMIG} = 1 - \frac{1}{K} \sum_k
            \frac{H(v_k, z_*) - I(v_k; z_*) + I(v_k; z_\circ)}{H(v_k) + \ln B}

    where :math:`z_*` and :math:`z_\circ` are the two codes most informative about factor :math:`v_k` and :math:`B` is
    the number of bins. Other than MIG it also pays for what :math:`z_*` holds beside the factor [1]_. This is the
    normalised form, turned so that 1 is best, of a review's implementation [2]_; the paper's own is the numerator,
    where 0 is best.

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
    JEMMIGResult
        The score and what it was computed from. A code that never changes tells nothing. With one code only,
        :math:`I(v_k; z_\circ)` is 0.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors or ``bins`` not integers.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies, or ``bins`` is out of range.

    Notes
    -----
    Perfect codes score 1 where every value of a factor has a bin of its own; with more values than bins, the bins
    hide part of the factor and the score is lower. One pass over the rows, :math:`O(n d K)`.

    References
    ----------
    .. [1] K. Do, T. Tran. Theory and Evaluation Metrics for Learning Disentangled Representations. ICLR 2020.
    .. [2] M.-A. Carbonneau, J. Zaidi, J. Boilard, G. Gagnon. Measuring Disentanglement: A Review of Metrics. 2020.
    """
    codes = as_codes(codes)
    factors = as_factors(factors, len(codes))
    bins = as_bins(bins)
    found = information(codes, factors, bins)
    best = found.mutual.max(axis=0)
    joint = found.factors + found.codes[found.mutual.argmax(axis=0)] - best
    factor_scores = 1 - (joint - best + found.runner_up()) / (found.factors + np.log(bins))
    return JEMMIGResult(float(factor_scores.mean()), found.mutual, found.factors, joint, factor_scores)
