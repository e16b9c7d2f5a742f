"""Gram matrices of Jacobians in Triton."""

from __future__ import annotations

from torch import Tensor

from fastdis.kernels.gram import gram, product


def forward(jacobian: Tensor) -> Tensor:
    """Compute ``J J^T`` of each sample.

    Parameters
    ----------
    jacobian : Tensor [B, K, D]
        Contiguous or a transposed contiguous [K, B, D]; anything else is copied.

    Returns
    -------
    Tensor [B, K, K]
        In the statistics dtype.
    """
    return gram(jacobian)


def backward(grad: Tensor, jacobian: Tensor) -> Tensor:
    """Gradient of :func:`forward` from grad [B, K, K]: ``(grad + grad^T) J``, [B, K, D] in J's dtype and layout."""
    return product(grad + grad.mT, jacobian)
