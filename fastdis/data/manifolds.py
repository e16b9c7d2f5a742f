"""Manifolds whose coordinates are known: where methods that need an isometric generator must work, and where not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Generator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Manifold:
    """A generator of points, and the box that its latents come from.

    Your own generator is one too: any differentiable function of a batch of latents. The published manifolds of
    StyleGAN images are ``Manifold("cats", lambda s: synthesis(mean + (s * scales) @ directions), (-2.0, -2.0), (2.0,
    2.0))``, with your network's synthesis, mean latent, and principal directions.

    Parameters
    ----------
    name : str
        For tables.
    generator : callable
        Latents [n, d] to points [n, *], differentiable, each row by itself.
    low, high : tuple of float
        The box, a number for each latent.
    isometric : bool or None, optional
        Whether the generator is an isometry up to a constant linear map of the latents, in theory; None for unknown.
    """

    name: str
    generator: Generator = field(repr=False)
    low: tuple[float, ...]
    high: tuple[float, ...]
    isometric: bool | None = None

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or not self.low:
            raise ValueError(f"low and high must have one number for each latent, got {self.low} and {self.high}")
        if not all(a < b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")

    @property
    def dimension(self) -> int:
        """The number of latents, d."""
        return len(self.low)

    def latents(
        self,
        n: int,
        *,
        distribution: Literal["uniform", "gaussian"] = "uniform",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw independent latents.

        Parameters
        ----------
        n : int
            How many.
        distribution : {"uniform", "gaussian"}, optional
            Uniform in the box; or Gaussian about its centre, the box being three standard deviations to either side,
            and drawn again where it lies outside: what no method can identify.
        generator : torch.Generator, optional
            For the draw.

        Returns
        -------
        Tensor of float64, [n, d]
            Latents.
        """
        low, high = torch.tensor(self.low, dtype=torch.float64), torch.tensor(self.high, dtype=torch.float64)
        if distribution == "uniform":
            return low + (high - low) * torch.rand(n, self.dimension, dtype=torch.float64, generator=generator)
        if distribution != "gaussian":
            raise ValueError(f"distribution must be 'uniform' or 'gaussian', got {distribution!r}")
        normal = torch.randn(n, self.dimension, dtype=torch.float64, generator=generator)
        while (outside := normal.abs() > 3).any():
            fresh = torch.randn(int(outside.sum()), dtype=torch.float64, generator=generator)
            normal[outside] = fresh
        return (low + high) / 2 + normal * (high - low) / 6

    def sample(
        self,
        n: int,
        *,
        distribution: Literal["uniform", "gaussian"] = "uniform",
        generator: torch.Generator | None = None,
        batch_size: int = 1024,
    ) -> tuple[Tensor, Tensor]:
        """Draw points and the latents that they were made from.

        Parameters
        ----------
        n : int
            How many.
        distribution : {"uniform", "gaussian"}, optional
            As for :meth:`latents`.
        generator : torch.Generator, optional
            For the draw.
        batch_size : int, optional
            Latents that the generator gets at a time.

        Returns
        -------
        points : Tensor of float32, [n, D]
            Flattened.
        latents : Tensor of float64, [n, d]
            As :meth:`latents` returns them.
        """
        latents = self.latents(n, distribution=distribution, generator=generator)
        with torch.no_grad():
            points = [self.generator(part).flatten(1).float() for part in latents.split(batch_size)]
        return torch.cat(points), latents

    def distortion(self, n: int = 256, *, generator: torch.Generator | None = None) -> float:
        r"""Return how far from isometry the generator is, up to a constant linear map of the latents.

        The root of the mean of :math:`\|\bar G^{-1/2} G(z) \bar G^{-1/2} - I\|_F^2 / d` over latents, where
        :math:`G = J^\top J` and :math:`\bar G` is its mean: 0 for an isometry, and how much squared lengths vary
        otherwise. Our own measure.

        Parameters
        ----------
        n : int, optional
            How many latents, uniform in the box.
        generator : torch.Generator, optional
            For their draw; from seed 0 by default.

        Returns
        -------
        float
            0 or more.
        """
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        latents = self.latents(n, generator=generator)

        def metric(z: Tensor) -> Tensor:
            jacobian = torch.func.jacfwd(lambda one: self.generator(one[None])[0].flatten())(z)
            return jacobian.T @ jacobian

        grams = torch.func.vmap(metric, chunk_size=64)(latents)
        values, vectors = torch.linalg.eigh(grams.mean(dim=0))
        root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
        apart = root @ grams @ root - torch.eye(self.dimension, dtype=grams.dtype)
        return math.sqrt(float(apart.square().sum(dim=(1, 2)).mean()) / self.dimension)


