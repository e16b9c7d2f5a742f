"""Prototypical loss against the original code, the expanded form, torch.cdist and torch.compile."""

import torch
import torch.nn.functional as F
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference


def case(name, episodes, queries, prototypes, dimensions, *, targets, quick=False):
    tensors = {
        "queries": 0.3 * torch.randn(episodes, queries, dimensions),
        "prototypes": 0.3 * torch.randn(episodes, prototypes, dimensions),
        "labels": torch.randint(0, prototypes, (episodes, queries)),
    }

    def expanded(queries, prototypes, labels):
        """The matrix-product form that people write for speed; it is not centred."""
        logits = 2 * queries @ prototypes.mT - prototypes.square().sum(-1).unsqueeze(-2)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def library(queries, prototypes, labels):
        return F.cross_entropy(-torch.cdist(queries, prototypes).square().flatten(0, -2), labels.flatten())

    compiled = torch.compile(expanded, dynamic=False)
    small = tensors["queries"].nbytes + tensors["prototypes"].nbytes
    flops = 2.0 * episodes * queries * prototypes * dimensions
    floor = {"forward": (small, flops), "forward+backward": (3 * small, 3 * flops)}
    peers = {"expanded": expanded, "expanded compiled": compiled, "library": library}
    return Case(name, tensors, {}, peers, floor, {"forward+backward": targets}, quick)


class BenchPrototypicalLoss(ColumnBench):
    name = "prototypical_loss"
    op = staticmethod(fastdis.prototypical_loss)
    reference = staticmethod(reference.prototypical_loss)

    @staticmethod
    def cases():
        return [
            case("E1 Q50 N10 D64", 1, 50, 10, 64, targets={"fastest": 1.5}, quick=True),
            case("E1 Q450 N30 D1600", 1, 450, 30, 1600, targets={"fastest": 1.5}),
            case("E16 Q512 N64 D64", 16, 512, 64, 64, targets={"fastest": 1.4}),
        ]
