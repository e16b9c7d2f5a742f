"""The VAE: shapes, the loss by hand, seeds, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastdis.models import MODELS, VAE, ProtoVAE, build_model


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(image_size, channels):
    model = VAE(latent_dim=7, channels=channels, image_size=image_size)
    x = torch.rand(2, channels, image_size, image_size)
    mean, logvar = model.encode(x)
    assert mean.shape == logvar.shape == (2, 7)
    assert model.decode(mean).shape == x.shape
    assert torch.equal(model(x), mean)


def test_architecture_of_the_field():
    """Layers and widths of Locatello et al. (2019), table 1, for 64 x 64."""
    model = VAE(latent_dim=10)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]
    assert shapes == [
        (32, 1, 4, 4),
        (32, 32, 4, 4),
        (64, 32, 2, 2),
        (64, 64, 2, 2),
        (256, 1024),
        (20, 256),
        (256, 10),
        (1024, 256),
        (64, 64, 4, 4),
        (64, 32, 4, 4),
        (32, 32, 4, 4),
        (32, 1, 4, 4),
    ]


def test_loss_by_hand():
    torch.manual_seed(0)
    model = VAE(latent_dim=3, beta=2.5, image_size=32)
    x = torch.rand(4, 1, 32, 32)
    terms = model.loss(x, generator=torch.Generator().manual_seed(1))
    mean, logvar = model.encode(x)
    z = model.reparameterize(mean, logvar, generator=torch.Generator().manual_seed(1))
    p = torch.sigmoid(model.decode(z))
    reconstruction = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 4
    kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0, 1)).sum() / 4
    assert set(terms) == {"loss", "reconstruction", "kl"}
    torch.testing.assert_close(terms["reconstruction"], reconstruction, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["kl"], kl, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(terms["loss"], reconstruction + 2.5 * kl, rtol=1e-4, atol=0)


def test_samples_have_the_posterior_moments():
    model = VAE(latent_dim=2, image_size=32)
    mean = torch.tensor([[3.0, -1.0]]).expand(20_000, 2)
    logvar = torch.tensor([[0.0, -2.0]]).expand(20_000, 2)
    z = model.reparameterize(mean, logvar, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0).log(), logvar[0], atol=0.05, rtol=0)


def test_gradients_reach_every_weight():
    model = VAE(image_size=32)
    model.loss(torch.rand(2, 1, 32, 32))["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_generator_decides_and_global_state_does_not():
    model = VAE(image_size=32)
    x = torch.rand(2, 1, 32, 32)
    torch.manual_seed(0)
    first = model.loss(x, generator=torch.Generator().manual_seed(5))["loss"]
    torch.manual_seed(1)
    assert torch.equal(first, model.loss(x, generator=torch.Generator().manual_seed(5))["loss"])
    assert not torch.equal(first, model.loss(x, generator=torch.Generator().manual_seed(6))["loss"])


@pytest.mark.parametrize("shape", [(2, 1, 64, 64), (2, 3, 32, 32), (1, 32, 32)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"x must have shape \[B, 1, 32, 32\]"):
        VAE(image_size=32).encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"channels": 0}, "channels"),
        ({"image_size": 28}, "image_size must be 32 or 64, got 28"),
        ({"beta": -1}, "beta must not be negative"),
        ({"beta": float("nan")}, "beta must not be negative, got nan"),
    ],
)
def test_parameters_outside_their_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        VAE(**arguments)


@pytest.mark.parametrize(
    "model",
    [VAE(3, 2.0, 3, 32), ProtoVAE(3, 2.0, 1, 32, shots=2, queries=1, embedding="difference", isometry_weight=0.5)],
)
def test_configuration_rebuilds_the_model(model):
    twin = build_model(type(model).__name__, model.config())
    assert type(twin) is type(model)
    assert twin.config() == model.config()
    twin.load_state_dict(model.state_dict())


def test_models_that_do_not_exist():
    with pytest.raises(ValueError, match="one of VAE, ProtoVAE, Autoencoder, GaussianVAE, got 'GAN'"):
        build_model("GAN", {})
    with pytest.raises(ValueError, match="gamma"):
        build_model("VAE", {"gamma": 3})
    assert all(name == model.__name__ for name, model in MODELS.items())