def flat_torus(d: int = 2, *, ambient: int = 64, reach: float = 1.0, seed: int = 0) -> Manifold:
    """Make a patch of a flat torus: every latent is the angle on a circle of its own, in a random subspace.

    Parameters
    ----------
    d : int, optional
        Latents.
    ambient : int, optional
        D, at least 2 d.
    reach : float, optional
        Angles go from minus this to this; below pi, or the circles close.
    seed : int, optional
        For the subspace.

    Returns
    -------
    Manifold
        Isometric.
    """
    if not 0 < reach < math.pi:
        raise ValueError(f"reach must be above 0 and below pi, got {reach}")
    frame = _frame(2 * d, ambient, seed)
    return Manifold(
        f"flat torus, d={d}",
        lambda z: torch.cat([z.sin(), 1 - z.cos()], dim=1) @ frame,
        (-reach,) * d,
        (reach,) * d,
        isometric=True,
    )


def swiss_roll(*, ambient: int = 64, turns: float = 1.5, height: float = 20.0, seed: int = 0) -> Manifold:
    """Make a rolled sheet whose first latent is the length along the spiral, and whose second is the height.

    Parameters
    ----------
    ambient : int, optional
        D, at least 3: the roll lies in a random subspace.
    turns : float, optional
        Of the spiral r = angle, from half a turn on.
    height : float, optional
        Of the sheet.
    seed : int, optional
        For the subspace.

    Returns
    -------
    Manifold
        Isometric.
    """
    frame = _frame(3, ambient, seed)
    first, last = math.pi, math.pi * (1 + 2 * turns)

    def length(angle: Tensor) -> Tensor:
        return 0.5 * (angle * (1 + angle**2).sqrt() + angle.asinh())

    low, high = (float(length(torch.tensor(angle, dtype=torch.float64))) for angle in (first, last))

    def roll(z: Tensor) -> Tensor:
        # Newton's method for the angle at a given length, whose derivative is sqrt(1 + angle^2); the last step is
        # differentiated, which gives the exact slope.
        with torch.no_grad():
            angle = (2 * z[:, 0]).sqrt()
            for _ in range(20):
                angle = angle - (length(angle) - z[:, 0]) / (1 + angle**2).sqrt()
        angle = angle - (length(angle) - z[:, 0]) / (1 + angle**2).sqrt()
        return torch.stack([angle * angle.cos(), angle * angle.sin(), z[:, 1]], dim=1) @ frame

    return Manifold("Swiss roll", roll, (low, 0.0), (high, height), isometric=True)


def fourier_isometry(d: int = 2, *, frequencies: int | None = None, ambient: int = 64, seed: int = 0) -> Manifold:
    r"""Make an isometric map of random waves, :math:`a_i (\cos w_i^\top z, \sin w_i^\top z)`.

    Its metric is :math:`\sum_i a_i^2 w_i w_i^\top` everywhere; waves are turned and stretched so that this is the
    identity.

    Parameters
    ----------
    d : int, optional
        Latents, uniform in -1 to 1.
    frequencies : int, optional
        Waves, at least d; by default 4 d.
    ambient : int, optional
        D, at least twice as many: they lie in a random subspace.
    seed : int, optional
        For waves and subspace.

    Returns
    -------
    Manifold
        Isometric.
    """
    count = 4 * d if frequencies is None else frequencies
    if count < d:
        raise ValueError(f"frequencies must be at least d={d}, got {count}")
    random = torch.Generator().manual_seed(seed)
    waves = torch.randn(count, d, dtype=torch.float64, generator=random)
    amplitudes = 0.5 + torch.rand(count, dtype=torch.float64, generator=random)
    values, vectors = torch.linalg.eigh(waves.T @ (amplitudes.square()[:, None] * waves))
    waves = waves @ vectors @ torch.diag(values.rsqrt()) @ vectors.T
    frame = _frame(2 * count, ambient, seed)

    def generate(z: Tensor) -> Tensor:
        phase = z @ waves.T
        return torch.cat([amplitudes * phase.cos(), amplitudes * phase.sin()], dim=1) @ frame

    return Manifold(f"Fourier isometry, d={d}", generate, (-1.0,) * d, (1.0,) * d, isometric=True)


