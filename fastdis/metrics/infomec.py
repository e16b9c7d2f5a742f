"""InfoMEC: modularity, explicitness and compactness in terms of information."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdis.metrics._centred import centred, with_headroom
from fastdis.metrics._host import dense_classes
from fastdis.metrics._host_neighbours import neighbour_information
from fastdis.metrics._inputs import as_codes, as_count, as_factors, as_seed
from fastdis.metrics._logistic import LogisticRegression, serial_blas
from fastdis.metrics.result import Result

# Neighbours, and the share of the widest code's range up to which a code counts as inactive.
CONSTANTS = {"standalone": (10, 1 / 20), "training": (3, 1 / 8)}


@dataclass(frozen=True, eq=False)
class InfoMECResult(Result):
    """What :func:`infomec` found.

    Attributes
    ----------
    score : float
        Mean of the three. The paper reports them apart; this mean is ours.
    infom, infoe, infoc : float
        Modularity and compactness, in [0, 1], and explicitness, at most 1.
    mutual_information : ndarray of float64, [d, K]
        Between every code and every factor, in nats, inactive codes included; 0 for a code that never changes.
    normalized : ndarray of float64, [d, K]
        The same as shares of the factors' entropies, from which modularity and compactness are computed.
    explained : ndarray of float64, [K]
        Explicitness of each factor; ``infoe`` is their mean.
    active : ndarray of int64
        The codes that modularity and compactness are about.
    """

    infom: float
    infoe: float
    infoc: float
    mutual_information: np.ndarray
    normalized: np.ndarray
    explained: np.ndarray
    active: np.ndarray


def infomec(
    codes: np.ndarray | Tensor,
    factors: np.ndarray | Tensor,
    *,
    constants: str = "standalone",
    neighbours: int | None = None,
    prune_fraction: float | None = None,
    seed: int = 0,
) -> InfoMECResult:
    r"""Measure modularity, explicitness and compactness of continuous codes.

    With :math:`M_{dk} = I(z_d; v_k) / H(v_k)` over the D active codes and K factors [1]_

    .. math::
        \mathrm{InfoM} &= \Big(\frac1D \sum_d \frac{\max_k M_{dk}}{\sum_k M_{dk}} - \frac1K\Big)
                          \Big/ \Big(1 - \frac1K\Big) \\
        \mathrm{InfoC} &= \Big(\frac1K \sum_k \frac{\max_d M_{dk}}{\sum_d M_{dk}} - \frac1D\Big)
                          \Big/ \Big(1 - \frac1D\Big) \\
        \mathrm{InfoE} &= \frac1K \sum_k \frac{H_0(v_k) - H(v_k \mid z)}{H_0(v_k)}

    so that 0 is an even spread and 1 that each code tells of one factor (InfoM), that each factor is told by one code
    (InfoC), and that factors can be read off all codes linearly (InfoE). Mutual information is estimated from nearest
    neighbours [2]_. :math:`H(v_k \mid z)` is the log loss, on the data it was fitted to, of logistic regression with
    balanced classes and no penalty, and :math:`H_0(v_k)` that of the same on codes that say nothing, which is the
    logarithm of the number of values.

    Parameters
    ----------
    codes : real, [n, d]
        Continuous codes, usually posterior means.
    factors : integer, [n, K]
        The factors the images were made from. Any integers: only which are equal matters.
    constants : {"standalone", "training"}, optional
        The authors publish two sets: 10 neighbours and a twentieth of the range with the metric by itself, 3
        neighbours and an eighth with the training code.
    neighbours : int, optional
        Instead of the number in ``constants``. Values of a factor with fewer rows use all they have.
    prune_fraction : float, optional
        Instead of the share in ``constants``: a code is active if its range exceeds this share of the widest.
    seed : int, optional
        Of the noise that breaks ties, from 0 to 2**63 - 1.

    Returns
    -------
    InfoMECResult
        The three and what they were computed from.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors, ``neighbours`` or ``seed`` not integers.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies, ``constants`` is not a known name, or a
        number is out of range.
    ImportError
        SciPy is missing.

    Notes
    -----
    Where the definition divides 0 by 0 the authors' code gives NaN. Here an active code that tells nothing of any
    factor counts 0 in InfoM, and a factor that no active code tells anything of counts 0 in InfoC. With one factor
    InfoM is the share of active codes that tell something of it, and with one active code InfoC the share of factors
    that it tells something of. Where no code is active (none ever changes) InfoM and InfoC are 0.

    The estimate is that of scikit-learn's ``mutual_info_classif``, code by code with ``random_state=seed``: codes are
    standardised and get normal noise of standard deviation 1e-10, because ties, as in codes that take few values, mean
    nothing to neighbours. Scores therefore vary with ``seed`` where codes have ties, by about 1e-3 for 10,000 rows, and
    hardly where they have none. Unlike scikit-learn's, the noise does not grow with a code's offset. A value with a
    single row has no neighbours and is left out.

    InfoE is about all standardised codes, the inactive included, as in the authors' code. Where the values of a factor
    can be told apart without error no finite weights are best; the fit stops after 100 iterations of L-BFGS or when
    its gradient is below 1e-4, so a perfect code scores 0.9998 rather than 1. Codes that tell nothing score slightly
    above 0, because the loss is that of the data fitted. InfoE can be negative where a factor's values are very
    unequally frequent: classes weigh alike in the fit, and rows in the loss.

    The factors of dSprites as codes score InfoM 0.997, InfoC 0.997 and InfoE 1.000: 10 neighbours find a
    little information between independent factors. Codes of pure noise that are wide enough to be active lower InfoM.

    Cost is O(n log n) for each code and factor, and O(n d C) for each factor of C values and iteration of its logistic
    regression, which is most of it: of a large dataset take a sample, 10,000 rows as is common. The fit is ours, with
    SciPy's optimiser, because scikit-learn's takes most of the time there.

    References
    ----------
    .. [1] K. Hsu, W. Dorrell, J. C. R. Whittington, J. Wu, C. Finn. Disentanglement via Latent Quantization. NeurIPS
       2023.
    .. [2] B. C. Ross. Mutual Information between Discrete and Continuous Data Sets. PLoS ONE 2014.
    """
    codes = with_headroom(as_codes(codes))
    factors = as_factors(factors, len(codes))
    if constants not in CONSTANTS:
        raise ValueError(f"constants must be {' or '.join(map(repr, CONSTANTS))}, got {constants!r}")
    neighbours = as_count(CONSTANTS[constants][0] if neighbours is None else neighbours, "neighbours")
    share = CONSTANTS[constants][1] if prune_fraction is None else prune_fraction
    if not 0 <= share < 1:
        raise ValueError(f"prune_fraction must be at least 0 and below 1, got {share}")
    noise = _noise(as_seed(seed), len(codes))

    width = np.ptp(codes, axis=0)
    active = np.flatnonzero(width > width.max() * share)
    deviations, largest = centred(codes)  # [d, n]
    varies = largest > 0
    deviations[varies] /= np.sqrt(np.square(deviations[varies]).mean(axis=1, keepdims=True))

    classes, sizes, _ = dense_classes(factors)
    mutual = neighbour_information(deviations + 1e-10 * noise, classes, neighbours)
    mutual[~varies] = 0.0
    normalized = mutual / np.array([_entropy(column) for column in classes])
    infom = _concentration(normalized[active])
    infoc = _concentration(normalized[active].T)
    explained = _explained(deviations.T, classes, sizes)
    infoe = float(explained.mean())
    return InfoMECResult((infom + infoe + infoc) / 3, infom, infoe, infoc, mutual, normalized, explained, active)


def _noise(seed: int, n: int) -> np.ndarray:
    """Return standard normal noise [n], for every code the same: scikit-learn's, which is asked for one at a time."""
    words = seed if seed < 2**32 else [seed % 2**32, seed >> 32]
    return np.random.RandomState(words).standard_normal(n)


