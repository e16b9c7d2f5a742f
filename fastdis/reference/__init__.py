"""Every op in plain PyTorch, in the words of its paper: short, differentiable to any order, and the tests' oracle."""

from fastdis.reference.ddim_step import ddim_step
from fastdis.reference.decoder_jacobian import decoder_jacobian
from fastdis.reference.disdiff_terms import disdiff_terms
from fastdis.reference.gaussian_kl import gaussian_kl
from fastdis.reference.isometry_penalty import isometry_penalty
from fastdis.reference.jacobian_gram import jacobian_gram
from fastdis.reference.prototype_distances import prototype_distances
from fastdis.reference.prototypical_loss import prototypical_loss
from fastdis.reference.reparameterize import reparameterize
from fastdis.reference.style_modulation import adain, style_modulation
from fastdis.reference.sum_gradient_fields import sum_gradient_fields
from fastdis.reference.tangent_activation import tangent_activation
from fastdis.reference.total_correlation import total_correlation

__all__ = [
    "adain",
    "ddim_step",
    "decoder_jacobian",
    "disdiff_terms",
    "gaussian_kl",
    "isometry_penalty",
    "jacobian_gram",
    "prototype_distances",
    "prototypical_loss",
    "reparameterize",
    "style_modulation",
    "sum_gradient_fields",
    "tangent_activation",
    "total_correlation",
]
