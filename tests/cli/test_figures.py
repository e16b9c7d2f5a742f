"""Traversals change the latent they say they change."""

from __future__ import annotations

import torch

from fastdis.cli.figures import traversal_grid
from fastdis.models import VAE


def test_traversal_changes_one_latent_at_a_time():
    torch.manual_seed(0)
    model = VAE(latent_dim=3, image_size=32)
    image = torch.rand(1, 1, 32, 32)
    values = (-1.5, 0.0, 2.0)
    grid = traversal_grid(model, image, values)
    assert grid.shape == (3, 3, 1, 32, 32)
    for n in range(3):
        for t, value in enumerate(values):
            z = model(image).detach()
            z[0, n] = value
            torch.testing.assert_close(grid[n, t], torch.sigmoid(model.decode(z))[0].detach())
