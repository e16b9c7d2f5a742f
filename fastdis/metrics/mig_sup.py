"""Mutual information gap of codes instead of factors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._histogram import as_bins, information, second_largest
from fastdis.metrics._inputs import as_codes, as_factors
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class MIGSupResult(Result):
    """What :func:`mig_sup` found.

    Attributes
    ----------
    score : float
        Mean of ``gaps``, in [0, 1].
    mutual_information : ndarray of float64, [d, K]
        Between every code and every factor, in nats.
    entropy : ndarray of float64, [K]
        Of every factor, in nats.
    gaps : ndarray of float64, [d]
        Per code, how far the factor it tells most of leads the next, in shares of the factors' entropies.
    """

    mutual_information: np.ndarray
    entropy: np.ndarray
    gaps: np.ndarray


def mig_sup(codes: np.ndarray | Tensor, factors: np.ndarray | Tensor, *, bins: int = 10) -> MIGSupResult:
    r"""Measure how far each code tells of one factor more than of any other.

    .. math::
        \text{MIG-sup} = \frac{1}{d} \sum_j \left( J_{j(1)} - J_{j(2)} \right), \qquad
        J_{jk} = \frac{I(z_j; v_k)}{H(v_k)}

    where :math:`J_{j(1)}` and :math:`J_{j(2)}` are the two largest over factors [1]_. It sees what MIG cannot: several
    factors in one code.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means.
    factors : integer, [n, K]
        The factors the images were made from. Any integers: only which are equal matters.
    bins : int, optional
        Number of equal-width bins each code's own range is cut into, from 1 to 65536; 10, as a review's
        implementation [2]_, by default.

    Returns
    -------
    MIGSupResult
        The score and what it was computed from. A code that never changes has gap 0 and stays in the mean. With one
        factor only, the runner-up's share is 0.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors or ``bins`` not integers.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies, or ``bins`` is out of range.

    Notes
    -----
    Perfect codes score 1 where every value of a factor has a bin of its own, and less otherwise. Codes that nobody
    uses lower the score: five perfect ones of ten score at most 0.5. One pass over the rows, :math:`O(n d K)`.

    References
    ----------
    .. [1] Z. Li, J. V. Murkute, P. K. Gyawali, L. Wang. Progressive Learning and Disentanglement of Hierarchical
       Representations. ICLR 2020.
    .. [2] M.-A. Carbonneau, J. Zaidi, J. Boilard, G. Gagnon. Measuring Disentanglement: A Review of Metrics. 2020.
    """
    codes = as_codes(codes)
    factors = as_factors(factors, len(codes))
    found = information(codes, factors, as_bins(bins))
    shares = (found.mutual / found.factors).T
    gaps = shares.max(axis=0) - second_largest(shares)
    return MIGSupResult(float(gaps.mean()), found.mutual, found.factors, gaps)
