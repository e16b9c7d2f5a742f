"""A DDIM step under sub-gradient fields against eager code as published and torch.compile."""

import torch
from bench_sum_gradient_fields import read, same_bytes
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference
from fastdis.ops import _backends


class KernelsAlone(torch.autograd.Function):
    """Our two kernels and nothing else: no autograd function in Python can take less."""

    @staticmethod
    def forward(ctx, x, noise, fields, schedule):
        ctx.shape, ctx.schedule = fields.shape, schedule
        return _backends.columns()["ddim_step"].kernels["cpu"].forward(x, noise, fields, *schedule, None, None)

    @staticmethod
    def backward(ctx, grad_prev, grad_x0):
        kernel = _backends.columns()["ddim_step"].kernels["cpu"].backward
        dx, dnoise, dtotal, _ = kernel(grad_prev, grad_x0, *ctx.schedule, True, True, True, False)
        return dx, dnoise, dtotal.expand(ctx.shape), None


def case(name, batch, factors, *size, eta=False, sets=1, targets, quick=False):
    images = {"x": torch.randn(batch, *size), "noise": torch.randn(batch, *size),
              "fields": torch.randn(batch, factors, *size)}  # fmt: skip
    options = {"alpha_bar": 0.5, "alpha_bar_prev": 0.55}
    if eta:
        images["eta_noise"] = torch.randn(batch, *size)
        options["sigma"] = 0.1
    a, b, s = options["alpha_bar"], options["alpha_bar_prev"], options.get("sigma", 0.0)

    def library(x, noise, fields, eta_noise=None):
        """The same with the library's fused multiply-adds and numbers for coefficients."""
        e = torch.add(noise, fields.sum(1), alpha=-((1 - a) ** 0.5))
        x0 = torch.add(x, e, alpha=-((1 - a) ** 0.5)) / a**0.5
        x_prev = torch.add(b**0.5 * x0, e, alpha=(1 - b - s**2) ** 0.5)
        return (x_prev if eta_noise is None else torch.add(x_prev, eta_noise, alpha=s)), x0

    schedule = [torch.full((batch,), value) for value in (a, b, s)]

    def kernels(x, noise, fields):
        return KernelsAlone.apply(x, noise, fields, schedule)

    image, fields = images["x"].nbytes, images["fields"].nbytes
    forward = fields + (4 + eta) * image
    floor = {"forward": (forward, 0.0), "forward+backward": (forward + (5 + eta) * image, 0.0)}
    beside = {
        "forward": {"read": read} if eta else {"read": read, "same bytes": same_bytes},
        "forward+backward": {} if eta else {"kernels": kernels},
    }
    return Case(name, images, options, {"library": library}, floor, targets, quick, beside, sets=sets)


class BenchDdimStep(ColumnBench):
    name = "ddim_step"
    op = staticmethod(fastdis.ddim_step)
    reference = staticmethod(reference.ddim_step)

    @staticmethod
    def cases():
        large = {"forward": {"read": 1 / 1.15}, "forward+backward": {"fastest": 1.0}}
        paper = {"forward+backward": {"fastest": 1.5}}
        return [
            case("[32,20,3,64,64]", 32, 20, 3, 64, 64, targets=large),
            case("from memory [32,20,3,64,64]", 32, 20, 3, 64, 64, sets=4, targets=large),
            case("[128,6,3,16,16]", 128, 6, 3, 16, 16, targets=paper, quick=True),
            case("eta [128,6,3,16,16]", 128, 6, 3, 16, 16, eta=True, targets=paper),
        ]
