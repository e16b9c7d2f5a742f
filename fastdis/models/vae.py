"""The convolutional beta-VAE the field compares with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdis.models.latent_model import LatentModel
from fastdis.ops import gaussian_kl, reparameterize


class ConvEncoder(nn.Sequential):
    """The convolutional encoder of Locatello et al. (2019): four convolutions, one hidden layer, one linear output.

    Parameters
    ----------
    channels : int
        Channels of the images.
    outputs : int
        Number of outputs.
    image_size : {64, 32}
        Height and width of the images.

    Notes
    -----
    Maps float [B, channels, image_size, image_size] to [B, outputs]. Convolutions of stride 2 with 32, 32, 64, 64
    channels and kernels 4, 4, 2, 2, then 256 hidden units, all with ReLU.
    """

    def __init__(self, channels: int, outputs: int, image_size: int = 64) -> None:
        side = image_size // 16
        super().__init__(
            nn.Conv2d(channels, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 2, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * side * side, 256),
            nn.ReLU(),
            nn.Linear(256, outputs),
        )


class ConvDecoder(nn.Sequential):
    """The deconvolutional decoder of Locatello et al. (2019).

    Parameters
    ----------
    latent_dim : int
        Number of latents.
    channels : int
        Channels of the images.
    image_size : {64, 32}
        Height and width of the images.

    Notes
    -----
    Maps float [B, latent_dim] to logits [B, channels, image_size, image_size]. Hidden layers of 256 and, for
    64 x 64, 1024 units (64 maps of 4 x 4), then transposed convolutions of stride 2 and kernel 4 with 64, 32, 32
    channels and the image's, with ReLU in between.
    """

    def __init__(self, latent_dim: int, channels: int, image_size: int = 64) -> None:
        side = image_size // 16
        super().__init__(
            nn.Linear(latent_dim, 256),
            nn.ReLU(),
            nn.Linear(256, 64 * side * side),
            nn.ReLU(),
            nn.Unflatten(1, (64, side, side)),
            nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1),
        )


class VAE(LatentModel):
    r"""Variational autoencoder with a weight on its divergence: the beta-VAE of Higgins et al. (2017).

    .. math::
        L = -\mathbb{E}_{q(z|x)} \log p(x|z) + \beta \, \mathrm{KL}(q(z|x) \| \mathcal{N}(0, I))

    with a Bernoulli likelihood, summed over pixels and averaged over the batch.

    Parameters
    ----------
    latent_dim : int, optional
        Number of latents, N.
    beta : float, optional
        Weight of the divergence; 1 is the plain VAE.
    channels : int, optional
        Channels of the images, C.
    image_size : {64, 32}, optional
        Height and width of the images, S.

    Raises
    ------
    ValueError
        A parameter lies outside its range.

    References
    ----------
    I. Higgins et al. beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework. ICLR 2017.
    """

    def __init__(self, latent_dim: int = 10, beta: float = 1.0, channels: int = 1, image_size: int = 64) -> None:
        super().__init__()
        for name, value in (("latent_dim", latent_dim), ("channels", channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if image_size not in (32, 64):
            raise ValueError(f"image_size must be 32 or 64, got {image_size}")
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        self.latent_dim = latent_dim
        self.beta = beta
        self.channels = channels
        self.image_size = image_size
        self.encoder = ConvEncoder(channels, 2 * latent_dim, image_size)
        self.decoder = ConvDecoder(latent_dim, channels, image_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image, (C, S, S)."""
        return (self.channels, self.image_size, self.image_size)

    def config(self) -> dict[str, Any]:
        """Return the arguments that make a model like this one."""
        return {
            "latent_dim": self.latent_dim,
            "beta": self.beta,
            "channels": self.channels,
            "image_size": self.image_size,
        }

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, [B, N] each, of the posterior of images [B, C, S, S].

        Raises
        ------
        ValueError
            The images do not have the shape the model was made for.
        """
        self._check_input(x)
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def reparameterize(self, mean: Tensor, logvar: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents [B, N] from the posterior, by :func:`fastdis.reparameterize`.

        The seed comes from ``generator`` on the generator's own device, so that a CPU generator gives the same
        latents wherever the model is.
        """
        return reparameterize(mean, logvar, generator=generator)

    def decode(self, z: Tensor) -> Tensor:
        """Return the logits [B, C, S, S] of the pixels that latents [B, N] stand for."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """Return the posterior means [B, N] of images [B, C, S, S]: their codes."""
        return self.encode(x)[0]

    def loss(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return what to minimise, and its parts.

        Parameters
        ----------
        x : Tensor, [B, C, S, S]
            Images, intensities in [0, 1].
        generator : torch.Generator, optional
            Source of the posterior's noise.

        Returns
        -------
        dict of str to scalar Tensor
            ``loss``, ``reconstruction`` and ``kl``, in nats an image.
        """
        mean, logvar = self.encode(x)
        z = self.reparameterize(mean, logvar, generator=generator)
        return self.elbo_terms(x, self.decode(z), mean, logvar)

    def elbo_terms(self, x: Tensor, logits: Tensor, mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
        """Return ``loss``, ``reconstruction`` and ``kl`` of images [B, C, S, S] and what became of them."""
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        kl = gaussian_kl(mean, logvar)
        return {"loss": reconstruction + self.beta * kl, "reconstruction": reconstruction, "kl": kl}


def normal_like(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise shaped like ``tensor``, drawn on the generator's device."""
    device = tensor.device if generator is None else generator.device
    return torch.randn(tensor.shape, generator=generator, device=device, dtype=tensor.dtype).to(tensor.device)
