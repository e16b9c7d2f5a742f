"""FactorVAE score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdis.metrics._host_votes import below, groups_of, least_varying_codes
from fastdis.metrics._inputs import as_codes, as_count, as_factors, as_seed
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class FactorVAEResult(Result):
    """What :func:`factor_vae` found.

    Attributes
    ----------
    score : float
        Share of test votes whose factor the majority vote names, in [0, 1]. Chance is about 1 / K.
    train_accuracy : float
        The same of the votes that the majority was counted from.
    votes : ndarray of int64, [d, K]
        Those votes, by the code that varied least and by factor. Rows of codes that are not active are 0.
    variances : ndarray of float64, [d]
        Of every code.
    active : ndarray of int64
        The codes that vary enough to take part.
    """

    train_accuracy: float
    votes: np.ndarray
    variances: np.ndarray
    active: np.ndarray


def factor_vae(
    codes: np.ndarray | Tensor,
    factors: np.ndarray | Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    train_votes: int = 10_000,
    test_votes: int = 5_000,
    variance_samples: int | None = 10_000,
    prune: float = 0.05,
) -> FactorVAEResult:
    r"""Measure how well the code that varies least tells which factor was held fixed.

    A vote draws a factor k and a value of it, then L images with that value, and finds the code

    .. math:: d^* = \arg\min_d \mathrm{Var}_l(z_{l,d}) / s_d^2

    with :math:`s_d^2` the variance of code d over all images. Each code stands for the factor that it was found for
    most often, and the score is how often that is right for other votes [1]_.

    Parameters
    ----------
    codes : real, [n, d]
        Of all images of a dataset, or of a large sample of it.
    factors : integer, [n, K]
        The factors the images were made from, two or more. Any integers: only which are equal matters.
    seed : int, optional
        From 0 to 2**63 - 1. The same seed gives the same result, with any number of threads.
    batch_size : int, optional
        L, the images of a vote; at least 2.
    train_votes, test_votes : int, optional
        Votes that the majority is counted from, and others that it is scored on.
    variance_samples : int or None, optional
        How many rows, drawn with replacement, :math:`s_d^2` is estimated from; at least 2. None takes all rows, once.
    prune : float, optional
        Codes with a standard deviation :math:`s_d` below this take no part. The common study [2]_ says 0.05; its
        code's own default is 0. Codes that never change take no part in any case.

    Returns
    -------
    FactorVAEResult
        The score and what it was computed from. Where no code is active the score is 0.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors, ``seed`` or a count not integers.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies, there is one factor only (any code would
        score 1), or a count, ``prune`` or the seed is out of range.

    Notes
    -----
    Images are not encoded here but looked up, which is exact for encoders that give an image one code. Values of a
    factor are drawn each as likely, and then rows that have the value, with replacement. On a complete grid of
    factors this is the study's protocol. On a sample a rare value counts as much as a frequent one, and a value with
    one row gives every code variance 0, of which the first active code is taken.

    Variances have the divisor L - 1. Of codes that vary equally little the first is taken; a code that no vote was cast
    for stands for factor 0. A code that holds each factor in a number of its own scores 1, and so do codes with
    several numbers for one factor. ``prune`` is in units of the codes: what suits posterior means, whose prior has
    standard deviation 1, may drop codes of other scales.

    The reference numbers ``votes`` by active codes only, and divides 0 by 0 for constant codes unless it prunes.

    Cost is O((train_votes + test_votes) L d) reads at random places, and memory 4 K bytes a row beside the codes in
    float64.

    References
    ----------
    .. [1] H. Kim, A. Mnih. Disentangling by Factorising. ICML 2018, section 4.
    .. [2] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    codes = as_codes(codes)
    factors = as_factors(factors, len(codes))
    n, d = codes.shape
    K = factors.shape[1]
    if K == 1:
        raise ValueError("factors must have at least 2 columns for the FactorVAE score: with one, any code scores 1")
    seed, samples = as_seed(seed), as_count(batch_size, "batch_size", least=2)
    train, test = as_count(train_votes, "train_votes"), as_count(test_votes, "test_votes")
    if not prune >= 0:
        raise ValueError(f"prune must be a standard deviation from 0 on, got {prune}")

    drawn = codes
    if variance_samples is not None:
        count = as_count(variance_samples, "variance_samples", least=2)
        drawn = codes[below(np.full(count, n), seed, np.arange(count, dtype=np.uint64), _VARIANCE_BLOCK, 0)]
    # The largest code as a power of two: squares of what is much larger or smaller leave the range of float64.
    exponent = int(np.frexp(max(codes.max(), -codes.min()))[1])
    exponent = exponent if abs(exponent) > 400 else 0
    table: np.ndarray = np.ldexp(codes, -exponent) if exponent else codes
    drawn = np.ldexp(drawn, -exponent)
    variances = (drawn - drawn[0]).var(axis=0, ddof=1)
    spread = np.ldexp(np.sqrt(variances), exponent)
    active = np.flatnonzero((variances > 0) & (spread >= prune))
    with np.errstate(over="ignore"):
        found = np.minimum(np.square(spread), np.finfo(np.float64).max)
    if len(active) == 0:
        return FactorVAEResult(0.0, 0.0, np.zeros((d, K), np.int64), found, active)

    code, factor = least_varying_codes(table, groups_of(factors), variances, active, seed, train + test, samples)
    votes = np.bincount(code[:train] * K + factor[:train], minlength=d * K).reshape(d, K)
    right = votes.argmax(axis=1)[code] == factor
    return FactorVAEResult(float(right[train:].mean()), float(right[:train].mean()), votes, found, active)


# Rows of votes lie in the blocks from 1 on, and never come this far.
_VARIANCE_BLOCK = 2**32 - 1
