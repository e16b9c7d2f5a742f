"""Squared distances to prototypes against broadcasting, torch.cdist and torch.compile."""

import torch
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference


def case(name, episodes, queries, prototypes, dimensions, *, targets, quick=False):
    q, p = torch.randn(episodes, queries, dimensions), torch.randn(episodes, prototypes, dimensions)

    def expanded(queries, prototypes):
        """The matrix-product form that people write for speed; it is not centred."""
        products = queries @ prototypes.mT
        return (
            queries.square().sum(-1, keepdim=True) - 2 * products + prototypes.square().sum(-1).unsqueeze(-2)
        ).clamp_min(0)

    def cdist(queries, prototypes):
        return torch.cdist(queries, prototypes).square()

    small = q.nbytes + p.nbytes
    result = 4 * episodes * queries * prototypes
    flops = 2.0 * episodes * queries * prototypes * dimensions
    floor = {"forward": (small + result, flops), "forward+backward": (3 * small + 2 * result, 3 * flops)}
    peers = {"expanded": expanded, "library": cdist}
    return Case(name, {"queries": q, "prototypes": p}, {}, peers, floor, {"forward+backward": targets}, quick)


class BenchPrototypeDistances(ColumnBench):
    name = "prototype_distances"
    op = staticmethod(fastdis.prototype_distances)
    reference = staticmethod(reference.prototype_distances)

    @staticmethod
    def cases():
        return [
            case("E1 Q50 N10 D64", 1, 50, 10, 64, targets={"fastest": 1.0}, quick=True),
            case("E1 Q450 N30 D1600", 1, 450, 30, 1600, targets={"fastest": 1.0}),
            case("E16 Q512 N64 D64", 16, 512, 64, 64, targets={"fastest": 1.0}),
        ]
