"""Disentangling models, and the VAE family they are compared with."""

from fastdis.models.protovae import Episode, ProtoVAE
from fastdis.models.registry import MODELS, build_model
from fastdis.models.vae import VAE, ConvDecoder, ConvEncoder

__all__ = ["MODELS", "VAE", "ConvDecoder", "ConvEncoder", "Episode", "ProtoVAE", "build_model"]
