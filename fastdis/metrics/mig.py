"""Mutual information gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MIGResult:
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

    score: float
    mutual_information: np.ndarray
    entropy: np.ndarray
    gaps: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain numbers and lists, ready for JSON."""
        return {
            "score": self.score,
            "mutual_information": self.mutual_information.tolist(),
            "entropy": self.entropy.tolist(),
            "gaps": self.gaps.tolist(),
        }


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
    codes_ = _as_codes(codes)
    factors_ = _as_factors(factors, len(codes_))
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    n, d = codes_.shape
    K = factors_.shape[1]
    binned = np.stack([_discretize(codes_[:, j], bins) for j in range(d)], axis=1)

    information = np.empty((d, K))
    entropy = np.empty(K)
    for k in range(K):
        values, classes = np.unique(factors_[:, k], return_inverse=True)
        if len(values) < 2:
            raise ValueError(f"factors column {k} never varies: leave it out, there is nothing to tell about it")
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


def _as_codes(codes: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(codes, Tensor):
        codes = codes.detach().cpu()
        codes = (codes.float() if codes.dtype == torch.bfloat16 else codes).numpy()  # NumPy has no bfloat16
    array = np.asarray(codes)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"codes must be real numbers, got {array.dtype}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"codes must have shape [n, d] with at least one code, got {list(array.shape)}")
    if len(array) == 0:
        raise ValueError("codes must have at least one row, got none")
    finite = np.isfinite(array).all(axis=0)
    if not finite.all():
        columns = ", ".join(map(str, np.flatnonzero(~finite)))
        raise ValueError(f"codes must be finite, and hold NaN or infinity in column {columns}")
    # Bin edges in double precision, so that codes score the same in whatever precision they come.
    return array.astype(np.float64)


def _as_factors(factors: np.ndarray | Tensor, n: int) -> np.ndarray:
    array = factors.detach().cpu().numpy() if isinstance(factors, Tensor) else np.asarray(factors)
    if array.dtype.kind not in "iu":
        raise TypeError(f"factors must be integers, got {array.dtype}; number the values of a continuous factor first")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"factors must have shape [n, K] with at least one factor, got {list(array.shape)}")
    if len(array) != n:
        raise ValueError(f"codes and factors must have as many rows, got {n} and {len(array)}")
    return array
