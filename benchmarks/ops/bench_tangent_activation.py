"""Activations with tangents against eager code and torch.compile."""

import torch
import torch.nn.functional as F
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference


def case(name, activation, *size, targets, quick=False):
    rows = torch.randn(size)

    def written(rows, bias):
        """Value and slope by hand, as hand-written forward mode has it."""
        a = rows[:1] + bias.reshape(-1, *(1,) * (rows.dim() - 3))
        if activation == "relu":
            return torch.cat([F.relu(a), rows[1:] * (a > 0)])
        s = torch.sigmoid(a)
        return torch.cat([a * s, rows[1:] * (s * (1 + a * (1 - s)))])

    floor = {"forward": (2 * rows.nbytes, 0.0), "forward+backward": (5 * rows.nbytes, 0.0)}
    tensors = {"rows": rows, "bias": torch.randn(size[2])}
    return Case(name, tensors, {"activation": activation}, {"written": written}, floor,
                {"forward+backward": targets}, quick)  # fmt: skip


class BenchTangentActivation(ColumnBench):
    name = "tangent_activation"
    op = staticmethod(fastdis.tangent_activation)
    reference = staticmethod(reference.tangent_activation)

    @staticmethod
    def cases():
        return [
            case("relu [1+8,100,256]", "relu", 9, 100, 256, targets={"fastest": 1.0}, quick=True),
            case("silu [1+8,100,256]", "silu", 9, 100, 256, targets={"fastest": 1.0}),
            case("relu [1+8,8,32,32,32]", "relu", 9, 8, 32, 32, 32, targets={"fastest": 1.0}),
        ]