def _concentration(information: np.ndarray) -> float:
    """Return the mean over rows [a, b] of the largest entry's share of its row, from 0 where even to 1 where all."""
    rows, columns = information.shape
    if rows == 0 or columns == 0:
        return 0.0
    total = information.sum(axis=1)
    if columns == 1:
        return float(np.mean(total > 0))
    even = 1 / columns
    share = np.divide(information.max(axis=1), total, out=np.full(rows, even), where=total > 0)
    return float((share.mean() - even) / (1 - even))


def _entropy(column: np.ndarray) -> float:
    share = np.bincount(column) / len(column)
    return float(-np.sum(share * np.log(share)))


def _explained(codes: np.ndarray, classes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the share of each factor's log loss that logistic regression on all codes removes, [K]."""
    threads = torch.get_num_threads()

    def explain(k: int) -> float:
        model = LogisticRegression(balanced=True).fit(codes, classes[k], threads=max(1, threads // len(classes)))
        # Balanced weights make all values equally likely where codes say nothing.
        return 1.0 - model.log_loss(codes, classes[k]) / np.log(sizes[k])

    # Factors side by side, the costly ones first, so that none is left to run alone at the end.
    order = np.argsort(-sizes, kind="stable")
    explained = np.empty(len(classes))
    with serial_blas(), ThreadPoolExecutor(min(threads, len(classes))) as pool:
        explained[order] = list(pool.map(explain, order))
    return explained
