"""Penalties of Jacobians against batched products, traces of squares, and torch.compile."""

import torch
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference
from fastdis.reference.isometry_penalty import KINDS


def by_traces(jacobian, kind):
    """From t = ||J||^2 and q = ||J J^T||^2 alone, as the papers' code has it."""
    latents = jacobian.shape[1]
    gram = torch.einsum("bkd,bld->bkl", jacobian, jacobian)
    t, q = jacobian.square().sum((1, 2)), gram.square().sum((1, 2))
    if kind == "isometry":
        return (q - 2 * t + latents).mean()
    if kind == "scaled_isometry":
        return q.mean() - t.mean() ** 2 / latents
    if kind == "conformal":
        return (q - t**2 / latents).mean()
    if kind == "relaxed_distortion":
        return q.mean() / t.mean() ** 2
    return (q - gram.diagonal(dim1=1, dim2=2).square().sum(1)).mean()


def case(batch, latents, dimensions, kind, target, quick=False):
    jacobian = torch.randn(batch, latents, dimensions) / dimensions**0.5
    half = batch * latents * (latents + 1) * dimensions
    floor = {"forward": (jacobian.nbytes, half), "forward+backward": (3 * jacobian.nbytes, 3.0 * half)}
    peers = {"traces": lambda jacobian: by_traces(jacobian, kind)}
    targets = {"forward+backward": {"fastest": target}}
    name = f"{kind} [{batch},{latents},{dimensions}]"
    return Case(name, {"jacobian": jacobian}, {"kind": kind}, peers, floor, targets, quick)


class BenchIsometryPenalty(ColumnBench):
    name = "isometry_penalty"
    op = staticmethod(fastdis.isometry_penalty)
    reference = staticmethod(reference.isometry_penalty)

    @staticmethod
    def cases():
        sizes = ((64, 16, 12288, 2.5), (32, 8, 12288, 3.0), (100, 2, 784, 3.0))
        return [
            case(*size, kind, target, quick=size[0] == 100 and kind == "isometry")
            for *size, target in sizes
            for kind in KINDS
        ]
