"""Scores of codes that need no factors: how much the codes depend on each other, 0 if not at all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._centred import centred, correlations
from fastdis.metrics._histogram import as_bins, equal_width_bins, information_in
from fastdis.metrics._host import joint_histogram
from fastdis.metrics._inputs import as_codes
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class GaussianTotalCorrelationResult(Result):
    """What :func:`gaussian_total_correlation` found.

    Attributes
    ----------
    score : float
        In nats, from 0 to infinity.
    correlation : ndarray of float64, [d, d]
        Of the codes with each other; 0 for a code that never changes, and 1 with itself.
    """

    correlation: np.ndarray


def gaussian_total_correlation(codes: np.ndarray | Tensor) -> GaussianTotalCorrelationResult:
    r"""Measure the total correlation that codes would have if they were jointly Gaussian.

    .. math::
        \mathrm{TC} = \mathrm{KL}\big( \mathcal N(\mu, \Sigma) \,\|\, \textstyle\prod_j \mathcal N(\mu_j, \Sigma_{jj})
            \big) = \tfrac12 \Big( \sum_j \ln \Sigma_{jj} - \ln \det \Sigma \Big)

    with the mean and covariance of the codes [1]_.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means; more rows than codes that change.

    Returns
    -------
    GaussianTotalCorrelationResult
        The score, in nats. It is infinite where a code is a linear function of others (two equal codes, say) to
        working precision, which is what the definition gives. A code that never changes depends on nothing and
        leaves the score as it is.

    Raises
    ------
    TypeError
        Codes are not real numbers.
    ValueError
        The shape is wrong, a code is NaN or infinite, or there are not more rows than codes that change, whose
        covariance is then singular whatever the codes.

    Notes
    -----
    Independent codes score 0 but for about :math:`d^2 / 4n` from finitely many rows. Only linear dependence shows.
    Scale and offset of single codes change nothing. :math:`O(n d^2)`.

    References
    ----------
    .. [1] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    deviations, largest = centred(as_codes(codes))
    active = largest > 0
    d, n = deviations.shape
    if n <= active.sum():
        raise ValueError(f"codes must have more rows than columns that change, got {n} rows for {active.sum()}")
    correlation = correlations(deviations, deviations)
    np.fill_diagonal(correlation, 1.0)
    eigenvalues = np.linalg.eigvalsh(correlation)
    singular = eigenvalues[0] <= eigenvalues[-1] * d * np.finfo(np.float64).eps
    score = np.inf if singular else max(0.0, -0.5 * float(np.log(eigenvalues).sum()))
    return GaussianTotalCorrelationResult(score, correlation)


@dataclass(frozen=True, eq=False)
class WassersteinCorrelationResult(Result):
    """What :func:`wasserstein_correlation` found.

    Attributes
    ----------
    score : float
        Squared distance, in squared units of the codes, from 0.
    normalized : float
        The same as a share of the codes' total variance, in [0, 2].
    covariance : ndarray of float64, [d, d]
        Of the codes, with n - 1 in the denominator.
    """

    normalized: float
    covariance: np.ndarray


def wasserstein_correlation(codes: np.ndarray | Tensor) -> WassersteinCorrelationResult:
    r"""Measure how far codes, taken as jointly Gaussian, are from independent ones of the same variances.

    .. math::
        W = W_2^2\big( \mathcal N(\mu, \Sigma), \mathcal N(\mu, D) \big)
          = 2 \operatorname{tr} \Sigma - 2 \operatorname{tr} \big( D^{1/2} \Sigma D^{1/2} \big)^{1/2},
          \qquad D = \operatorname{diag} \Sigma

    with the covariance of the codes [1]_, and :math:`W / \operatorname{tr} \Sigma` as its normalised form. Other than
    the total correlation it is finite where codes are linear functions of each other.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means; at least two rows.

    Returns
    -------
    WassersteinCorrelationResult
        The score, its normalised form and the covariance. Codes that never change have no part in it; where none
        changes both are 0. A variance beyond the largest float64 makes the score infinite, not the normalised form.

    Raises
    ------
    TypeError
        Codes are not real numbers.
    ValueError
        The shape is wrong, a code is NaN or infinite, or there is one row only.

    Notes
    -----
    Independent codes score 0 but for what finitely many rows leave. Offsets change nothing; a common scale s
    multiplies the score by s², and leaves the normalised form. :math:`O(n d^2 + d^3)`.

    References
    ----------
    .. [1] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    deviations, largest = centred(as_codes(codes))
    if deviations.shape[1] < 2:
        raise ValueError("codes must have at least two rows, got one: it has no covariance")
    unit = largest.max()
    if unit == 0:
        return WassersteinCorrelationResult(0.0, 0.0, np.zeros((len(largest), len(largest))))
    deviations *= (largest / unit)[:, None]
    covariance = deviations @ deviations.T / (deviations.shape[1] - 1)
    deviation = np.sqrt(np.diag(covariance))
    total = float(np.trace(covariance))
    # D^(1/2) covariance D^(1/2) is symmetric and has no negative eigenvalue; what rounding leaves below 0 is one.
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(covariance * np.outer(deviation, deviation)), 0.0))
    distance = max(0.0, 2 * total - 2 * float(roots.sum()))
    with np.errstate(over="ignore"):
        return WassersteinCorrelationResult(float(distance * unit * unit), distance / total, covariance * unit * unit)


@dataclass(frozen=True, eq=False)
class CodeMutualInformationResult(Result):
    """What :func:`code_mutual_information` found.

    Attributes
    ----------
    score : float
        Mean of ``mutual_information`` over pairs of different codes, in nats.
    mutual_information : ndarray of float64, [d, d]
        Of every code with every other, and on the diagonal its entropy, in nats.
    """

    mutual_information: np.ndarray


def code_mutual_information(codes: np.ndarray | Tensor, *, bins: int = 20) -> CodeMutualInformationResult:
    r"""Measure how much codes tell of each other.

    .. math:: \frac{1}{d (d - 1)} \sum_{i \ne j} I(z_i; z_j)

    in nats, each code cut into equal widths over its own range, and the plug-in estimate from the joint
    histograms [1]_.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n images, usually the posterior means.
    bins : int, optional
        Number of bins a code is cut into, from 1 to 65536.

    Returns
    -------
    CodeMutualInformationResult
        The score and what it was computed from. A code that never changes tells nothing. With one code there is no
        pair, and the score is 0.

    Raises
    ------
    TypeError
        Codes are not real numbers, or ``bins`` is not an integer.
    ValueError
        The shape is wrong, a code is NaN or infinite, or ``bins`` is out of range.

    Notes
    -----
    Independent codes score 0 but for about :math:`(B - 1)^2 / 2n` from finitely many rows, 0.018 for 20 bins and
    10,000 rows. One pass over the rows, :math:`O(n d^2)`, and :math:`d^2 B^2` cells.

    References
    ----------
    .. [1] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    codes = as_codes(codes)
    bins = as_bins(bins)
    d = codes.shape[1]
    binned = equal_width_bins(codes, bins)
    sizes = np.full(d, bins, np.int32)
    mutual = information_in(joint_histogram(binned, bins, binned, sizes), sizes).mutual
    score = float((mutual.sum() - np.trace(mutual)) / (d * (d - 1))) if d > 1 else 0.0
    return CodeMutualInformationResult(max(0.0, score), mutual)
