"""Hessian eigenmaps and local tangent space alignment."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import assert_all_finite
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from fastdis.spectral._arrays import like, on_device, restorer, to_array
from fastdis.spectral._host import alignment
from fastdis.spectral._neighbours import ApproximateSearch, NeighbourSearch
from fastdis.spectral._null_space import null_space

SEARCHES: dict[str, type[NeighbourSearch]] = {"exact": NeighbourSearch, "approximate": ApproximateSearch}
LEAST_NEIGHBOURS = 15
INDEPENDENT = 1e-10  # of the largest eigenvalue of a local Gram matrix: below it a direction is rounding


class HessianEigenmap(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Coordinates of a manifold that is locally isometric to an open, connected part of :math:`\mathbb{R}^d`.

    Functions whose Hessian vanishes in every neighbourhood are the affine functions of such coordinates [1]_: the null
    space of

    .. math:: M = \sum_i S_i^\top P_i S_i

    where :math:`S_i` picks the k nearest neighbours of point i and :math:`P_i` projects onto what the Hessian sees of
    a function on them. Coordinates come out up to an invertible linear map, which independent component analysis
    removes: :class:`SpectralDisentangler`.

    Parameters
    ----------
    n_components : int, optional
        d, the dimension of the manifold.
    n_neighbors : int, optional
        k, without the point itself. At least d + 2 for ``"ltsa"`` and 1 + d + d (d + 1) / 2 for ``"hlle"``. By default
        a third more than the latter and not below 15, or n - 1; and more where these do not connect all points.
    mode : {"hlle", "ltsa"}, optional
        What is projected onto. ``"hlle"``: the products of pairs of tangent coordinates, made orthogonal to constants
        and to the coordinates: Hessian locally linear embedding [1]_. ``"ltsa"``: all that constants and coordinates
        leave: local tangent space alignment [2]_. That is also what scikit-learn's ``method="hessian"`` computes, as it
        keeps the complement of the basis beside the Hessian's part.
    neighbors_algorithm : {"exact", "approximate"}, optional
        How neighbours are found. ``"exact"`` compares all pairs of points in up to 128 dimensions, which takes minutes
        from 100,000 points on; ``"approximate"`` needs the extra ``neighbors`` (faiss) and misses a few.

    Attributes
    ----------
    embedding_ : ndarray of float64, [n, d]
        Coordinates of the points fitted: uncorrelated, of mean 0 and variance 1, the smoothest first.
    eigenvalues_ : ndarray of float64, [d + 1]
        Of M, but for that of constants. A manifold that is flat and of the dimension given has d that are much smaller
        than the last, of which this is an upper bound.
    n_neighbors_ : int
        k.
    n_features_in_ : int
        D.

    Notes
    -----
    Points may be NumPy arrays or tensors, [n, D], in any real dtype. Distances and local Gram matrices are made of
    differences in the points' own precision (float32 at least), added up in float64; all after that is float64, because
    the eigenvalues wanted are a part in 1e8 of others. Memory is O(n k^2), and that of a factor of M.

    Points in a CUDA tensor stay on their device, in a fitted estimator too: there their neighbours, local Gram
    matrices, tangent coordinates and the Hessian's bases are computed, and M is factored if n is at most 20,000. M
    itself, the graph and coordinates are the host's, and so is all that ``"approximate"`` finds neighbours for. The
    device's part has been tested on CPU tensors only.

    References
    ----------
    .. [1] D. L. Donoho, C. Grimes. Hessian eigenmaps: locally linear embedding techniques for high-dimensional data.
       PNAS 2003.
    .. [2] Z. Zhang, H. Zha. Principal manifolds and nonlinear dimensionality reduction via tangent space alignment.
       SIAM Journal on Scientific Computing 2004.
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        n_neighbors: int | None = None,
        mode: Literal["hlle", "ltsa"] = "hlle",
        neighbors_algorithm: Literal["exact", "approximate"] = "exact",
    ) -> None:
        self.n_components = n_components
        self.n_neighbors = n_neighbors
        self.mode = mode
        self.neighbors_algorithm = neighbors_algorithm

    def fit(self, X: Any, y: object = None) -> HessianEigenmap:
        """Find the coordinates of points.

        Parameters
        ----------
        X : array or tensor, [n, D]
            Finite. Most rows must be distinct.
        y : object, optional
            Ignored.

        Returns
        -------
        HessianEigenmap
            Itself.

        Raises
        ------
        ValueError
            A number is NaN or infinite; ``n_components`` or ``n_neighbors`` do not suit each other or n; too
            many rows are equal; the graph of ``n_neighbors`` is not connected; or a neighbourhood spans fewer than d
            directions.
        """
        self._fit(X)
        return self

    def fit_transform(self, X: Any, y: object = None) -> Any:
        """Find the coordinates of points and return them, [n, d], as what was given: an array or a tensor.

        Parameters
        ----------
        X : array or tensor, [n, D]
            As for :meth:`fit`.
        y : object, optional
            Ignored.

        Returns
        -------
        array or tensor, [n, d]
            ``embedding_``.
        """
        self._fit(X)
        return restorer(X)(self.embedding_)

    def transform(self, X: Any) -> Any:
        """Return coordinates of other points.

        Each is placed by the affine map that fits the coordinates of its k nearest neighbours best as a function of
        their tangent coordinates. A point that was fitted gets the coordinates that it has.

        Parameters
        ----------
        X : array or tensor, [m, D]
            Finite.

        Returns
        -------
        array or tensor, [m, d]
            What was given: an array or a tensor.
        """
        check_is_fitted(self)
        points, numerics = self._search.points, self._search.numerics
        queries = _rescaled(like(self._validated(X, reset=False), points), self._exponent)
        k, d = self.n_neighbors_, self.n_components
        neighbours, squares = self._search.nearest(k, queries)
        grams = numerics.local_grams(points, neighbours)
        vectors, values = map(to_array, numerics.leading_vectors(grams, d))
        # Products of the query with its neighbours, less their mean, from distances alone.
        lengths = to_array(grams.diagonal(0, 1, 2))
        products = 0.5 * (lengths - squares - (lengths - squares).mean(axis=1, keepdims=True))
        coordinates = self.embedding_[neighbours]
        share = np.einsum("mkd,mk->md", vectors, products)
        # A direction in which neighbours do not lie apart says nothing.
        spread = values[:, :d] > INDEPENDENT * values[:, :1]
        share = np.divide(share, values[:, :d], out=np.zeros_like(share), where=spread)
        placed = coordinates.mean(axis=1) + np.einsum("md,mkd,mkc->mc", share, vectors, coordinates, optimize=True)
        known = squares[:, 0] == 0
        placed[known] = self.embedding_[neighbours[known, 0]]
        return restorer(X)(placed)

    def score(self, X: Any, y: Any) -> float:
        """Return how well affine functions of the coordinates explain true ones: mean R^2, at most 1.

        Parameters
        ----------
        X : array or tensor, [m, D]
            Points.
        y : array or tensor, [m] or [m, K]
            True coordinates of them.

        Returns
        -------
        float
            The coefficient of determination of a linear regression, its mean over columns of ``y``.
        """
        from sklearn.linear_model import LinearRegression

        coordinates, truth = to_array(self.transform(X)), to_array(y)
        return float(LinearRegression().fit(coordinates, truth).score(coordinates, truth))

    def _fit(self, X: Any) -> None:
        X = self._validated(X, reset=True)
        n, d = len(X), self._dimensions(X.shape[1])
        self._exponent = -int(np.frexp(float(_largest(X)))[1])
        search = SEARCHES[self.neighbors_algorithm](_rescaled(X, self._exponent))
        neighbours = self._connected(search, self._neighbours(n, d))
        k = neighbours.shape[1]

        points, numerics = search.points, search.numerics
        frames, values = numerics.leading_vectors(numerics.local_grams(points, neighbours), d)
        values = to_array(values)
        flat = np.flatnonzero(values[:, d - 1] <= INDEPENDENT * values[:, 0])
        if len(flat):
            raise ValueError(
                f"X: the {k} neighbours of row {flat[0]} span fewer than n_components={d} directions, and so do those "
                f"of {len(flat) - 1} other rows"
            )
        if self.mode == "hlle":
            bases, full = map(to_array, numerics.hessian_bases(frames))
            if not full.all():
                raise ValueError(
                    f"X: products of the tangent coordinates of the {k} neighbours of row {np.argmin(full)} are not "
                    "independent: they lie on a conic; more neighbours are needed"
                )
        else:
            bases = np.concatenate([np.full((n, k, 1), k**-0.5), to_array(frames)], axis=2)
        from scipy.sparse import csr_array

        starts, columns, entries = alignment(neighbours, bases, n, complement=self.mode == "ltsa")
        matrix = csr_array((entries, columns, starts), shape=(n, n))
        smooth, self.eigenvalues_ = null_space(matrix, d, points.device if isinstance(points, Tensor) else None)
        self._search, self.n_neighbors_ = search, k
        self.embedding_ = smooth * n**0.5
        self._n_features_out = d

    def _validated(self, X: Any, *, reset: bool) -> Any:
        """Return points, finite float32 or float64 [n, D]: a tensor where one is computed with on its device."""
        options = {
            "reset": reset,
            "dtype": [np.float64, np.float32],
            "order": "C",
            "ensure_min_samples": 2 if reset else 1,
        }
        if not on_device(X):
            return validate_data(self, to_array(X), **options)
        # Two rows show all that scikit-learn asks of points, but that the others are finite.
        validate_data(self, to_array(X[:2] if X.numel() else X), **options)
        points = X.detach().to(X.dtype if X.dtype == torch.float64 else torch.float32).contiguous()
        assert_all_finite(to_array(_largest(points)), estimator_name=type(self).__name__, input_name="X")
        return points

    def _connected(self, search: NeighbourSearch, k: int) -> np.ndarray:
        """Return the neighbours of every point; by default as many as connect all."""
        n, first = len(search.points), k
        neighbours, crowded = search.graph(k)
        _refuse_equal(search, neighbours, np.flatnonzero(crowded))
        parts = shown = _parts(neighbours)
        while len(parts) > 1:
            sizes = ", ".join(map(str, shown[:10])) + (", ..." if len(shown) > 10 else "")
            fallen = f"X: the graph of n_neighbors={first} falls into {len(shown)} parts of {sizes} points"
            if self.n_neighbors is not None:
                raise ValueError(f"{fallen}; take more neighbours, or fit the parts one by one")
            k = min(n - 1, 2 * k)
            neighbours, _ = search.graph(k)
            parts = _parts(neighbours)
            if len(parts) == 1:
                warnings.warn(
                    f"{fallen}: {k} were taken, which connect them, but parts that lie far apart have no common "
                    "coordinates",
                    stacklevel=4,
                )
        return neighbours

    def _dimensions(self, D: int) -> int:
        d = self.n_components
        if not isinstance(d, int | np.integer) or d < 1:
            raise ValueError(f"n_components must be a whole number from 1, got {d!r}")
        if self.mode not in ("hlle", "ltsa"):
            raise ValueError(f"mode must be 'hlle' or 'ltsa', got {self.mode!r}")
        if self.neighbors_algorithm not in SEARCHES:
            raise ValueError(f"neighbors_algorithm must be 'exact' or 'approximate', got {self.neighbors_algorithm!r}")
        if d > D:
            raise ValueError(f"n_components must be at most the number of features, {D}, got {d}")
        return int(d)

    def _neighbours(self, n: int, d: int) -> int:
        products = 1 + d + d * (d + 1) // 2
        least = products if self.mode == "hlle" else d + 2
        k = self.n_neighbors
        if k is None:
            k = max(least, min(n - 1, max(LEAST_NEIGHBOURS, -(-4 * products // 3))))
        if not isinstance(k, int | np.integer) or k < least:
            raise ValueError(
                f"n_neighbors must be a whole number from {least} for n_components={d} and mode={self.mode!r}, "
                f"got {k!r}"
            )
        if n <= k:
            raise ValueError(f"X must have more rows than n_neighbors={k}, got n_samples = {n}")
        return int(k)


def _largest(points: Any) -> Any:
    """Return the size of the largest number; NaN if there is one."""
    return max(-points.min(), points.max())


def _rescaled(points: Any, exponent: int) -> Any:
    """Return points times a power of two, where their squares could leave the range of their type; else as they are."""
    if abs(exponent) <= 40:
        return points
    half = exponent // 2  # as the power itself may be out of that range
    return points * 2.0**half * 2.0 ** (exponent - half)


def _refuse_equal(search: NeighbourSearch, neighbours: np.ndarray, crowded: np.ndarray) -> None:
    """Refuse rows that have so many equal ones that these hide the manifold; a few do no harm."""
    points, near = search.points, neighbours[crowded]
    squares = np.sort(to_array(search.numerics.squared_distances(points, points[crowded], near)), axis=1)
    equal = np.flatnonzero(squares[:, squares.shape[1] // 2] == 0)
    if len(equal):
        row = crowded[equal[0]]
        others = neighbours[row][to_array((points[neighbours[row]] == points[row]).all(1))]
        raise ValueError(
            f"X must have distinct rows: more than half of the {neighbours.shape[1]} neighbours of row {row} equal "
            f"it, such as row {others[0]}, and so it is with {len(equal) - 1} other rows"
        )


def _parts(neighbours: np.ndarray) -> list[int]:
    """Return how many points each part of the graph of neighbours has, the largest first."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    n, k = neighbours.shape
    graph = csr_array((np.ones(n * k, np.int8), neighbours.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    return np.sort(np.bincount(connected_components(graph, directed=False)[1]))[::-1].tolist()
