"""Votes of the BetaVAE and FactorVAE scores: compiled, or the same in NumPy where nothing was compiled.

Every random number is a function of (seed, vote, draw), so that the same rows are drawn by both, and by any number of
threads. A vote owns blocks of four words of Philox4x32-10 [1]_: counter (block, attempt, vote, vote's high half), key
seed. A word becomes a number below ``range`` by Lemire's multiplication [2]_; a word that would bias it is replaced by
the same word of the next attempt. Block 0 draws the factor (and FactorVAE's value), the blocks from 1 on the rows.

References
----------
.. [1] J. K. Salmon et al. Parallel random numbers: as easy as 1, 2, 3. SC 2011.
.. [2] D. Lemire. Fast random integer generation in an interval. ACM TOMACS 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastdis.metrics._host import dense_classes, group_rows
from fastdis.ops._backends import extension


@dataclass(frozen=True)
class Groups:
    """The rows of a table by the values of each factor.

    The rows with value v of factor k are ``rows[k, starts[first[k] + v] : starts[first[k] + v + 1]]``.

    Attributes
    ----------
    rows : ndarray of uint32, [K, n]
        All rows, sorted by the value of factor k.
    starts : ndarray of int64
        For each factor one more than it has values: from 0 to n.
    first : ndarray of int64, [K + 1]
        Where in ``starts`` each factor begins.
    """

    rows: np.ndarray
    starts: np.ndarray
    first: np.ndarray


def groups_of(factors: np.ndarray) -> Groups:
    """Group the rows of factors [n, K] by their values."""
    if len(factors) >= 2**31:
        raise ValueError(f"factors must have fewer than 2**31 rows, got {len(factors)}")
    classes, sizes, _ = dense_classes(factors)
    return Groups(*group_rows(classes, sizes), np.concatenate([[0], np.cumsum(sizes + 1)]))


def paired_differences(
    codes: np.ndarray, groups: Groups, seed: int, votes: int, pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each vote, the mean of abs(z - z') over pairs of rows that agree in a factor, and that factor.

    A pair is a value of the factor, each as likely, then two rows that have it. float64 [votes, d] and int32 [votes].
    """
    if extension is None:
        return paired_differences_numpy(codes, groups, seed, votes, pairs)
    return extension.paired_differences(
        codes, groups.rows, groups.starts, groups.first, seed, votes, pairs, torch.get_num_threads()
    )


def paired_differences_numpy(
    codes: np.ndarray, groups: Groups, seed: int, votes: int, pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what :func:`paired_differences` returns."""
    numbers = np.arange(votes, dtype=np.uint64)
    factor = below(np.full(votes, len(groups.rows)), seed, numbers, 0, 0)
    differences = np.zeros((votes, codes.shape[1]))
    for pair in range(pairs):
        value = below(np.diff(groups.first)[factor] - 1, seed, numbers, 1 + pair, 0)
        start, size = _extent(groups, factor, value)
        one, other = (groups.rows[factor, start + below(size, seed, numbers, 1 + pair, word)] for word in (1, 2))
        differences += np.abs(codes[one] - codes[other])
    return differences / pairs, factor.astype(np.int32)


def least_varying_codes(
    codes: np.ndarray, groups: Groups, variances: np.ndarray, active: np.ndarray, seed: int, votes: int, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each vote, which active code varies least over rows with one value of a factor, and that factor.

    A code's variance counts relative to its own in ``variances`` [d]; of equals the first is taken. Both int32 [votes].
    """
    if extension is None:
        return least_varying_codes_numpy(codes, groups, variances, active, seed, votes, samples)
    return extension.least_varying_codes(
        codes, groups.rows, groups.starts, groups.first, variances, active, seed, votes, samples,
        torch.get_num_threads(),
    )  # fmt: skip


def least_varying_codes_numpy(
    codes: np.ndarray, groups: Groups, variances: np.ndarray, active: np.ndarray, seed: int, votes: int, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what :func:`least_varying_codes` returns."""
    numbers = np.arange(votes, dtype=np.uint64)
    factor = below(np.full(votes, len(groups.rows)), seed, numbers, 0, 0)
    value = below(np.diff(groups.first)[factor] - 1, seed, numbers, 0, 1)
    start, size = _extent(groups, factor, value)
    rows = np.empty((samples, votes), np.uint32)
    for i in range(samples):
        rows[i] = groups.rows[factor, start + below(size, seed, numbers, 1 + i // 4, i % 4)]
    least = np.empty(votes, np.int32)
    for vote, drawn in enumerate(rows.T):
        deviations = codes[drawn] - codes[drawn[0]]
        deviations -= deviations.mean(axis=0)
        variance = np.square(deviations).sum(axis=0) / (samples - 1)
        least[vote] = active[np.argmin(variance[active] / variances[active])]
    return least, factor.astype(np.int32)


def below(limits: np.ndarray, seed: int, votes: np.ndarray, block: int, word: int) -> np.ndarray:
    """Return for each vote a number from 0 to its limit - 1, each as likely: int64, the shape of ``votes``."""
    limits = limits.astype(np.uint64)
    drawn = np.empty(votes.shape, np.int64)
    missing = np.arange(votes.size)
    attempt = 0
    while missing.size:
        product = philox(seed, votes[missing], block, attempt)[word] * limits[missing]
        kept = product % 2**32 >= (2**32 - limits[missing]) % limits[missing]
        drawn[missing[kept]] = (product >> np.uint64(32))[kept]
        missing = missing[~kept]
        attempt += 1
    return drawn


def philox(seed: int, votes: np.ndarray, block: int, attempt: int) -> list[np.ndarray]:
    """Return the four 32-bit words of a block for each vote, as uint64."""
    low, half = np.uint64(2**32 - 1), np.uint64(32)
    counter = [
        np.full(votes.shape, block, np.uint64),
        np.full(votes.shape, attempt, np.uint64),
        votes & low,
        votes >> half,
    ]
    keys = seed & (2**32 - 1), seed >> 32
    for step in range(10):
        a, b = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        key = [np.uint64((key + step * weyl) % 2**32) for key, weyl in zip(keys, (0x9E3779B9, 0xBB67AE85), strict=True)]
        counter = [(b >> half) ^ counter[1] ^ key[0], b & low, (a >> half) ^ counter[3] ^ key[1], a & low]
    return counter


def _extent(groups: Groups, factor: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the rows with a value of a factor start, and how many there are."""
    at = groups.first[factor] + value
    return groups.starts[at], groups.starts[at + 1] - groups.starts[at]
