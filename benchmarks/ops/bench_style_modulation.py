"""Style modulation against eager code, torch's own normalisations, and torch.compile."""

import torch
import torch.nn.functional as F
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference


def case(name, shape, *, groups, activation="none", channels_last=False, targets, quick=False):
    x = torch.randn(shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    channels = shape[1]
    act = {"none": lambda t: t, "silu": F.silu, "leaky_relu": F.leaky_relu}[activation]

    def composed(x, scale, shift):
        """As people write it: mean, standard deviation, scale and shift."""
        grouped = x.reshape(x.shape[0], groups, -1)
        mean, std = grouped.mean(-1, keepdim=True), (grouped.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return act(((grouped - mean) / std).reshape(x.shape) * scale[..., None, None] + shift[..., None, None])

    def library(x, scale, shift):
        normalised = F.instance_norm(x) if groups == channels else F.group_norm(x, groups)
        return act(normalised * scale[..., None, None] + shift[..., None, None])

    # Each input read once and each output written once: x and y; then dy and x again, and dx.
    floor = {"forward": (2 * x.nbytes, 0.0), "forward+backward": (5 * x.nbytes, 0.0)}
    tensors = {"x": x, "scale": 1 + 0.1 * torch.randn(shape[:2]), "shift": torch.randn(shape[:2])}
    options = {"groups": groups, "activation": activation}
    # The forward pass has to be within 1.4 times of a clone of the same tensor.
    wanted = {"forward": {"clone": 1 / 1.4}, "forward+backward": targets}
    return Case(name, tensors, options, {"composed": composed, "library": library}, floor, wanted, quick)


class BenchStyleModulation(ColumnBench):
    name = "style_modulation"
    op = staticmethod(fastdis.style_modulation)
    reference = staticmethod(reference.style_modulation)

    @staticmethod
    def cases():
        return [
            case("instance [32,128,32,32]", (32, 128, 32, 32), groups=128,
                 targets={"fastest": 1.0, "library": 2.5}, quick=True),
            case("instance [8,256,64,64]", (8, 256, 64, 64), groups=256, targets={"fastest": 1.0, "library": 2.5}),
            case("instance leaky [8,256,64,64]", (8, 256, 64, 64), groups=256, activation="leaky_relu",
                 targets={"fastest": 1.15}),
            case("32 groups silu [128,64,16,16]", (128, 64, 16, 16), groups=32, activation="silu",
                 targets={"fastest": 2.0}),
            case("32 groups silu [32,128,32,32]", (32, 128, 32, 32), groups=32, activation="silu",
                 targets={"fastest": 2.0}, quick=True),
            case("instance last [8,128,64,64]", (8, 128, 64, 64), groups=128, channels_last=True,
                 targets={"fastest": 1.4}),
            case("32 groups silu last [32,128,32,32]", (32, 128, 32, 32), groups=32, activation="silu",
                 channels_last=True, targets={"fastest": 2.0}),
            case("instance [4,64,8,8]", (4, 64, 8, 8), groups=64, targets={"fastest": 1.0}),
        ]  # fmt: skip
