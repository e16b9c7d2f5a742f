"""Autoencoders: losses by hand, penalties by autograd, what they are for, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastdis.data import PointDataset, flat_torus
from fastdis.metrics import mcc
from fastdis.models import Autoencoder, GaussianVAE, build_model
from fastdis.models.autoencoder import PENALTIES
from fastdis.spectral import FastICA
from fastdis.training import Trainer, load_checkpoint

SMALL = {"hidden": (16, 8)}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("kind", [Autoencoder, GaussianVAE])
@pytest.mark.parametrize(
    ("shape", "hidden"), [((7,), (16, 8)), ((3, 4, 5), (6,)), ((2,), ()), ((1, 32, 32), None), ((3, 64, 64), None)]
)
def test_shapes(kind, shape, hidden):
    model = kind(3, shape, hidden=hidden, linear_layers=2)
    x = torch.randn(5, *shape)
    codes = model.encode(x)
    assert codes.shape == (5, 3)
    assert model.decode(codes).shape == x.shape
    assert torch.equal(model(x), codes)
    again = build_model(kind.__name__, model.config())
    assert again.config() == model.config()
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_linear_layers_are_the_last_of_the_encoder():
    model = Autoencoder(4, (9,), **SMALL, linear_layers=3)
    assert [(layer.weight.shape, layer.bias) for layer in model.encoder[-3:]] == [((4, 4), None)] * 3
    assert len(model.encoder) == len(Autoencoder(4, (9,), **SMALL).encoder) + 3


def test_loss_is_the_mean_squared_error():
    model = Autoencoder(2, (6,), **SMALL)
    x = torch.randn(9, 6)
    terms = model.loss(x)
    assert set(terms) == {"loss", "reconstruction"}
    torch.testing.assert_close(terms["loss"], (model.decode(model(x)) - x).square().mean())


def test_loss_of_the_variational_one():
    model = GaussianVAE(2, (6,), **SMALL, beta=3.0, noise=0.5)
    x = torch.randn(9, 6)
    terms = model.loss(x, generator=seeded())
    mean, logvar = model.posterior(x)
    kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0, 1)).sum() / 9
    assert set(terms) == {"loss", "reconstruction", "kl"}
    torch.testing.assert_close(terms["kl"], kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 3 * kl, rtol=1e-4, atol=1e-5)
    # Without any noise of the posterior: the likelihood alone.
    with torch.no_grad():
        model.encoder[-1].weight[2:] = 0
        model.encoder[-1].bias[2:] = -60
    terms = model.loss(x, generator=seeded())
    expected = (model.decode(model(x)) - x).square().sum() / 9 / (2 * 0.25)
    torch.testing.assert_close(terms["reconstruction"], expected, rtol=1e-4, atol=0)


def grams(model, z):
    jacobians = torch.func.vmap(torch.func.jacfwd(lambda one: model.decoder(one[None])[0].flatten()))(z)
    return jacobians.mT @ jacobians


@pytest.mark.parametrize("kind", [Autoencoder, GaussianVAE])
def test_penalty_is_that_of_the_decoder_at_mixed_codes(kind):
    model = kind(3, (10,), **SMALL, isometry="relaxed_distortion", isometry_weight=0.7, mixup=0.0).double()
    x = torch.randn(1, 10, dtype=torch.float64).expand(4, 10)  # all codes are one, and so are their mixtures
    if kind is GaussianVAE:
        with torch.no_grad():
            model.encoder[-1].weight[3:] = 0
            model.encoder[-1].bias[3:] = -80
    terms = model.loss(x, generator=seeded())
    G = grams(model, model(x))
    trace = G.diagonal(dim1=1, dim2=2).sum(dim=1)
    expected = G.square().sum(dim=(1, 2)).mean() / trace.mean() ** 2
    torch.testing.assert_close(terms["isometry"], expected, rtol=1e-6, atol=0)
    plain = terms["reconstruction"] + terms.get("kl", 0)
    torch.testing.assert_close(terms["loss"], plain + 0.7 * terms["isometry"])


@pytest.mark.parametrize("isometry", ["conformal", "i_ae"])
def test_penalty_of_convolutions(isometry):
    torch.manual_seed(0)
    model = Autoencoder(2, (1, 32, 32), hidden=None, isometry=isometry, mixup=0.0)
    x = torch.rand(1, 1, 32, 32).expand(3, -1, -1, -1)
    terms = model.loss(x, generator=seeded())
    terms["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if isometry == "conformal":
        G = grams(model, model(x).detach())
        trace = G.diagonal(dim1=1, dim2=2).sum(dim=1)
        expected = (G.square().sum(dim=(1, 2)) - trace**2 / 2).mean()
        torch.testing.assert_close(terms["isometry"], expected, rtol=1e-3, atol=0)


def test_mixtures_reach_beyond_the_codes():
    model = Autoencoder(2, (3,), **SMALL, isometry="isometry", mixup=0.5)
    z = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(500, 1)
    mixed = model._mix(z, seeded())
    torch.testing.assert_close(mixed[:, 0], mixed[:, 1])
    assert mixed.min() < -0.3
    assert mixed.max() > 1.3
    assert mixed.min() >= -0.5
    assert mixed.max() <= 1.5
    inside = Autoencoder(2, (3,), **SMALL, isometry="isometry", mixup=0.0)._mix(z, seeded())
    assert inside.min() >= 0
    assert inside.max() <= 1


def test_i_ae_vanishes_for_a_linear_isometry_and_its_pseudo_inverse():
    model = Autoencoder(3, (8,), hidden=(), isometry="i_ae").double()
    rows = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q.T
    with torch.no_grad():
        model.decoder[0].weight.copy_(rows.T)
        model.encoder[1].weight.copy_(rows)
    x = torch.randn(20, 8, dtype=torch.float64)
    assert model.loss(x, generator=seeded())["isometry"].item() < 1e-12
    with torch.no_grad():
        model.decoder[0].weight.mul_(3)
    assert model.loss(x, generator=seeded())["isometry"].item() == pytest.approx(4)
    with torch.no_grad():
        model.encoder[1].weight.mul_(2)
    assert model.loss(x, generator=seeded())["isometry"].item() == pytest.approx(5)


@pytest.mark.parametrize("isometry", PENALTIES)
def test_gradients_of_penalties(isometry):
    """Against differences of the loss along random directions of all weights."""
    torch.manual_seed(1)
    model = Autoencoder(2, (5,), **SMALL, isometry=isometry, isometry_weight=2.0).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    model.loss(x, generator=seeded())["loss"].backward()
    steps = [torch.randn_like(p) for p in model.parameters()]
    slope = sum((p.grad * step).sum() for p, step in zip(model.parameters(), steps, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, step in zip(model.parameters(), steps, strict=True):
                p.add_(step, alpha=sign * 1e-6)
        values.append(model.loss(x, generator=seeded())["loss"].item())
        with torch.no_grad():
            for p, step in zip(model.parameters(), steps, strict=True):
                p.sub_(step, alpha=sign * 1e-6)
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_a_dead_decoder_has_a_gradient():
    model = Autoencoder(2, (5,), **SMALL, isometry="i_ae")
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
    model.loss(torch.randn(4, 5), generator=seeded())["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_isometry_brings_a_patch_of_a_torus_within_reach_of_ica():
    points, latents = flat_torus(2, ambient=8).sample(600, generator=seeded())
    dataset = PointDataset(points / points.std(), latents)
    found = {}
    for isometry in (None, "scaled_isometry"):
        torch.manual_seed(0)
        model = Autoencoder(2, (8,), hidden=(64, 64), isometry=isometry, isometry_weight=0.1)
        history = Trainer(model, dataset, steps=400, batch_size=100, lr=3e-3).fit()
        assert history["reconstruction"][-1] < 0.1 * history["reconstruction"][0]
        with torch.no_grad():
            found[isometry] = mcc(FastICA().fit_transform(model(dataset.points)), latents).score
    assert found["scaled_isometry"] > 0.99
    assert found["scaled_isometry"] > found[None]


@pytest.mark.parametrize("kind", [Autoencoder, GaussianVAE])
def test_training_on_points_goes_on_from_a_checkpoint(kind, tmp_path):
    dataset = PointDataset(torch.randn(50, 4, 3))
    options = {"batch_size": 8, "lr": 1e-3, "seed": 3}
    settings = {**SMALL, "isometry": "i_ae"}

    def fresh():
        torch.manual_seed(2)
        return kind(2, (4, 3), **settings)

    whole = Trainer(fresh(), dataset, steps=6, **options)
    whole.fit()
    Trainer(fresh(), dataset, steps=3, out=tmp_path, **options).fit()
    resumed = Trainer.resume(tmp_path, dataset, steps=6)
    resumed.fit()
    assert resumed.history == whole.history
    assert load_checkpoint(tmp_path).model.config() == whole.model.config()
    with pytest.raises(ValueError, match=r"images of \[4, 3\], and the model was made for \[12\]"):
        Trainer(kind(2, (12,)), dataset, steps=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"input_shape": ()}, r"input_shape must be one or more sizes from 1, got \[\]"),
        ({"input_shape": (3, 0)}, r"input_shape must be one or more sizes from 1, got \[3, 0\]"),
        ({"hidden": (8, 0)}, r"hidden must be widths from 1, got \[8, 0\]"),
        ({"hidden": None}, r"input_shape must be \[C, 32, 32\] or \[C, 64, 64\] where hidden is None, got \[6\]"),
        ({"activation": "gelu"}, "activation must be one of relu, silu, tanh, elu, got 'gelu'"),
        ({"linear_layers": -1}, "linear_layers must not be negative, got -1"),
        ({"isometry": "flat"}, "isometry must be None or one of isometry, .*, got 'flat'"),
        ({"isometry_weight": -1.0}, "isometry_weight must be a number from 0, got -1.0"),
        ({"mixup": float("nan")}, "mixup must be a number from 0, got nan"),
        ({"beta": -1.0}, "beta must not be negative, got -1.0"),
        ({"noise": 0.0}, "noise must be a positive number, got 0.0"),
    ],
)
def test_parameters_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        GaussianVAE(**{"latent_dim": 2, "input_shape": (6,), **options})


def test_inputs_of_another_shape():
    with pytest.raises(ValueError, match=r"x must have shape \[B, 6\], got \[2, 7\]"):
        Autoencoder(2, (6,)).encode(torch.randn(2, 7))
