import math

import pytest
import torch

from fastdis.data import (
    Manifold,
    flat_torus,
    fourier_isometry,
    growing_shapes,
    moving_colours,
    moving_shapes,
    swiss_roll,
    turning_shapes,
)

ISOMETRIC = [
    flat_torus(),
    flat_torus(3, ambient=10),
    swiss_roll(),
    fourier_isometry(),
    fourier_isometry(5, ambient=50),
    moving_shapes(),
    moving_shapes(2, size=28, radius=4.0),
    moving_colours(),
]
OTHERS = [turning_shapes(), growing_shapes()]


def metric(manifold, z):
    jacobian = torch.func.jacfwd(lambda one: manifold.generator(one[None])[0].flatten())(z)
    return jacobian.T @ jacobian


@pytest.mark.parametrize("manifold", ISOMETRIC, ids=lambda m: m.name)
def test_isometric_ones_have_one_metric(manifold):
    assert manifold.isometric
    assert manifold.distortion(40) < 2e-3  # what the pixels' grid leaves


@pytest.mark.parametrize(
    "manifold", [flat_torus(3, ambient=10), swiss_roll(), fourier_isometry(4)], ids=lambda m: m.name
)
def test_exact_ones_have_the_identity_for_a_metric(manifold):
    z = manifold.latents(1, generator=torch.Generator().manual_seed(1))[0]
    torch.testing.assert_close(metric(manifold, z), torch.eye(manifold.dimension, dtype=torch.float64))


@pytest.mark.parametrize("manifold", OTHERS, ids=lambda m: m.name)
def test_others_do_not(manifold):
    assert not manifold.isometric
    assert manifold.distortion(40) > 0.05


def test_distortion_of_a_known_map():
    """x = z^2 / 2 on 1 to 3: the metric is z^2, of mean 13 / 3 and mean square 121 / 5."""
    manifold = Manifold("parabola", lambda z: z**2 / 2, (1.0,), (3.0,))
    assert manifold.distortion(20_000) == pytest.approx(math.sqrt(121 / 5 / (13 / 3) ** 2 - 1), rel=0.03)
    stretched = Manifold("stretched", lambda z: z * torch.tensor([3.0, 0.1], dtype=z.dtype), (0.0, 0.0), (1.0, 1.0))
    assert stretched.distortion() < 1e-9


@pytest.mark.parametrize("manifold", [*ISOMETRIC, *OTHERS], ids=lambda m: m.name)
def test_samples(manifold):
    points, latents = manifold.sample(70, generator=torch.Generator().manual_seed(3), batch_size=32)
    again, _ = manifold.sample(70, generator=torch.Generator().manual_seed(3))
    assert torch.equal(points, again)
    assert points.dtype == torch.float32
    assert latents.dtype == torch.float64
    assert points.shape == (70, manifold.generator(latents[:1]).numel())
    assert latents.shape == (70, manifold.dimension)
    assert (latents >= torch.tensor(manifold.low)).all()
    assert (latents <= torch.tensor(manifold.high)).all()
    assert torch.pdist(points.double()).min() > 0


def test_discs_keep_inside_the_image():
    manifold = moving_shapes()
    corner = manifold.generator(torch.tensor([[manifold.high[0], manifold.low[1]]], dtype=torch.float64)).reshape(
        32, 32
    )
    border = torch.cat([corner[0], corner[-1], corner[:, 0], corner[:, -1]])
    assert border.max() < 0.02
    assert corner.max() > 0.9


def test_gaussian_latents():
    manifold = flat_torus(2)
    latents = manifold.latents(4000, distribution="gaussian", generator=torch.Generator().manual_seed(0))
    assert latents.std(dim=0).tolist() == pytest.approx([1 / 3, 1 / 3], rel=0.05)
    assert latents.abs().max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flat_torus(3, ambient=5), "ambient must be at least 6, got 5"),
        (lambda: flat_torus(reach=4.0), "reach must be above 0 and below pi, got 4.0"),
        (lambda: fourier_isometry(3, frequencies=2), "frequencies must be at least d=3, got 2"),
        (lambda: moving_shapes(size=12), "size must leave a disc of radius 5 room to move, got 12"),
        (lambda: Manifold("m", abs, (0.0,), (1.0, 2.0)), "one number for each latent"),
        (lambda: Manifold("m", abs, (1.0,), (1.0,)), "low must be below high"),
        (lambda: flat_torus().latents(3, distribution="cauchy"), "'uniform' or 'gaussian', got 'cauchy'"),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
