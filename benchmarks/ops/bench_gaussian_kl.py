"""The divergence from the standard normal against eager code, torch.distributions and torch.compile."""

import torch
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference


def case(batch, latents, *, targets, quick=False):
    tensors = {"mean": torch.randn(batch, latents), "logvar": torch.randn(batch, latents)}

    def written(mean, logvar):
        """The line of every VAE."""
        return -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=1).mean()

    def library(mean, logvar):
        normal = torch.distributions.Normal
        posterior = normal(mean, torch.exp(0.5 * logvar), validate_args=False)
        return torch.distributions.kl_divergence(posterior, normal(0.0, 1.0, validate_args=False)).sum(1).mean()

    size = tensors["mean"].nbytes
    floor = {"forward": (2 * size, 0.0), "forward+backward": (6 * size, 0.0)}
    peers = {"written": written, "library": library}
    return Case(f"[{batch},{latents}]", tensors, {}, peers, floor, {"forward+backward": targets}, quick)


class BenchGaussianKl(ColumnBench):
    name = "gaussian_kl"
    op = staticmethod(fastdis.gaussian_kl)
    reference = staticmethod(reference.gaussian_kl)

    @staticmethod
    def cases():
        return [case(64, 10, targets={"fastest": 1.0}, quick=True), case(4096, 128, targets={"fastest": 1.5})]
