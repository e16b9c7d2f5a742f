"""Draws from the posterior, alone and with its divergence, against eager code and torch.compile."""

import torch
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference


class BenchReparameterize(ColumnBench):
    """Every contender draws its own noise; the check holds ours to the reference's, seeded alike."""

    name = "reparameterize"
    op = staticmethod(fastdis.reparameterize)

    @staticmethod
    def reference(mean, logvar):
        return reference.reparameterize(mean, logvar, torch.randint(2**63 - 1, (1,), device=mean.device))

    @staticmethod
    def cases():
        def written(mean, logvar):
            return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)

        return [posterior(size, {"written": written}, quick=size[0] == 64) for size in ((64, 10), (4096, 128))]

    @staticmethod
    def check(ours, reference, case):
        def seeded(function):
            def call(**tensors):
                torch.manual_seed(0)
                return function(**tensors)

            return call

        return ColumnBench.check(seeded(ours), seeded(reference), case)


class BenchPosterior(BenchReparameterize):
    """A draw and the divergence together, as every step of a VAE has them."""

    name = "reparameterize"

    @staticmethod
    def op(mean, logvar, backend):
        z = fastdis.reparameterize(mean, logvar, backend=backend)
        return z, fastdis.gaussian_kl(mean, logvar, backend=backend)

    @staticmethod
    def reference(mean, logvar):
        return BenchReparameterize.reference(mean, logvar), reference.gaussian_kl(mean, logvar)

    @staticmethod
    def cases():
        def written(mean, logvar):
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            return z, -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=1).mean()

        return [
            posterior((64, 10), {"written": written, "written compiled": torch.compile(written, dynamic=False)},
                      name="with gaussian_kl ", targets={"fastest": 1.0}, quick=True),
            posterior((4096, 128), {"written": written, "written compiled": torch.compile(written, dynamic=False)},
                      name="with gaussian_kl ", targets={"fastest": 1.5}),
        ]  # fmt: skip


def posterior(size, peers, *, name="", targets=None, quick=False):
    tensors = {"mean": torch.randn(size), "logvar": torch.randn(size)}
    nbytes = tensors["mean"].nbytes
    floor = {"forward": (3 * nbytes, 0.0), "forward+backward": (6 * nbytes, 0.0)}
    return Case(f"{name}{list(size)}", tensors, {}, peers, floor, {"forward+backward": targets or {}}, quick)
