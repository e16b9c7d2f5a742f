import pytest
import torch
from column_suite import ColumnSuite, Sample
from test_ddim_step import SCHEDULE
from test_sum_gradient_fields import draw

import fastdis
from fastdis import reference


def terms_sample(name, batch, factors, *size, **flags):
    return Sample(name, {
        "x": draw(batch, *size, seed=1), "noise": draw(batch, *size, seed=2),
        "fields": draw(batch, factors, *size, seed=3), "selected": torch.arange(batch) * 2 % max(factors, 1),
        "alpha_bar": torch.linspace(0.3, 0.8, batch, dtype=torch.float64),
        "alpha_bar_prev": torch.linspace(0.4, 0.85, batch, dtype=torch.float64),
    }, **flags)  # fmt: skip


class TestDisDiffTerms(ColumnSuite):
    name = "disdiff_terms"
    op = staticmethod(fastdis.disdiff_terms)
    reference = staticmethod(reference.disdiff_terms)

    def maps(self, name, tensor):
        # The schedule has to stay one.
        return [tensor, tensor.flip(0), 0.9 * tensor] if name in SCHEDULE else super().maps(name, tensor)

    @staticmethod
    def samples():
        return [
            terms_sample("image", 3, 6, 2, 3, 5),
            terms_sample("flat", 2, 3, 9),
            terms_sample("one_of_each", 1, 1, 1),
            terms_sample("blocks", 3, 5, 4100, gradcheck=False, slow_in_interpreter=True),
            terms_sample("one_sample", 1, 6, 3, 70, 60, gradcheck=False, slow_in_interpreter=True),
            terms_sample("stretches", 2, 12, 12300, gradcheck=False, slow_in_interpreter=True),
            terms_sample("no_sample", 0, 3, 4, empty=True),
        ]


def test_the_weight_spans_the_schedule_in_half_precision():
    """(1 - alpha_bar)^2 / alpha_bar goes from 2e-6 to 1.5e3."""
    alpha_bar = torch.tensor([0.9985, 6.7e-4])
    fields = torch.ones(2, 3, 8, dtype=torch.float16)
    x = torch.zeros(2, 8, dtype=torch.float16)
    weight = fastdis.disdiff_terms(x, x, fields, torch.tensor([0, 1]), alpha_bar, alpha_bar).weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, (1 - alpha_bar) ** 2 / alpha_bar, rtol=1e-5, atol=0)


def test_the_first_step_has_no_shift():
    x, noise, fields = torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 3, 5)
    terms = fastdis.disdiff_terms(x, noise, fields, torch.tensor([0, 1]), 0.9985, 1.0)
    torch.testing.assert_close(terms.noise, noise)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_output_alone_may_be_differentiated(index):
    x, noise, fields = (t.requires_grad_() for t in (draw(2, 5), draw(2, 5, seed=1), draw(2, 3, 5, seed=2)))
    alpha = torch.tensor([0.4, 0.5], dtype=torch.float64)
    arguments = (torch.tensor([2, 0]), alpha, alpha + 0.1)
    unused = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad(fastdis.disdiff_terms(x, noise, fields, *arguments)[index].sum(), (x, noise, fields))
    exact = torch.autograd.grad(
        reference.disdiff_terms(x, noise, fields, *arguments)[index].sum(), (x, noise, fields), **unused
    )
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)
    assert (ours[2].stride(1) == 0) is (index != 2)


def test_bad_selections_are_refused():
    x, noise, fields, first = torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 3, 5), torch.zeros(2).long()
    op = fastdis.disdiff_terms
    for kind, message, call in (
        (RuntimeError, r"selected\[1\] is 3; a factor from 0 to 2",
         lambda: op(x, noise, fields, torch.tensor([0, 3]), 0.5, 0.6)),
        (TypeError, "selected has dtype torch.float32; int64", lambda: op(x, noise, fields, torch.zeros(2), 0.5, 0.6)),
        (ValueError, r"selected has shape \[3\]; \[B\] of x",
         lambda: op(x, noise, fields, torch.zeros(3).long(), 0.5, 0.6)),
        (ValueError, r"fields has shape \[2, 0, 5\]; at least one",
         lambda: op(x, noise, fields[:, :0], first, 0.5, 0.6)),
        (ValueError, r"alpha_bar is 1.0; a number in \(0, 1\)", lambda: op(x, noise, fields, first, 1.0, 1.0)),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()
