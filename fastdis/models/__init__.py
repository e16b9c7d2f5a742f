"""Disentangling models, and the autoencoders they are compared with."""

from fastdis.models.autoencoder import Autoencoder, GaussianVAE
from fastdis.models.latent_model import LatentModel
from fastdis.models.protovae import Episode, ProtoVAE
from fastdis.models.registry import MODELS, build_model
from fastdis.models.vae import VAE, ConvDecoder, ConvEncoder

__all__ = [
    "MODELS",
    "VAE",
    "Autoencoder",
    "ConvDecoder",
    "ConvEncoder",
    "Episode",
    "GaussianVAE",
    "LatentModel",
    "ProtoVAE",
    "build_model",
]
