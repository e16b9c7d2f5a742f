"""The tail of a DisDiff training step against eager code and torch.compile."""

import torch
from bench_sum_gradient_fields import read
from column_bench import Case, ColumnBench

import fastdis
from fastdis import reference

ALPHA_BAR, ALPHA_BAR_PREV = 0.5, 0.505


def case(name, batch, factors, *size, targets, quick=False):
    images = {
        "x": torch.randn(batch, *size),
        "noise": torch.randn(batch, *size),
        "fields": torch.randn(batch, factors, *size),
        "selected": torch.randint(0, factors, (batch,)),
    }

    def published(x, noise, fields, selected):
        """With numbers for coefficients and the selected field gathered."""
        a, b = ALPHA_BAR, ALPHA_BAR_PREV
        field = fields[torch.arange(batch, device=x.device), selected]
        shifted = noise - (a / b) ** 0.5 * (1 - b) / (1 - a) ** 0.5 * fields.sum(1)
        x0 = (x - (1 - a) ** 0.5 * noise) / a**0.5
        return shifted, x0, x0 + (1 - a) / a**0.5 * field, (1 - a) ** 2 / a * field.detach().flatten(1).square().mean(1)

    image, fields = images["x"].nbytes, images["fields"].nbytes
    forward = fields + 5 * image
    floor = {"forward": (forward, 0.0), "forward+backward": (forward + 5 * image + fields, 0.0)}
    return Case(name, images, {}, {"published": published}, floor, targets, quick, {"forward": {"read": read}})


class BenchDisDiffTerms(ColumnBench):
    name = "disdiff_terms"
    op = staticmethod(lambda **o: fastdis.disdiff_terms(**o, alpha_bar=ALPHA_BAR, alpha_bar_prev=ALPHA_BAR_PREV))

    @staticmethod
    def reference(x, **others):
        schedule = (x.new_full((len(x),), value) for value in (ALPHA_BAR, ALPHA_BAR_PREV))
        return reference.disdiff_terms(x, **others, **dict(zip(("alpha_bar", "alpha_bar_prev"), schedule, strict=True)))

    @staticmethod
    def cases():
        return [
            case("[32,20,3,64,64]", 32, 20, 3, 64, 64, targets={"forward+backward": {"fastest": 1.0}}),
            case("[128,6,3,16,16]", 128, 6, 3, 16, 16, targets={"forward+backward": {"fastest": 1.5}}, quick=True),
        ]
