"""Figures of a training run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastdis.data.atomic import atomic_path
from fastdis.models import VAE


@torch.no_grad()
def traversal_grid(model: VAE, image: Tensor, values: Sequence[float]) -> Tensor:
    """Decode what each latent does to one image.

    Parameters
    ----------
    model : VAE
        N latents.
    image : Tensor, [1, C, S, S]
        Its posterior mean is where every traversal starts.
    values : sequence of float
        T values a latent takes while the others stay.

    Returns
    -------
    Tensor, [N, T, C, S, S]
        Intensities in [0, 1].
    """
    mean, _ = model.encode(image)
    N, T = mean.shape[1], len(values)
    z = mean.repeat(N * T, 1).reshape(N, T, N)
    latents = torch.arange(N)
    z[latents, :, latents] = torch.tensor(values, dtype=mean.dtype)
    return torch.sigmoid(model.decode(z.reshape(N * T, N))).unflatten(0, (N, T))


def draw_traversal(
    path: str | os.PathLike[str], grid: Tensor, values: Sequence[float], labels: Sequence[str], title: str
) -> None:
    """Write traversals [N, T, C, S, S] as one picture, a row for each latent under its label, a column for each value.

    Raises
    ------
    OSError
        The picture cannot be written.
    """
    N, T = grid.shape[:2]
    figure = Figure(figsize=(1.8 + 0.75 * T, 0.6 + 0.75 * N), layout="constrained")
    axes = figure.subplots(N, T, squeeze=False)
    for n in range(N):
        for t in range(T):
            cell = axes[n][t]
            cell.imshow(grid[n, t].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
        axes[n][0].set_ylabel(labels[n], rotation=0, ha="right", va="center", fontsize=8)
    for t, value in enumerate(values):
        axes[0][t].set_title(f"{value:+.1f}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    _write(figure, path)


def draw_losses(path: str | os.PathLike[str], history: Mapping[str, Sequence[float]]) -> None:
    """Write the course of every term of a loss as one picture, a panel each: every step, and a running mean.

    Raises
    ------
    OSError
        The picture cannot be written.
    """
    figure = Figure(figsize=(3.2 * len(history), 2.6), layout="constrained")
    for panel, (name, values) in zip(figure.subplots(1, len(history), squeeze=False)[0], history.items(), strict=True):
        steps = np.arange(1, len(values) + 1)
        window = max(1, len(values) // 50)
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        panel.plot(steps, values, color="0.8", linewidth=0.6)
        panel.plot(steps[window - 1 :], smooth, color="C0", linewidth=1.2)
        panel.set(title=name, xlabel="step")
        panel.ticklabel_format(useOffset=False)
        # The first steps are far above all others and would flatten them.
        low, high = np.percentile(values, [0, 98])
        panel.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
    _write(figure, path)


def draw_recovery(
    path: str | os.PathLike[str],
    codes: Mapping[str, Mapping[str, np.ndarray]],
    latents: Mapping[str, np.ndarray],
) -> None:
    """Write true against recovered latents as one picture: a row for each manifold, a column for each method.

    Parameters
    ----------
    path : path-like
        Where.
    codes : mapping of str to mapping of str to ndarray, [n, d]
        By manifold, then by method; each column standardised and matched with the latent of the same number.
    latents : mapping of str to ndarray, [n, d]
        By manifold.

    Raises
    ------
    OSError
        The picture cannot be written.
    """
    methods = list(next(iter(codes.values())))
    figure = Figure(figsize=(2.2 + 1.5 * len(methods), 0.9 + 1.5 * len(codes)), layout="constrained")
    axes = figure.subplots(len(codes), len(methods), squeeze=False)
    for row, (name, found) in zip(axes, codes.items(), strict=True):
        truth = latents[name]
        truth = (truth - truth.mean(axis=0)) / truth.std(axis=0)
        for cell, method in zip(row, methods, strict=True):
            for k in range(truth.shape[1]):
                cell.scatter(truth[:, k], found[method][:, k], s=1, linewidths=0, color=f"C{k}")
            cell.set(xticks=[], yticks=[], xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
        row[0].set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    for cell, method in zip(axes[0], methods, strict=True):
        cell.set_title(method, fontsize=8)
    figure.supxlabel("true latent; a colour for each", fontsize=8)
    figure.supylabel("recovered", fontsize=8)
    _write(figure, path)


def _write(figure: Figure, path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
