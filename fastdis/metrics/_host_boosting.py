"""Gradient boosting of one factor: compiled, or by scikit-learn where nothing was compiled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastdis.ops._backends import extension

ROUNDS = 100
DEPTH = 3
RATE = 0.1


@dataclass(frozen=True, eq=False)
class Boosted:
    """What boosting found.

    Attributes
    ----------
    importance : ndarray of float64, [d]
        Shares of the squared error that splits on each code explained, all 0 where nothing was split.
    predicted, test_predicted : ndarray of int64, [n] and [m]
        The likeliest class of each row.
    """

    importance: np.ndarray
    predicted: np.ndarray
    test_predicted: np.ndarray


def boost(
    codes: np.ndarray, classes: np.ndarray, size: int, test_codes: np.ndarray, *, bins: int, seed: int, threads: int
) -> Boosted:
    """Fit float32 codes [n, d] to int32 classes [n], which are 0 to ``size - 1``; predict them and the test codes.

    Splits are exact where ``bins`` is 0, and else between that many bins of each code. The seed, below 2**64, chooses
    between splits equally good.
    """
    if extension is None:
        return boost_sklearn(codes, classes, size, test_codes, bins=bins, seed=seed)
    importance, scores, test_scores = extension.boost(
        codes, classes, size, test_codes, ROUNDS, DEPTH, bins, RATE, seed, threads
    )
    return Boosted(importance, _likeliest(scores), _likeliest(test_scores))


def boost_sklearn(
    codes: np.ndarray, classes: np.ndarray, size: int, test_codes: np.ndarray, *, bins: int, seed: int
) -> Boosted:
    """Return what :func:`boost` returns, but for the choice between equal splits."""
    try:
        from sklearn.ensemble import GradientBoostingClassifier
    except ImportError as error:
        raise ImportError(
            "where fastdis is not compiled, gradient boosting needs scikit-learn: pip install 'fastdis[metrics]'"
        ) from error
    if bins:
        inner = [_bin_edges(column, bins) for column in codes.T]
        codes, test_codes = (
            np.stack([np.searchsorted(edges, column) for edges, column in zip(inner, rows.T, strict=True)], axis=1)
            for rows in (codes, test_codes)
        )
    model = GradientBoostingClassifier(
        n_estimators=ROUNDS, max_depth=DEPTH, learning_rate=RATE, random_state=seed % 2**32
    ).fit(codes, classes)
    importance = np.nan_to_num(model.feature_importances_)
    return Boosted(importance, model.predict(codes), model.predict(test_codes))


def _likeliest(scores: np.ndarray) -> np.ndarray:
    """Return the class of the highest score, or of the sign of the only one, [trees, n] -> [n]."""
    return (scores[0] >= 0).astype(np.int64) if len(scores) == 1 else scores.argmax(axis=0)


def _bin_edges(column: np.ndarray, bins: int) -> np.ndarray:
    """Return the edges between bins of about as many rows each, or one bin for each value where those suffice."""
    column = np.sort(column)
    ends = np.flatnonzero(column[1:] > column[:-1] + np.float32(1e-7))
    edges, bin_ = [], 0
    for i in ends + 1:
        if (len(ends) < bins or i * bins >= (bin_ + 1) * len(column)) and bin_ + 1 < bins:
            edges.append(float(column[i - 1]) / 2 + float(column[i]) / 2)
            bin_ += 1
    return np.array(edges)
