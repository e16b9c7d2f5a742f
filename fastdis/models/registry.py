"""Models by name, as checkpoints keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdis.models.autoencoder import Autoencoder, GaussianVAE
from fastdis.models.latent_model import LatentModel
from fastdis.models.protovae import ProtoVAE
from fastdis.models.vae import VAE

MODELS: dict[str, type[LatentModel]] = {
    "VAE": VAE,
    "ProtoVAE": ProtoVAE,
    "Autoencoder": Autoencoder,
    "GaussianVAE": GaussianVAE,
}


def build_model(name: str, config: Mapping[str, Any]) -> LatentModel:
    """Make a model, with fresh weights, from its name and what its ``config()`` returned.

    Raises
    ------
    ValueError
        There is no such model, or it does not take such a configuration.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    try:
        return MODELS[name](**config)
    except TypeError as error:
        raise ValueError(f"{name} does not take the configuration {dict(config)}: {error}") from error
