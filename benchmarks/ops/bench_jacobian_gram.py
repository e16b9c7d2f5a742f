"""Gram matrices of Jacobians against batched products and torch.compile."""

import torch
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference


def case(name, batch, latents, dimensions, *, targets, quick=False):
    jacobian = torch.randn(batch, latents, dimensions) / dimensions**0.5
    half = batch * latents * (latents + 1) * dimensions
    floor = {"forward": (jacobian.nbytes, half), "forward+backward": (3 * jacobian.nbytes, 3.0 * half)}
    peers = {"library": lambda jacobian: torch.bmm(jacobian, jacobian.mT)}
    return Case(name, {"jacobian": jacobian}, {}, peers, floor, {"forward+backward": targets}, quick)


class BenchJacobianGram(ColumnBench):
    name = "jacobian_gram"
    op = staticmethod(fastdis.jacobian_gram)
    reference = staticmethod(reference.jacobian_gram)

    @staticmethod
    def cases():
        return [
            case("[64,16,12288]", 64, 16, 12288, targets={"fastest": 1.5}),
            case("[32,8,12288]", 32, 8, 12288, targets={"fastest": 1.5}, quick=True),
            case("[100,2,784]", 100, 2, 784, targets={"fastest": 1.5}),
        ]
