"""Hessian eigenmaps and independent components, as scikit-learn estimators."""

from fastdis.spectral.fast_ica import FastICA
from fastdis.spectral.hessian_eigenmap import HessianEigenmap
from fastdis.spectral.spectral_disentangler import SpectralDisentangler

__all__ = ["FastICA", "HessianEigenmap", "SpectralDisentangler"]
