"""Hessian eigenmaps and independent components, as scikit-learn estimators."""

try:
    import scipy  # noqa: F401
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError("fastdis.spectral needs scikit-learn and SciPy: pip install 'fastdis[spectral]'") from error

from fastdis.spectral.fast_ica import FastICA
from fastdis.spectral.hessian_eigenmap import HessianEigenmap
from fastdis.spectral.spectral_disentangler import SpectralDisentangler

__all__ = ["FastICA", "HessianEigenmap", "SpectralDisentangler"]
