"""Fast compiled PyTorch ops for unsupervised disentanglement, and the published systems built on them."""

from fastdis._build_info import build_info
from fastdis._version import __version__
from fastdis.ops import adain, prototype_distances, prototypical_loss, style_modulation

__all__ = ["__version__", "adain", "build_info", "prototype_distances", "prototypical_loss", "style_modulation"]
