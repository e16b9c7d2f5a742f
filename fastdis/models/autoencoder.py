"""Autoencoders of images or points, plain or with a locally isometric decoder, and their variational kin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdis.models.latent_model import LatentModel
from fastdis.models.vae import ConvDecoder, ConvEncoder, normal_like
from fastdis.ops import decoder_isometry_penalty, decoder_jacobian, gaussian_kl, jacobian_gram, reparameterize

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "elu": nn.ELU}
PENALTIES = ("isometry", "scaled_isometry", "conformal", "relaxed_distortion", "orthogonality", "i_ae")


class Autoencoder(LatentModel):
    r"""Autoencoder whose decoder may be encouraged to be locally isometric.

    .. math::
        L = \mathrm{mean}\,(x - f(g(x)))^2 + \lambda \, R(J_f(z'))

    with encoder g, decoder f and a penalty R of the decoder's exact Jacobian at mixed latents
    :math:`z' = a z + (1 - a) z_\pi`, :math:`a \sim U(-\eta, 1 + \eta)`, :math:`\pi` a permutation of the batch, so that
    the space between codes is penalised too (Lee et al., 2022).

    - Without a penalty it is the plain autoencoder; with ``linear_layers`` IRMAE (Jing et al., 2020): layers without
      bias or activation between encoder and decoder, which make the codes of low rank.
    - ``isometry="relaxed_distortion"`` is the penalty of IRVAE (Lee et al., 2022), which leaves the scale open;
      ``"scaled_isometry"`` that of FMVAE (Chen et al., 2020); ``"isometry"`` asks for :math:`J J^\top = I`. See
      :func:`fastdis.isometry_penalty`.
    - ``isometry="i_ae"`` is I-AE (Gropp et al., 2020): :math:`(\|J_f^\top u\| - 1)^2 + (\|u^\top J_g\| - 1)^2` for
      random unit vectors u, the second term making the encoder the decoder's pseudo-inverse.

    Horan et al. (2021) report that encouraging local isometry helps autoencoders to find the factors, but not which
    regulariser they used: the choice of penalties, the default weight and the mixing of latents are ours.

    Parameters
    ----------
    latent_dim : int
        Number of latents, N.
    input_shape : sequence of int
        The shape of an image or point; D numbers in all.
    hidden : sequence of int or None, optional
        Widths of the hidden layers of the encoder, and in reverse of the decoder. None: the convolutions of Locatello
        et al. (2019), for images [C, S, S] with S 32 or 64.
    activation : {"silu", "relu", "tanh", "elu"}, optional
        After hidden layers; a smooth one has a Jacobian that is. Convolutions have ReLU.
    linear_layers : int, optional
        Linear layers of IRMAE, 8 there, all of N units.
    isometry : str or None, optional
        Which penalty: a kind of :func:`fastdis.isometry_penalty`, or ``"i_ae"``.
    isometry_weight : float, optional
        :math:`\lambda`.
    mixup : float, optional
        :math:`\eta`.

    Raises
    ------
    ValueError
        A parameter lies outside its range.

    References
    ----------
    - D. Horan, E. Richardson, Y. Weiss. When Is Unsupervised Disentanglement Possible? NeurIPS 2021.
    - Y. Lee, S. Yoon, M. Son, F. C. Park. Regularized Autoencoders for Isometric Representation Learning. ICLR 2022.
    - N. Chen, A. Klushyn, F. Ferroni, J. Bayer, P. van der Smagt. Learning Flat Latent Manifolds with VAEs. ICML 2020.
    - A. Gropp, M. Atzmon, Y. Lipman. Isometric Autoencoders. arXiv:2006.09289, 2020.
    - L. Jing, J. Zbontar, Y. LeCun. Implicit Rank-Minimizing Autoencoder. NeurIPS 2020.
    """

    def __init__(
        self,
        latent_dim: int,
        input_shape: Sequence[int],
        *,
        hidden: Sequence[int] | None = (256, 256, 256),
        activation: str = "silu",
        linear_layers: int = 0,
        isometry: str | None = None,
        isometry_weight: float = 0.1,
        mixup: float = 0.2,
    ) -> None:
        super().__init__()
        shape = tuple(int(size) for size in input_shape)
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        if not shape or min(shape) < 1:
            raise ValueError(f"input_shape must be one or more sizes from 1, got {list(input_shape)}")
        if hidden is not None and any(width < 1 for width in hidden):
            raise ValueError(f"hidden must be widths from 1, got {list(hidden)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if linear_layers < 0:
            raise ValueError(f"linear_layers must not be negative, got {linear_layers}")
        if isometry is not None and isometry not in PENALTIES:
            raise ValueError(f"isometry must be None or one of {', '.join(PENALTIES)}, got {isometry!r}")
        for name, value in (("isometry_weight", isometry_weight), ("mixup", mixup)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a number from 0, got {value}")
        self.latent_dim = latent_dim
        self.hidden = None if hidden is None else tuple(hidden)
        self.activation = activation
        self.linear_layers = linear_layers
        self.isometry = isometry
        self.isometry_weight = isometry_weight
        self.mixup = mixup
        self._shape = shape
        self.encoder, self.decoder = self._networks()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image or point."""
        return self._shape

    def config(self) -> dict[str, Any]:
        """Return the arguments that make a model like this one."""
        return {
            "latent_dim": self.latent_dim,
            "input_shape": self.input_shape,
            "hidden": self.hidden,
            "activation": self.activation,
            "linear_layers": self.linear_layers,
            "isometry": self.isometry,
            "isometry_weight": self.isometry_weight,
            "mixup": self.mixup,
        }

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes [B, N] of images or points [B, *input_shape].

        Raises
        ------
        ValueError
            They do not have the shape the model was made for.
        """
        self._check_input(x)
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return the images or points [B, *input_shape] that codes [B, N] stand for."""
        return self.decoder(z).unflatten(1, self.input_shape) if self.hidden is not None else self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes [B, N] of images or points [B, *input_shape]."""
        return self.encode(x)

    def loss(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return what to minimise, and its parts.

        Parameters
        ----------
        x : Tensor, [B, *input_shape]
            Images or points.
        generator : torch.Generator, optional
            Source of the mixing of latents, and of the directions of I-AE.

        Returns
        -------
        dict of str to scalar Tensor
            ``loss``; ``reconstruction``, the mean squared error; and ``isometry``, unweighted, where there is a
            penalty.
        """
        z = self.encode(x)
        terms = {"reconstruction": F.mse_loss(self.decode(z), x)}
        return self._with_isometry(terms, terms["reconstruction"], x, z, generator)

    def _networks(self, codes: int = 1) -> tuple[nn.Sequential, nn.Sequential]:
        """Return an encoder to ``codes`` times N outputs, and a decoder."""
        N, shape, outputs = self.latent_dim, self.input_shape, codes * self.latent_dim
        if self.hidden is None:
            if len(shape) != 3 or shape[1] != shape[2] or shape[1] not in (32, 64):
                raise ValueError(
                    f"input_shape must be [C, 32, 32] or [C, 64, 64] where hidden is None, got {list(shape)}"
                )
            encoder: nn.Sequential = ConvEncoder(shape[0], outputs, shape[1])
            decoder: nn.Sequential = ConvDecoder(N, shape[0], shape[1])
        else:
            D = math.prod(shape)
            encoder = nn.Sequential(nn.Flatten(), *_layers([D, *self.hidden, outputs], ACTIVATIONS[self.activation]))
            decoder = nn.Sequential(*_layers([N, *reversed(self.hidden), D], ACTIVATIONS[self.activation]))
        encoder.extend(nn.Linear(outputs, outputs, bias=False) for _ in range(self.linear_layers))
        return encoder, decoder

    def _with_isometry(
        self, terms: dict[str, Tensor], loss: Tensor, x: Tensor, z: Tensor, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return the terms, the penalty of the decoder at mixtures of the codes z, and the loss with it."""
        if self.isometry is None or self.isometry_weight == 0:
            return {"loss": loss, **terms}
        mixed = self._mix(z, generator)
        if self.isometry == "i_ae":
            penalty = self._i_ae(x, mixed, generator)
        else:
            penalty = decoder_isometry_penalty(self.decoder, mixed, self.isometry)[1]
        return {"loss": loss + self.isometry_weight * penalty, **terms, "isometry": penalty}

    def _mix(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        permutation = torch.randperm(len(z), generator=generator).to(z.device)
        share = torch.rand(len(z), 1, generator=generator).to(z) * (1 + 2 * self.mixup) - self.mixup
        return share * z + (1 - share) * z[permutation]

    def _i_ae(self, x: Tensor, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the penalties of I-AE, of the decoder at z and of the encoder at x, along one direction each."""
        jacobian = decoder_jacobian(self.decoder, z)[1].flatten(2)
        directions = F.normalize(normal_like(z, generator), dim=1)
        squares = torch.einsum("bk,bkl,bl->b", directions, jacobian_gram(jacobian).to(z), directions)
        # A square root has no slope at 0, where a dead decoder is.
        stretch = (squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt() - 1).square().mean()
        directions = F.normalize(normal_like(z, generator), dim=1)
        inputs = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.encode(inputs), inputs, directions, create_graph=True)
        return stretch + (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class GaussianVAE(Autoencoder):
    r"""Variational autoencoder of real numbers: a Gaussian likelihood of fixed noise.

    .. math::
        L = \frac{\|x - f(z)\|^2}{2 \sigma^2} + \beta \, \mathrm{KL}(q(z|x) \| \mathcal{N}(0, I))
            + \lambda \, R(J_f(z'))

    a sum over the D numbers of a point, averaged over the batch. With ``isometry="relaxed_distortion"`` it is IRVAE
    (Lee et al., 2022).

    Parameters
    ----------
    latent_dim, input_shape
        As for :class:`Autoencoder`.
    beta : float, optional
        :math:`\beta`; 1 is the plain VAE.
    noise : float, optional
        :math:`\sigma`, the standard deviation of what is not explained, in the units of the data.
    **options
        As for :class:`Autoencoder`.

    Raises
    ------
    ValueError
        A parameter lies outside its range.
    """

    def __init__(
        self, latent_dim: int, input_shape: Sequence[int], *, beta: float = 1.0, noise: float = 0.1, **options: Any
    ) -> None:
        super().__init__(latent_dim, input_shape, **options)
        if not beta >= 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        if not (noise > 0 and math.isfinite(noise)):
            raise ValueError(f"noise must be a positive number, got {noise}")
        self.beta = beta
        self.noise = noise

    def config(self) -> dict[str, Any]:
        """Return the arguments that make a model like this one."""
        return {**super().config(), "beta": self.beta, "noise": self.noise}

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance, [B, N] each, of the posterior of images or points [B, *input_shape]."""
        self._check_input(x)
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """Return the posterior means [B, N] of images or points [B, *input_shape]: their codes."""
        return self.posterior(x)[0]

    def loss(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return what to minimise, and its parts.

        Parameters
        ----------
        x : Tensor, [B, *input_shape]
            Images or points.
        generator : torch.Generator, optional
            Source of the posterior's noise, and as for :meth:`Autoencoder.loss`.

        Returns
        -------
        dict of str to scalar Tensor
            ``loss``; ``reconstruction`` and ``kl``, in nats a point; and ``isometry`` where there is a penalty.
        """
        mean, logvar = self.posterior(x)
        z = reparameterize(mean, logvar, generator=generator)
        reconstruction = F.mse_loss(self.decode(z), x, reduction="sum") / (2 * self.noise**2 * len(x))
        kl = gaussian_kl(mean, logvar)
        terms = {"reconstruction": reconstruction, "kl": kl}
        return self._with_isometry(terms, reconstruction + self.beta * kl, x, z, generator)

    def _networks(self, codes: int = 2) -> tuple[nn.Sequential, nn.Sequential]:
        return super()._networks(codes)


def _layers(widths: Sequence[int], activation: type[nn.Module]) -> list[nn.Module]:
    """Return linear layers from each width to the next, with activations in between."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return layers[:-1]
