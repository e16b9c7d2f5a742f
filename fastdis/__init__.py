"""Fast compiled PyTorch ops for unsupervised disentanglement, and the published systems built on them."""

from fastdis import ops
from fastdis._build_info import build_info
from fastdis._version import __version__
from fastdis.ops import *  # noqa: F403

__all__ = ["__version__", "build_info", *ops.__all__]
