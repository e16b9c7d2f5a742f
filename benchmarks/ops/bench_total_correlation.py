"""The aggregate divergence against the [B, B, K] form that everybody has, and torch.compile of it."""

import math

import torch
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference

DATASET_SIZE = 737_280


def case(batch, latents, *, targets, estimator="mws", quick=False, without=()):
    mean, logvar = torch.randn(batch, latents), torch.randn(batch, latents) - 2
    tensors = {"z": mean + torch.exp(logvar / 2) * torch.randn(batch, latents), "mean": mean, "logvar": logvar}

    def published(z, mean, logvar):
        """As in disentanglement_lib and its ports: the matrix of log densities, then two log-sum-exps."""
        pairs = -0.5 * (
            (z[:, None] - mean[None]) ** 2 * torch.exp(-logvar[None]) + logvar[None] + math.log(2 * math.pi)
        )
        base = math.log(batch * DATASET_SIZE)
        joint = torch.logsumexp(pairs.sum(2), 1) - base
        marginals = (torch.logsumexp(pairs, 1) - base).sum(1)
        posterior = -0.5 * ((z - mean) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(1)
        prior = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
        return (posterior - joint).mean(), (joint - marginals).mean(), (marginals - prior).mean()

    size = mean.nbytes
    # A power of two for each pair and dimension, and the joint one: some 20 operations forward, 30 backward.
    powers = float(batch * batch * (latents + 1))
    floor = {"forward": (4 * size, 20 * powers), "forward+backward": (11 * size, 50 * powers)}
    few = {k: t[:128] for k, t in tensors.items()}
    peers = {} if without or estimator == "mss" else {"published": published}
    return Case(
        f"{estimator} B{batch} K{latents}", tensors, {"dataset_size": DATASET_SIZE, "estimator": estimator}, peers,
        floor, {"forward+backward": targets}, quick, without=without, checked=few if without else None,
    )  # fmt: skip


class BenchTotalCorrelation(ColumnBench):
    name = "total_correlation"
    op = staticmethod(fastdis.total_correlation)
    reference = staticmethod(reference.total_correlation)

    @staticmethod
    def cases():
        return [
            case(64, 10, targets={"compile": 2.0}, quick=True),
            case(256, 10, targets={"compile": 3.0}),
            case(1024, 10, targets={"compile": 5.0, "eager": 20.0}),
            case(1024, 10, estimator="mss", targets={"compile": 5.0, "eager": 20.0}),
            case(4096, 10, targets={"compile": 5.0, "eager": 20.0}),
            case(4096, 64, targets={"compile": 5.0}, without=("eager",)),
        ]
