"""BetaVAE score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdis.metrics._centred import with_headroom
from fastdis.metrics._host_votes import groups_of, paired_differences
from fastdis.metrics._inputs import as_codes, as_count, as_factors, as_seed
from fastdis.metrics._logistic import LogisticRegression, serial_blas
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class BetaVAEResult(Result):
    """What :func:`beta_vae` found.

    Attributes
    ----------
    score : float
        Share of test votes whose factor the classifier names, in [0, 1]. Chance is 1 / K.
    train_accuracy : float
        The same of the votes that it was fitted to.
    confusion : ndarray of int64, [K, K]
        Test votes by factor (rows) and by the factor named (columns).
    """

    train_accuracy: float
    confusion: np.ndarray


def beta_vae(
    codes: np.ndarray | Tensor,
    factors: np.ndarray | Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    train: int = 10_000,
    test: int = 5_000,
) -> BetaVAEResult:
    r"""Measure how well a linear classifier tells which factor pairs of images have in common.

    A vote draws a factor k, then L pairs of images that agree in it and are otherwise independent, and averages how
    far their codes lie apart:

    .. math:: x = \frac1L \sum_{l=1}^{L} |z_{1,l} - z_{2,l}| \in \mathbb{R}^d

    Multinomial logistic regression learns to name k from x on some votes, and its accuracy on others is the score [1]_.
    Settings are those of the common study [2]_: C = 1, at most 100 iterations of L-BFGS.

    Parameters
    ----------
    codes : real, [n, d]
        Of all images of a dataset, or of a large sample of it.
    factors : integer, [n, K]
        The factors the images were made from, two or more. Any integers: only which are equal matters.
    seed : int, optional
        From 0 to 2**63 - 1. The same seed gives the same result, with any number of threads.
    batch_size : int, optional
        L, the pairs of a vote.
    train, test : int, optional
        Votes that the classifier is fitted to, and others that it is scored on.

    Returns
    -------
    BetaVAEResult
        The score and what it was computed from.

    Raises
    ------
    TypeError
        Codes are not real numbers, or factors, ``seed`` or a count not integers.
    ValueError
        Shapes do not fit, a code is NaN or infinite, a factor never varies, there is one factor only (any code would
        score 1), or a count or the seed is out of range.
    ImportError
        SciPy is missing.

    Notes
    -----
    Images are not encoded here but looked up, which is exact for encoders that give an image one code. A pair is one
    value of factor k, each as likely, then two rows that have it, drawn with replacement. On a complete grid of
    factors this is the study's protocol. On a sample the values of the factor drawn count alike however often they
    occur, and all other factors are as frequent, and as dependent, as they are in the sample.

    A code that holds each factor in a number of its own scores 1; so does any invertible linear mixture whose
    differences a linear classifier can tell apart, and codes with several numbers for one factor. The score therefore
    saturates early. The penalty acts on codes as they come: very small codes are fitted less.

    The penalty and the classifier are those of scikit-learn's ``LogisticRegression`` since 0.22; before that it fitted
    one classifier to each class, which scores differently. The fit is ours because the reference spends most of its
    time in it.

    Cost is O((train + test) L d) reads at random places, and memory 4 K bytes a row beside the codes in float64.

    References
    ----------
    .. [1] I. Higgins et al. beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework. ICLR
       2017, section 3.
    .. [2] F. Locatello et al. Challenging Common Assumptions in the Unsupervised Learning of Disentangled
       Representations. ICML 2019.
    """
    codes = with_headroom(as_codes(codes))
    factors = as_factors(factors, len(codes))
    K = factors.shape[1]
    if K == 1:
        raise ValueError("factors must have at least 2 columns for the BetaVAE score: with one, any code scores 1")
    seed, pairs = as_seed(seed), as_count(batch_size, "batch_size")
    train, test = as_count(train, "train"), as_count(test, "test")

    differences, factor = paired_differences(codes, groups_of(factors), seed, train + test, pairs)
    with serial_blas():
        classifier = LogisticRegression(penalty=1.0).fit(
            differences[:train], factor[:train], threads=torch.get_num_threads()
        )
        named = classifier.predict(differences)
    confusion = np.bincount(factor[train:] * K + named[train:], minlength=K * K).reshape(K, K)
    right = named == factor
    return BetaVAEResult(float(right[train:].mean()), float(right[:train].mean()), confusion)