def moving_shapes(count: int = 1, *, size: int = 32, radius: float = 5.0) -> Manifold:
    """Make images of soft discs that move, each in a colour channel of its own.

    Parameters
    ----------
    count : int, optional
        Discs, each with two latents: x and y, in pixels from the centre.
    size : int, optional
        Pixels of a side.
    radius : float, optional
        Of a disc, in pixels; its edge is about two pixels wide, so that the grid does not matter.

    Returns
    -------
    Manifold
        Isometric up to a scale; D = count * size**2.
    """
    reach = _room(size, radius)

    def draw(z: Tensor) -> Tensor:
        places = z.reshape(len(z), count, 2)
        return _disc(places[..., 0], places[..., 1], size, radius)

    return Manifold(
        f"moving discs, d={2 * count}", draw, (-reach,) * (2 * count), (reach,) * (2 * count), isometric=True
    )


def moving_colours(*, size: int = 32, radius: float = 5.0) -> Manifold:
    """Make images of a soft disc that moves sideways and changes its hue, from one channel to another.

    Parameters
    ----------
    size : int, optional
        Pixels of a side.
    radius : float, optional
        Of the disc, in pixels.

    Returns
    -------
    Manifold
        Isometric up to a constant scale for each latent; D = 2 * size**2. The latents are x and the hue's angle.
    """
    reach = _room(size, radius)

    def draw(z: Tensor) -> Tensor:
        disc = _disc(z[:, 0], torch.zeros_like(z[:, 0]), size, radius)
        return torch.stack([disc * z[:, 1].cos()[:, None, None], disc * z[:, 1].sin()[:, None, None]], dim=1)

    return Manifold("moving disc and hue, d=2", draw, (-reach, 0.0), (reach, math.pi / 2), isometric=True)


def turning_shapes(*, size: int = 32, radius: float = 5.0, elongation: float = 1.5) -> Manifold:
    """Make images of a soft ellipse that moves sideways and turns.

    Parameters
    ----------
    size : int, optional
        Pixels of a side.
    radius : float, optional
        Geometric mean of the half-axes, in pixels.
    elongation : float, optional
        Ratio of the half-axes; the farther from 1, the farther from isometry.

    Returns
    -------
    Manifold
        Near to isometric: how fast an image changes as the ellipse moves depends on how it is turned. The latents are x
        and the angle.
    """
    reach = _room(size, radius * elongation**0.5)

    def draw(z: Tensor) -> Tensor:
        return _disc(z[:, 0], torch.zeros_like(z[:, 0]), size, radius, elongation, z[:, 1])

    return Manifold("moving and turning ellipse, d=2", draw, (-reach, 0.0), (reach, math.pi / 2), isometric=False)


def growing_shapes(*, size: int = 32, radius: float = 3.0, growth: float = 3.0) -> Manifold:
    """Make images of a soft disc that moves sideways and grows.

    Parameters
    ----------
    size : int, optional
        Pixels of a side.
    radius : float, optional
        Of the smallest disc, in pixels.
    growth : float, optional
        How many times as large the largest is.

    Returns
    -------
    Manifold
        Not isometric: the larger the disc, the more an image changes. The latents are x and the radius.
    """
    reach = _room(size, radius * growth)

    def draw(z: Tensor) -> Tensor:
        return _disc(z[:, 0], torch.zeros_like(z[:, 0]), size, z[:, 1])

    return Manifold("moving and growing disc, d=2", draw, (-reach, radius), (reach, radius * growth), isometric=False)


def _frame(rows: int, ambient: int, seed: int) -> Tensor:
    """Return orthonormal rows [rows, ambient]."""
    if ambient < rows:
        raise ValueError(f"ambient must be at least {rows}, got {ambient}")
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(ambient, rows, dtype=torch.float64, generator=random)).Q.T


def _room(size: int, radius: float) -> float:
    """Return how far from the centre a disc may move and stay inside the image, its edge too."""
    reach = (size - 1) / 2 - radius - 4.0
    if reach <= 0:
        raise ValueError(f"size must leave a disc of radius {radius:g} room to move, got {size}")
    return reach


def _disc(
    x: Tensor,
    y: Tensor,
    size: int,
    radius: float | Tensor,
    elongation: float = 1.0,
    angle: Tensor | None = None,
) -> Tensor:
    """Return images [*, size, size] of a disc or ellipse at x and y [*], whose edge is smooth."""
    axis = torch.arange(size, dtype=x.dtype) - (size - 1) / 2
    across, down = axis - x[..., None, None], axis[:, None] - y[..., None, None]
    if angle is not None:
        cosine, sine = angle.cos()[..., None, None], angle.sin()[..., None, None]
        across, down = cosine * across + sine * down, cosine * down - sine * across
        across, down = across / elongation**0.5, down * elongation**0.5
    radius = radius[..., None, None] if isinstance(radius, Tensor) else radius
    # The squared distance is smooth at the centre, where the distance is not.
    return torch.sigmoid((radius**2 - across**2 - down**2) / (2 * radius))
