"""Gram matrices of Jacobians in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def jacobian_gram(jacobian: Tensor) -> Tensor:
    """``J J^T`` of each sample's tangents [B, K, D], as [B, K, K]: the pull-back metric; at least in float32."""
    wide = jacobian.to(torch.promote_types(jacobian.dtype, torch.float32))
    return wide @ wide.mT
