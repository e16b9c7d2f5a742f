"""The decomposition of the aggregate divergence in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ESTIMATORS = ("mws", "mss")


def total_correlation(
    z: Tensor, mean: Tensor, logvar: Tensor, *, dataset_size: int, estimator: str = "mws"
) -> tuple[Tensor, Tensor, Tensor]:
    """Mutual information, total correlation and dimension-wise divergence of z, mean and logvar, [*, B, K] each.

    Chen et al. (2018), eq. 2, by minibatch-weighted ("mws", eq. 5) or stratified ("mss", appendix C.2) sampling.
    Returns three tensors [*], at least in float32.
    """
    z, mean, logvar = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (z, mean, logvar))

    def log_density(value: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        return -0.5 * ((value - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))

    log_weights = log_importance_weights(z.shape[-2], dataset_size, estimator, z.device).to(z.dtype)
    pairs = log_density(z.unsqueeze(-2), mean.unsqueeze(-3), logvar.unsqueeze(-3))
    log_joint = torch.logsumexp(pairs.sum(-1) + log_weights, dim=-1)
    log_marginals = torch.logsumexp(pairs + log_weights.unsqueeze(-1), dim=-2).sum(-1)
    log_posterior = log_density(z, mean, logvar).sum(-1)
    log_prior = log_density(z, torch.zeros_like(z), torch.zeros_like(z)).sum(-1)
    return (
        (log_posterior - log_joint).mean(-1),
        (log_joint - log_marginals).mean(-1),
        (log_marginals - log_prior).mean(-1),
    )


def log_importance_weights(batch: int, dataset_size: int, estimator: str, device: torch.device | None = None) -> Tensor:
    """``log w_ij`` [B, B], the weight of x_j in the estimate of q(z_i).

    mws: 1 / (B N) each. mss, with M = B - 1: 1 / N on the diagonal, (N - M) / (N M) right of it (cyclically), 1 / M
    elsewhere, so that rows sum to 1. The widely copied code puts the 1 / N into the first column instead.
    """
    if estimator == "mws":
        value = -math.log(batch * dataset_size) if batch else 0.0
        return torch.full((batch, batch), value, dtype=torch.float64, device=device)
    others = batch - 1
    weights = torch.full((batch, batch), 1 / max(others, 1), dtype=torch.float64, device=device)
    rows = torch.arange(batch, device=device)
    weights[rows, (rows + 1) % max(batch, 1)] = (dataset_size - others) / (dataset_size * max(others, 1))
    weights[rows, rows] = 1 / dataset_size
    return weights.log()
