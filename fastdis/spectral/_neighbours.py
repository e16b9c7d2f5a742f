"""Nearest neighbours without all distances in all dimensions: exactly, or of points too many for that."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fastdis.spectral import _device, _host
from fastdis.spectral._arrays import to_array, to_tensor

PROJECTED = 128  # directions that candidates are found in
BLOCK_BYTES = 2**26  # of distances at a time


class NeighbourSearch:
    """Finds the nearest of points [n, D].

    Distances in few orthonormal directions are never longer than in all. So the nearest in those directions are
    candidates, their distances are computed in all dimensions, and where the k-th of these is not longer than what
    any other point has in the few directions already, no other point can be nearer. Elsewhere there are more
    candidates. The directions are those in which random mixtures of the points lie [1]_.

    Parameters
    ----------
    points : array or tensor of float32 or float64, [n, D]
        Finite. A tensor is searched on its device.

    References
    ----------
    .. [1] N. Halko, P. G. Martinsson, J. A. Tropp. Finding Structure with Randomness. SIAM Review 2011.
    """

    @_device.full_precision()
    def __init__(self, points: Any) -> None:
        self.points = points
        self.mean = to_tensor(points).mean(dim=0)
        n, D = points.shape
        self.directions = None
        if min(n, D) > 2 * PROJECTED:
            generator = torch.Generator().manual_seed(0)
            mixing = torch.randn(n, PROJECTED, generator=generator)
            mixing -= mixing.mean(dim=0)  # sums of deviations from the mean, without forming these
            mixtures = self._single(points).T @ self._single(mixing)
            self.directions = torch.linalg.qr(mixtures).Q
        self.low, self.beyond = self._project(points)
        self.squares = self.low.square().sum(dim=1)

    @property
    def numerics(self) -> ModuleType:
        """What computes with the points where they lie."""
        return _device if isinstance(self.points, torch.Tensor) else _host

    @_device.full_precision()
    def nearest(self, k: int, queries: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest points of each query, int64 [m, k], nearest first, and their squared distances.

        Of equally near ones the first come first. Without queries they are the points, and none is its own neighbour.
        Queries are what points are, an array or a tensor; results are arrays.
        """
        themselves = queries is None
        low = self.low if themselves else self._project(queries)[0]
        queries = self.points if themselves else queries
        found, apart = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
        for start, bounds, slack in self._blocks(low, themselves):
            part = slice(start, start + len(slack))
            rows = np.arange(len(slack))
            found[part], apart[part] = self._compare(k, queries[part], bounds, slack, rows, themselves)
        return found, apart

    @_device.full_precision()
    def graph(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest points of each point, int64 [n, k] in rising order, and where half of them may equal it.

        What a point has outside of the few directions bounds its distances from above too. Where such bounds tell the k
        nearest from all others, no distance in all dimensions is computed.
        """
        n = len(self.points)
        reach = to_array((self.beyond + self.beyond.max()).square())
        found, crowded = np.empty((n, k), np.int64), np.empty(n, bool)
        for start, bounds, slack in self._blocks(self.low, True):
            part = slice(start, start + len(slack))
            columns, values = map(to_array, self.numerics.smallest(bounds, np.arange(len(slack)), min(n - 1, k + 1)))
            found[part] = columns[:, :k]
            crowded[part] = values[:, k // 2] <= slack
            if k < n - 1:
                rows = np.flatnonzero(values[:, k - 1] + reach[part] + slack >= values[:, k] - slack)
                found[start + rows], _ = self._compare(k, self.points[part], bounds, slack, rows, True)
        found.sort(axis=1)
        return found, crowded

    def _blocks(self, low: torch.Tensor, themselves: bool) -> Iterator[tuple[int, Any, np.ndarray]]:
        """Give the squared distances [b, n] in few directions of some queries at a time, to be used before the next.

        Before them stands the first query's number; after them what rounding may have added to each row.
        """
        m, n = len(low), len(self.low)
        at_once = max(1, BLOCK_BYTES // (4 * n))
        # Fresh memory for every block would cost more than filling it.
        buffer = torch.empty(min(m, at_once), n, device=low.device)
        for start in range(0, m, at_once):
            block = low[start : start + at_once]
            squares = block.square().sum(dim=1)
            filled = torch.mm(-2 * block, self.low.T, out=buffer[: len(block)])
            filled.add_(self.squares).add_(squares[:, None])
            if themselves:
                filled.diagonal(start).fill_(torch.inf)
            slack = to_array(4e-6 * (squares + self.squares.max()))
            yield start, filled if self.numerics is _device else filled.numpy(), slack

    def _compare(
        self, k: int, queries: Any, bounds: Any, slack: np.ndarray, pending: np.ndarray, themselves: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest points of some queries of a block, and their squared distances in all dimensions."""
        rows = pending
        found, apart = np.empty((len(slack), k), np.int64), np.empty((len(slack), k))
        others = len(self.points) - themselves
        count = min(others, k + 8 + k // 8)
        while len(pending):
            candidates, near = map(to_array, self.numerics.smallest(bounds, pending, count))
            chosen = np.sort(candidates, axis=1)
            distances = to_array(self.numerics.squared_distances(self.points, queries[pending], chosen))
            order = np.argsort(distances, axis=1, kind="stable")[:, :k]
            found[pending], apart[pending] = (np.take_along_axis(x, order, axis=1) for x in (chosen, distances))
            if count == others:
                break
            pending = pending[near[:, -1] - slack[pending] < apart[pending, -1]]
            count = min(others, 2 * count)
        return found[rows], apart[rows]

    def _project(self, points: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where points lie in the few directions, float32 [n, r], and how far outside of them at most, [n]."""
        n, D = points.shape
        if self.directions is None:
            return self._single(to_tensor(points) - self.mean), torch.zeros(n, device=self.mean.device)
        low = torch.empty(n, PROJECTED, device=self.mean.device)
        beyond = torch.empty(n, device=self.mean.device)
        at_once = max(1, BLOCK_BYTES // (4 * D))
        for start in range(0, n, at_once):
            part = slice(start, start + at_once)
            apart = self._single(to_tensor(points[part]) - self.mean)
            torch.mm(apart, self.directions, out=low[part])
            squares = apart.square().sum(dim=1)
            # What rounding may have taken away is added.
            beyond[part] = (squares - low[part].square().sum(dim=1)).clamp_(min=0).add_(1e-6 * squares).sqrt_()
        return low, beyond

    def _single(self, values: Any) -> torch.Tensor:
        """Return values as a float32 tensor, where the points lie."""
        device = self.points.device if self.numerics is _device else "cpu"
        return to_tensor(values).to(device=device, dtype=torch.float32)


class ApproximateSearch(NeighbourSearch):
    """Finds almost all of the nearest of points [n, D], in time that hardly grows faster than n.

    Candidates come from a graph of neighbours at several scales [1]_, built by faiss on the few directions; their
    distances are exact. Arguments and results are those of :class:`NeighbourSearch`, but points lie on the host.

    References
    ----------
    .. [1] Y. Malkov, D. Yashunin. Efficient and Robust Approximate Nearest Neighbor Search Using Hierarchical Navigable
       Small World Graphs. IEEE TPAMI 2020.
    """

    def __init__(self, points: Any) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError(
                "approximate neighbours need faiss: pip install 'fastdis[neighbors]', or neighbors_algorithm='exact'"
            ) from error
        super().__init__(to_array(points))
        self._index = faiss.IndexHNSWFlat(self.low.shape[1], 32)
        self._index.hnsw.efConstruction = 80
        self._index.add(self.low.numpy())

    def nearest(self, k: int, queries: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Return what the k nearest points of each query probably are, and their squared distances."""
        themselves = queries is None
        queries = self.points if queries is None else queries
        low = self.low if themselves else self._project(queries)[0]
        count = min(len(self.points), k + 8 + k // 8)
        self._index.hnsw.efSearch = 2 * count
        found = self._index.search(low.numpy(), count)[1]
        if themselves:
            found[found == np.arange(len(found))[:, None]] = -1
        # One that was not found stands at an infinite distance.
        chosen = np.sort(found, axis=1)
        distances = _host.squared_distances(self.points, queries, np.maximum(chosen, 0))
        distances[chosen < 0] = np.inf
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        apart = np.take_along_axis(distances, order, axis=1)
        lost = np.flatnonzero(np.isinf(apart[:, -1]))
        if len(lost):
            raise ValueError(
                f"X: fewer than n_neighbors={k} neighbours of row {lost[0]} were found, and so it is with "
                f"{len(lost) - 1} other rows; neighbors_algorithm='exact' finds all"
            )
        return np.take_along_axis(chosen, order, axis=1), apart

    def graph(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what the k nearest points of each point probably are, and where half of them equal it."""
        found, squares = self.nearest(k)
        return np.sort(found, axis=1), squares[:, k // 2] == 0
