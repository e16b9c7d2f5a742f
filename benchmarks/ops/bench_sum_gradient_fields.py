"""Sums of sub-gradient fields against a sum and an add, the loop of the published code, and torch.compile."""

import torch
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference
from fastdis.ops import _backends


def read(fields, **_):
    """One read of the fields, the largest input: the least that any of these ops can take."""
    return fields.sum()


def same_bytes(fields, **images):
    """Torch's own read of the fields, and a copy of each image: what is read and written, with nothing computed."""
    return fields.sum(), [image.clone() for image in images.values()]


class KernelsAlone(torch.autograd.Function):
    """Our two kernels and nothing else: no autograd function in Python can take less."""

    @staticmethod
    def forward(ctx, noise, fields, coefficient):
        ctx.shape, ctx.coefficient = fields.shape, coefficient
        return _backends.columns()["sum_gradient_fields"].kernels["cpu"].forward(noise, fields, coefficient, None)

    @staticmethod
    def backward(ctx, grad):
        kernel = _backends.columns()["sum_gradient_fields"].kernels["cpu"].backward
        return grad, kernel(grad, None, ctx.coefficient, None, True)[0].expand(ctx.shape), None


def case(name, batch, factors, *size, weighted=False, sets=1, targets, quick=False):
    noise, fields = torch.randn(batch, *size), torch.randn(batch, factors, *size)
    weights = torch.rand(factors) if weighted else None

    def loop(noise, fields):
        """As published: factor by factor."""
        total = torch.zeros_like(noise)
        for n in range(factors):
            total = total + (fields[:, n] if weights is None else weights[n] * fields[:, n])
        return noise - 0.5 * total

    def library(noise, fields):
        if weights is None:
            return torch.add(noise, fields.sum(1), alpha=-0.5)
        return torch.add(noise, torch.einsum("n,bn...->b...", weights, fields), alpha=-0.5)

    coefficient = torch.full((batch,), -0.5)

    def kernels(noise, fields):
        return KernelsAlone.apply(noise, fields, coefficient)

    forward = fields.nbytes + 2 * noise.nbytes
    floor = {"forward": (forward, 0.0), "forward+backward": (forward + 2 * noise.nbytes, 0.0)}
    return Case(
        name, {"noise": noise, "fields": fields}, {"coefficient": -0.5, "weights": weights},
        {"loop": loop, "library": library}, floor, targets, quick,
        {"forward": {"read": read, "same bytes": same_bytes},
         "forward+backward": {} if weighted else {"kernels": kernels}},
        sets=sets,
    )  # fmt: skip


class BenchSumGradientFields(ColumnBench):
    name = "sum_gradient_fields"
    op = staticmethod(fastdis.sum_gradient_fields)
    reference = staticmethod(reference.sum_gradient_fields)

    @staticmethod
    def cases():
        large = {"forward": {"read": 1 / 1.15}, "forward+backward": {"fastest": 1.0}}
        paper = {"forward+backward": {"fastest": 1.5}}
        return [
            case("[32,20,3,64,64]", 32, 20, 3, 64, 64, targets=large),
            case("from memory [32,20,3,64,64]", 32, 20, 3, 64, 64, sets=4, targets=large),
            case("[128,6,3,16,16]", 128, 6, 3, 16, 16, targets=paper, quick=True),
            case("weights [128,6,3,16,16]", 128, 6, 3, 16, 16, weighted=True, targets={}),
        ]
