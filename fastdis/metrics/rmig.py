"""Robust mutual information gap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._histogram import as_bins, equal_width_edges, information_in
from fastdis.metrics._host import dense_classes, discretize, gaussian_histogram, joint_histogram
from fastdis.metrics._inputs import as_codes, as_factors
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class RMIGResult(Result):
    """What :func:`rmig` found.

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


def rmig(
    codes: np.ndarray | Tensor,
    factors: np.ndarray | Tensor,
    *,
    logvar: np.ndarray | Tensor | None = None,
    bins: int = 100,
    limits: tuple[float, float] | None = (-4.0, 4.0),
) -> RMIGResult:
    r"""Measure the mutual information gap on one fixed grid, with the encoder's own uncertainty.

    .. math::
        \mathrm{RMIG} = \frac{1}{K} \sum_k \frac{I(z_{(1)}; v_k) - I(z_{(2)}; v_k)}{H(v_k)}, \qquad
        q(z_j \in b, v_k) = \frac{1}{n} \sum_{i : v_{ik} = v_k} q(z_j \in b \mid x_i)

    as MIG, but a code is the encoder's whole Gaussian :math:`q(z_j \mid x_i)`, whose share in each bin is computed in
    closed form, and the bins are the same for all codes: they do not stretch with an outlier, and a dimension that
    collapsed to the prior is not blown up to fill them [1]_.

    Parameters
    ----------
    codes : real, [n, d]
        Posterior means.
    factors : integer, [n, K]
        The factors the images were made from. Any integers: only which are equal matters.
    logvar : real, [n, d], optional
        Logarithms of the posterior variances. Without them each code counts as the single number it is.
    bins : int, optional
        Number of bins of equal width between the limits, from 1 to 65536.
    limits : pair of float, optional
        Where the first bin begins and the last ends; what lies beyond counts in these two. The default suits codes
        that a standard normal prior keeps in place. ``None`` takes each code's own range of means, so that without
        ``logvar`` and with 20 bins the result is that of :func:`~fastdis.metrics.mig`.

    Returns
    -------
    RMIGResult
        The score and what it was computed from. With one code only, the runner-up's information is 0.

    Raises
    ------
    TypeError
        Codes or log-variances are not real numbers, or factors or ``bins`` not integers.
    ValueError
        Shapes do not fit, something is NaN or infinite, a factor never varies, ``bins`` is out of range, or
        ``limits`` are not two finite numbers that rise.

    Notes
    -----
    The paper's gap is in nats; here it is a share of the factor's entropy, as its normalised form, and averaged over
    factors. Grid and limits are a reconstruction of the paper's setting, so both are arguments. Perfect codes on
    a scale other than the grid's score low: codes that all fall beyond the limits tell nothing. On the grid they
    score near 1 if a bin holds one value only, and ``logvar`` lowers that by what the noise hides.

    :math:`O(n d K)` without ``logvar``; with them each row costs one error function and K additions for every bin
    within nine standard deviations.

    References
    ----------
    .. [1] K. Do, T. Tran. Theory and Evaluation Metrics for Learning Disentangled Representations. ICLR 2020.
    """
    codes = as_codes(codes)
    factors = as_factors(factors, len(codes))
    bins = as_bins(bins)
    classes, sizes, _ = dense_classes(factors)
    points = np.ascontiguousarray(codes.T)
    edges = equal_width_edges(points, bins) if limits is None else _grid(limits, bins, len(points))
    if logvar is None:
        counts = joint_histogram(discretize(points, edges), bins, classes, sizes)
    else:
        logvar = as_codes(logvar, "logvar")
        if logvar.shape != codes.shape:
            raise ValueError(
                f"logvar must have the shape of codes, got {list(logvar.shape)} for codes {list(codes.shape)}"
            )
        with np.errstate(over="ignore"):  # an infinite spread is one: half of it in either tail
            spread = np.exp(np.ascontiguousarray(logvar.T) / 2)
        counts = gaussian_histogram(points, spread, edges, classes, sizes)
    found = information_in(counts, sizes)
    gaps = (found.mutual.max(axis=0) - found.runner_up()) / found.factors
    return RMIGResult(float(gaps.mean()), found.mutual, found.factors, gaps)


def _grid(limits: tuple[float, float], bins: int, d: int) -> np.ndarray:
    """Return the edges of the same equal-width bins for d codes [d, bins + 1]."""
    try:
        first, last = (float(limit) for limit in limits)
    except (TypeError, ValueError) as error:
        raise TypeError(f"limits must be a pair of numbers or None, got {limits!r}") from error
    edges = np.linspace(first, last, bins + 1) if np.isfinite(last - first) else np.zeros(2)
    if (np.diff(edges) <= 0).any():
        raise ValueError(f"limits must be two finite numbers that rise, wide enough for {bins} bins, got {limits}")
    return np.tile(edges, (d, 1))
