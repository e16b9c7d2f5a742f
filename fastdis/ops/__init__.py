"""The ops. Each takes ``backend="auto"``, checks its arguments, and differentiates by compiled kernels."""

from fastdis.ops.ddim_step import ddim_step
from fastdis.ops.decoder_jacobian import decoder_isometry_penalty, decoder_jacobian
from fastdis.ops.disdiff_terms import DisDiffTerms, disdiff_terms
from fastdis.ops.gaussian_kl import gaussian_kl
from fastdis.ops.isometry_penalty import isometry_penalty
from fastdis.ops.jacobian_gram import jacobian_gram
from fastdis.ops.prototype_distances import prototype_distances
from fastdis.ops.prototypical_loss import prototypical_loss
from fastdis.ops.reparameterize import reparameterize
from fastdis.ops.style_modulation import adain, style_modulation
from fastdis.ops.sum_gradient_fields import sum_gradient_fields
from fastdis.ops.tangent_activation import tangent_activation
from fastdis.ops.total_correlation import AggregateDivergence, total_correlation

__all__ = [
    "AggregateDivergence",
    "DisDiffTerms",
    "adain",
    "ddim_step",
    "decoder_isometry_penalty",
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
