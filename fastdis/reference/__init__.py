"""Every op in plain PyTorch, in the words of its paper: short, differentiable to any order, and the tests' oracle."""

from fastdis.reference.prototype_distances import prototype_distances
from fastdis.reference.prototypical_loss import prototypical_loss
from fastdis.reference.style_modulation import adain, style_modulation

__all__ = ["adain", "prototype_distances", "prototypical_loss", "style_modulation"]
