"""Mutual information gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

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
        Number of bins a code is cut into.

    Returns
    -------
    MIGResult
        The score and what it was computed from. A code that never changes, or whose whole range is a few units in
        the last place, tells nothing: its mutual information is 0. With one code only, the runner-up's is 0.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors not integers.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies (its gap would be 0 / 0), or
        ``bins < 1``.

    Notes
    -----
    A perfect code need not score 1: 20 bins do not tell the 32 values of a dSprites position apart, and the factors
    themselves score 0.8955.

    References
    ----------
    .. [1] R. T. Q. Chen, X. Li, R. Grosse, D. Duvenaud. Isolating Sources of Disentanglement in Variational
       Autoencoders. NeurIPS 2018, eq. 6.
    .. [2] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    codes_ = as_codes(codes)
    factors_ = as_factors(factors, len(codes_))
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    n, d = codes_.shape
    K = factors_.shape[1]
    binned = np.stack([_discretize(codes_[:, j], bins) for j in range(d)], axis=1)

    information = np.empty((d, K))
    entropy = np.empty(K)
    for k in range(K):
        values, classes = np.unique(factors_[:, k], return_inverse=True)
        # One histogram of all codes against this factor; the cells of code j start at j * bins * len(values).
        cells = (np.arange(d) * bins + binned) * len(values) + classes.reshape(n, 1)
        counts = np.bincount(cells.ravel(), minlength=d * bins * len(values)).reshape(d, bins, len(values))
        share = np.bincount(classes.ravel()) / n
        entropy[k] = -np.sum(share * np.log(share))
        information[:, k] = _mutual_information(counts)

    ranked = np.sort(np.concatenate([information, np.zeros((1, K))]), axis=0)
    gaps = (ranked[-1] - ranked[-2]) / entropy
    return MIGResult(float(gaps.mean()), information, entropy, gaps)


def _discretize(code: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each value [n], from 0, cutting the code's range into equal widths."""
    try:
        edges = np.histogram_bin_edges(code, bins)
    except ValueError:
        # NumPy refuses a range too narrow to be cut into so many distinct bins.
        return np.zeros(len(code), dtype=np.int64)
    # Only the lower edges: the largest value belongs to the last bin, not to one of its own.
    return np.searchsorted(edges[:-1], code, side="right") - 1


def _mutual_information(counts: np.ndarray) -> np.ndarray:
    """Return the plug-in mutual information [d], in nats, of joint counts [d, bins, values]."""
    n = counts[0].sum()
    independent = counts.sum(axis=2, keepdims=True) * counts.sum(axis=1, keepdims=True)
    # Whole numbers up to here, so that a code that tells nothing gets ratios of exactly 1.
    ratio = np.divide(counts * n, independent, out=np.ones(counts.shape), where=counts > 0)
    # It is never negative; what rounding leaves below 0 is not information.
    return np.maximum(np.sum(counts / n * np.log(ratio), axis=(1, 2)), 0.0)
