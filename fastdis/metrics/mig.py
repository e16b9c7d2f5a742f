"""Mutual information gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._histogram import as_bins, information
from fastdis.metrics._inputs import as_codes, as_factors
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class MIGResult(Result):
    """What :func:`mig` found.

    Attributes
    ----------
    score : float
        Mean of ``gaps``, in [0, 1].
    mutual_information : ndarray of float64, [d, K]
        Between every code and every factor, in nats.
    entropy : ndarray of float64, [K]
        Of every factor, in nats.
    gaps : ndarray of float64, [K]
        Per factor, how far the most informative code leads the next, as a share of the factor's entropy.
    """

    mutual_information: np.ndarray
    entropy: np.ndarray
    gaps: np.ndarray


def mig(codes: np.ndarray | Tensor, factors: np.ndarray | Tensor, *, bins: int = 20) -> MIGResult:
    r"""Measure how far one code leads all others in what it tells of each factor.

    .. math::
        \mathrm{MIG} = \frac{1}{K} \sum_k \frac{I(z_{(1)}; v_k) - I(z_{(2)}; v_k)}{H(v_k)}

    where :math:`z_{(1)}` and :math:`z_{(2)}` are the two codes most informative about factor :math:`v_k` [1]_. Codes
    are discretised as in the common implementation [2]_: equal-width bins over each code's own range, then the
    plug-in estimate from the joint histogram.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means.
    factors : integer, [n, K]
        The factors the images were made from. Any integers: only which are equal matters.
    bins : int, optional
        Number of bins a code is cut into, from 1 to 65536.

    Returns
    -------
    MIGResult
        The score and what it was computed from. A code that never changes, or whose whole range is a few units in
        the last place, tells nothing: its mutual information is 0. With one code only, the runner-up's is 0.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors or ``bins`` not integers.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies (its gap would be 0 / 0), or ``bins`` is
        out of range.

    Notes
    -----
    A perfect code need not score 1: 20 bins do not tell the 32 values of a dSprites position apart, and the factors
    themselves score 0.8955. Few rows bias every mutual information upwards; the study [2]_ takes 10,000.

    One pass over the rows, :math:`O(n d K)`; memory beside the input is 4 bytes for each code and each factor, and 8
    for each cell of the histogram.

    A widely used implementation scores nearly 0 for any code, because it reshapes its samples where it means to
    transpose them; scores from it are not comparable.

    References
    ----------
    .. [1] R. T. Q. Chen, X. Li, R. Grosse, D. Duvenaud. Isolating Sources of Disentanglement in Variational
       Autoencoders. NeurIPS 2018, eq. 6.
    .. [2] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    codes = as_codes(codes)
    factors = as_factors(factors, len(codes))
    found = information(codes, factors, as_bins(bins))
    gaps = (found.mutual.max(axis=0) - found.runner_up()) / found.factors
    return MIGResult(float(gaps.mean()), found.mutual, found.factors, gaps)
