"""The ops. Each takes ``backend="auto"``, checks its arguments, and differentiates by compiled kernels."""

from fastdis.ops.prototype_distances import prototype_distances
from fastdis.ops.prototypical_loss import prototypical_loss
from fastdis.ops.style_modulation import adain, style_modulation

__all__ = ["adain", "prototype_distances", "prototypical_loss", "style_modulation"]
