"""Points in memory: what they are kept as, what a batch is, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastdis.data import PointDataset


def test_batches():
    points = np.arange(24.0).reshape(4, 3, 2)
    dataset = PointDataset(points, np.arange(4)[:, None])
    assert len(dataset) == 4
    assert dataset.image_shape == (3, 2)
    assert dataset.batch(2).tolist() == points[[2]].tolist()
    for index in ([3, 0, 3], np.array([3, 0, 3]), torch.tensor([3, 0, 3])):
        batch = dataset.batch(index)
        assert batch.dtype == torch.float32
        assert batch.tolist() == points[[3, 0, 3]].tolist()
    x, z = next(iter(DataLoader(dataset, batch_size=4)))
    assert x.tolist() == points.tolist()
    assert z.tolist() == [[0], [1], [2], [3]]
    assert z.dtype == torch.float64
    assert PointDataset(points)[1][1].shape == (0,)


@pytest.mark.parametrize(
    ("points", "latents", "error", "words"),
    [
        ([[1.0]], None, TypeError, "points must be a tensor or an array, got list"),
        (torch.ones(2, 2, dtype=torch.complex64), None, TypeError, "points must be real, got torch.complex64"),
        (torch.ones(3), None, ValueError, r"points must have shape \[n, \*\] with n at least 1, got \[3\]"),
        (torch.ones(0, 3), None, ValueError, r"got \[0, 3\]"),
        (torch.full((2, 2), float("nan")), None, ValueError, "points must be finite"),
        (np.full((2, 2), 1e300), None, ValueError, "points must be finite in torch.float32"),
        (torch.ones(2, 2), torch.ones(3, 1), ValueError, r"latents must have shape \[2, K\], got \[3, 1\]"),
        (torch.ones(2, 2), torch.ones(2), ValueError, r"latents must have shape \[2, K\], got \[2\]"),
    ],
)
def test_what_is_refused(points, latents, error, words):
    with pytest.raises(error, match=words):
        PointDataset(points, latents)
