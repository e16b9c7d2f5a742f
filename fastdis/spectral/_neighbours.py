"""Nearest neighbours, exactly, without all distances in all dimensions."""

from __future__ import annotations

import numpy as np
import torch

from fastdis.spectral._host import squared_distances

PROJECTED = 128  # directions that candidates are found in
BLOCK_BYTES = 2**27  # of distances at a time


class NeighbourSearch:
    """Finds the nearest of points [n, D].

    Distances in few orthonormal directions are never longer than in all. So the nearest in those directions are
    candidates, their distances are computed in all dimensions, and where the k-th of these is not longer than what
    any other point has in the few directions already, no other point can be nearer. Elsewhere there are more
    candidates. The directions are those in which random mixtures of the points lie [1]_.

    Parameters
    ----------
    points : ndarray of float32 or float64, [n, D]
        Finite.

    References
    ----------
    .. [1] N. Halko, P. G. Martinsson, J. A. Tropp. Finding Structure with Randomness. SIAM Review 2011.
    """

    def __init__(self, points: np.ndarray) -> None:
        self.points = points
        self.mean = points.mean(axis=0)
        n, D = points.shape
        self.directions = None
        if min(n, D) > 2 * PROJECTED:
            generator = torch.Generator().manual_seed(0)
            mixing = torch.randn(n, PROJECTED, generator=generator)
            mixing -= mixing.mean(dim=0)  # sums of deviations from the mean, without forming these
            mixtures = torch.from_numpy(points).to(torch.float32).T @ mixing
            self.directions = torch.linalg.qr(mixtures).Q
        self.low = self._project(points)
        self.squares = self.low.square().sum(dim=1)

    def nearest(self, k: int, queries: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest points of each query, int64 [m, k], nearest first, and their squared distances.

        Of equally near ones the first come first. Without queries they are the points, and none is its own neighbour.
        """
        themselves = queries is None
        queries = self.points if queries is None else queries
        m, n = len(queries), len(self.points)
        found, apart = np.empty((m, k), np.int64), np.empty((m, k))
        low = self.low if themselves else self._project(queries)
        at_once = max(1, BLOCK_BYTES // (4 * n))
        for start in range(0, m, at_once):
            block = low[start : start + at_once]
            squares = block.square().sum(dim=1)
            bounds = torch.addmm(squares[:, None] + self.squares, block, self.low.T, alpha=-2)
            rows = torch.arange(len(block))
            if themselves:
                bounds[rows, start + rows] = torch.inf
            # What rounding may have added to a bound.
            slack = 4e-6 * (squares + self.squares.max())
            others = n - themselves
            count = min(others, k + max(16, k // 2))
            pending = rows
            while len(pending):
                bound, candidates = torch.topk(bounds[pending], count, largest=False)
                at = (start + pending).numpy()
                chosen = np.sort(candidates.numpy(), axis=1)
                distances = squared_distances(self.points, np.ascontiguousarray(queries[at]), chosen)
                order = np.argsort(distances, axis=1, kind="stable")[:, :k]
                found[at], apart[at] = (np.take_along_axis(x, order, axis=1) for x in (chosen, distances))
                if count == others:
                    break
                safe = (bound[:, -1] - slack[pending]).numpy() >= apart[at, -1]
                pending = pending[torch.from_numpy(~safe)]
                count = min(others, 2 * count)
        return found, apart

    def _project(self, points: np.ndarray) -> torch.Tensor:
        if self.directions is None:
            return torch.from_numpy(points - self.mean).to(torch.float32)
        mean = torch.from_numpy(self.mean).to(torch.float32)
        return torch.from_numpy(points).to(torch.float32) @ self.directions - mean @ self.directions
