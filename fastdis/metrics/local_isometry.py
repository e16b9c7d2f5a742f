"""How nearly codes keep the distances between neighbouring points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from torch import Tensor

from fastdis.metrics._centred import centred
from fastdis.metrics._inputs import _check_rows, as_codes, as_count, as_reals
from fastdis.metrics.result import Result


@dataclass(frozen=True, eq=False)
class LocalIsometryResult(Result):
    r"""What :func:`local_isometry` found.

    Attributes
    ----------
    score : float
        One less the mean squared deviation of ``ratios`` from 1, in [0, 1].
    scales : ndarray of float64, [d]
        How long a unit of each code is in data space, :math:`\sqrt{w_c}` at the best fit; 0 for a code that never
        changes, or, with a scale for each, that the fit is best without.
    ratios : ndarray of float64, [n, k]
        Squared distance of every point and each of its neighbours by the codes, so scaled, over that by the points,
        :math:`q_{ij}`; NaN for a neighbour that equals the point.
    """

    scales: np.ndarray
    ratios: np.ndarray


def local_isometry(
    codes: np.ndarray | Tensor,
    points: np.ndarray | Tensor,
    *,
    n_neighbors: int = 10,
    scales: Literal["each", "one"] = "each",
) -> LocalIsometryResult:
    r"""Measure how nearly codes keep the distances between neighbouring points.

    .. math::
        q_{ij} = \sum_c w_c \frac{(z_{ic} - z_{jc})^2}{\lVert x_i - x_j \rVert^2}, \quad
        \mathrm{score} = 1 - \min_{w \ge 0} \operatorname*{mean}_{i,\, j \in N_k(i)} (1 - q_{ij})^2

    where :math:`N_k(i)` are the k points nearest to :math:`x_i`. No factors are needed.

    The definition is ours. Horan, Richardson and Weiss [1]_ show that factors can be told without supervision where the
    data are locally isometric to them, and report a local isometry score of real encoders; how that score is defined
    is not public, so values of this one must not be compared with theirs.

    Parameters
    ----------
    codes : real, [n, d]
        What an encoder made of n points, usually the posterior means; or the true factors, to ask how far from locally
        isometric the data are.
    points : real, [n, ...]
        The points, such as images [n, C, H, W]. Their distances are Euclidean, over all their numbers.
    n_neighbors : int, optional
        How many neighbours of each point, k: from 1 to n - 1.
    scales : {"each", "one"}, optional
        Whether each code may be in a unit of its own, its :math:`w_c` found by non-negative least squares, or all are
        in one, :math:`w_c = w`, found by least squares.

    Returns
    -------
    LocalIsometryResult
        The score and what it was computed from. Where no code changes between neighbours the score is 0. The scales of
        codes that are collinear are not unique; the score and the ratios are.

    Raises
    ------
    TypeError
        Codes or points are not real numbers, or ``n_neighbors`` is not a whole number.
    ValueError
        Shapes do not fit, there are fewer than two rows, a code or point is NaN or infinite, all neighbours are equal
        points, ``n_neighbors`` is out of range, or ``scales`` is unknown.
    ImportError
        scikit-learn or SciPy is missing.

    Notes
    -----
    The score is 1 exactly where codes are, over all pairs of neighbours, an isometry up to a scale of each code (or one
    scale of all). It is never below 0, which :math:`w = 0` gives. At the best w it equals the mean of the ratios,
    as residuals of least squares are orthogonal to the fit.

    Codes of pure noise do not score 0: what counts is how constant the ratios are, and a sum over many codes is nearly
    constant by itself. Independent normal codes of one variance score about :math:`d / (d + 2)` where all distances of
    neighbours are alike. Compare encoders of as many codes.

    Too few points for the curvature of the data make neighbours distant, and the best codes score below 1. Neighbours
    that are equal points are left out of the mean, and so are those closer than about 1e-160 of the largest number.
    :math:`O(n^2 D)` for D numbers in a point, less where D is small, and :math:`O(n k d^2)`.

    References
    ----------
    .. [1] D. Horan, E. Richardson, Y. Weiss. When Is Unsupervised Disentanglement Possible? NeurIPS 2021.
    """
    try:
        from scipy.optimize import nnls
        from sklearn.neighbors import NearestNeighbors
    except ImportError as error:
        raise ImportError("local_isometry needs scikit-learn and SciPy: pip install 'fastdis[metrics]'") from error
    if scales not in ("each", "one"):
        raise ValueError(f"scales must be 'each' or 'one', got {scales!r}")
    values = as_codes(codes)
    n = len(values)
    if n < 2:
        raise ValueError(f"codes must have at least two rows, got {n}")
    places = _as_points(points, n)
    k = as_count(n_neighbors, "n_neighbors", most=n - 1)

    # By a power of two, which costs no digits.
    exponent = int(np.frexp(max(places.max(), -places.min()))[1])
    np.ldexp(places, -exponent, out=places)
    # The search multiplies points out: beside a common offset it would lose their distances.
    search = NearestNeighbors(n_neighbors=k).fit(places - places.mean(axis=0))
    neighbours = search.kneighbors(return_distance=False)
    distances = _distances(places, neighbours)
    apart = distances > 0
    if not apart.any():
        raise ValueError("points must not all equal their neighbours: no distance is left to compare the codes with")

    deviations, largest = centred(values)
    unit = np.where(largest > 0, largest if scales == "each" else largest.max(), 1.0)
    rows = (deviations * (largest / unit)[:, None]).T
    slopes = np.abs(rows[:, None] - rows[neighbours])[apart] / distances[apart, None]
    # In units of the steepest, squares neither overflow nor vanish.
    steepest = slopes.max(axis=0) if scales == "each" else np.full(slopes.shape[1], slopes.max())
    steepest[steepest == 0] = 1.0
    squares = np.square(slopes / steepest)
    weights = _fit(squares if scales == "each" else squares.sum(axis=1, keepdims=True), nnls)
    weights = np.where(largest > 0, weights, 0.0)

    ratios = np.full((n, k), np.nan)
    ratios[apart] = squares @ weights
    score = max(1 - float(np.square(1 - ratios[apart]).mean()), 0.0)
    with np.errstate(over="ignore"):  # a length that is beyond double precision is infinite
        lengths = np.ldexp(np.sqrt(weights) / steepest / unit, exponent)
    return LocalIsometryResult(score, lengths, ratios)


def _fit(squares: np.ndarray, nnls: Callable[..., tuple[np.ndarray, float]]) -> np.ndarray:
    """Return weights from 0 that bring sums over columns [m, d] as near as can be to 1; 0 for a column of zeros."""
    # Columns of length 1 are what the solver's tolerance is made for.
    norms = np.sqrt(np.square(squares).sum(axis=0))
    norms[norms == 0] = 1.0
    # The triangle has the same least squares, in d + 1 rows.
    table = np.column_stack([squares / norms, np.ones(len(squares))])
    triangle = cast(np.ndarray, np.linalg.qr(table, mode="r"))  # NumPy's types know no modes
    return nnls(triangle[:, :-1], triangle[:, -1])[0] / norms


def _distances(points: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Return the distance of each point [n, D] and each of its neighbours [n, k] by number, [n, k]."""
    # The search's own are multiplied out, which costs near points half of their digits. Some million numbers at a time.
    step = max(1, 2**22 // (neighbours.shape[1] * points.shape[1]))
    distances = np.empty(neighbours.shape)
    for start in range(0, len(points), step):
        part = slice(start, start + step)
        differences = points[part, None] - points[neighbours[part]]
        distances[part] = np.sqrt(np.square(differences, out=differences).sum(axis=-1))
    return distances


def _as_points(points: np.ndarray | Tensor, n: int) -> np.ndarray:
    """Return points as float64 [n, D], refusing what is not finite, has no numbers, or does not fit ``n`` codes."""
    array = as_reals(points, "points")
    if array.ndim < 2 or 0 in array.shape[1:]:
        raise ValueError(f"points must have shape [n, ...] with at least one number each, got {list(array.shape)}")
    _check_rows(array, n, "points", "codes")
    flat = array.reshape(n, -1)
    finite = np.isfinite(flat).all(axis=1)
    if not finite.all():
        # One row, where as_codes would name columns: an image has thousands.
        raise ValueError(f"points must be finite, and hold NaN or infinity in row {finite.argmin()}")
    return flat.astype(np.float64)
