import pytest
import torch
import torch.nn.functional as F
from column_suite import ColumnSuite, Sample

import fastdis
from fastdis import reference


def episode(name, queries, prototypes, *, reduction="mean", scale=0.5, **flags):
    generator = torch.Generator().manual_seed(5)
    draw = lambda size: scale * torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(0, prototypes[-2], queries[:-1], generator=generator)
    tensors = {"queries": draw(queries), "prototypes": draw(prototypes), "labels": labels}
    return Sample(name, tensors, {"reduction": reduction}, **flags)


class TestPrototypicalLoss(ColumnSuite):
    name = "prototypical_loss"
    op = staticmethod(fastdis.prototypical_loss)
    reference = staticmethod(reference.prototypical_loss)
    # A logit is a difference of terms the size of |q|^2, about 8 here, so its rounding moves a probability by 8 eps.
    roundings = 16

    @staticmethod
    def samples():
        return [
            episode("small", (5, 3), (4, 3)),
            episode("sum", (3, 7, 5), (3, 2, 5), reduction="sum"),
            episode("none", (2, 2, 3, 4), (2, 2, 5, 4), reduction="none"),
            episode("none_flat", (6, 4), (5, 4), reduction="none"),
            episode("one_of_each", (1, 1, 1), (1, 1, 1)),
            episode("one_prototype", (4, 3), (1, 3)),
            episode("blocks", (2, 70, 33), (2, 19, 33), gradcheck=False, slow_in_interpreter=True),
            episode("chunks", (1, 150, 96), (1, 40, 96), gradcheck=False, scale=0.2, slow_in_interpreter=True),
            episode("no_episode", (0, 3, 2), (0, 2, 2), reduction="sum", empty=True),
            episode("no_query", (1, 0, 2), (1, 3, 2), empty=True),
            episode("no_query_none", (1, 0, 2), (1, 3, 2), reduction="none", empty=True),
            episode("no_dimension", (1, 3, 0), (1, 2, 0), empty=True),
        ]


def test_it_is_the_cross_entropy_of_the_distances():
    queries, prototypes, labels = torch.randn(75, 64), torch.randn(5, 64), torch.arange(5).repeat_interleave(15)
    exact = F.cross_entropy(-torch.cdist(queries.double(), prototypes.double()).square(), labels)
    torch.testing.assert_close(
        fastdis.prototypical_loss(queries, prototypes, labels).double(), exact, rtol=1e-5, atol=1e-5
    )


def test_a_common_translation_changes_nothing():
    queries, prototypes, labels = torch.randn(40, 16), torch.randn(7, 16), torch.arange(40) % 7
    here = fastdis.prototypical_loss(queries.double(), prototypes.double(), labels)
    there = fastdis.prototypical_loss(queries.double() + 1e3, prototypes.double() + 1e3, labels)
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


def test_a_common_offset_costs_no_digits():
    generator = torch.Generator().manual_seed(1)
    base = 50 + torch.randn(1, 64, generator=generator)
    queries = (base + 6e-3 * torch.randn(256, 64, generator=generator)).requires_grad_()
    prototypes = base + 6e-3 * torch.randn(32, 64, generator=generator)
    labels = torch.arange(256) % 32
    exact_queries = queries.detach().double().requires_grad_()
    exact = reference.prototypical_loss(exact_queries, prototypes.double(), labels, reduction="none")
    ours = fastdis.prototypical_loss(queries, prototypes, labels, reduction="none")
    assert ((ours - exact).abs() / exact).max() < 1e-4
    (ours_gradient,) = torch.autograd.grad(ours.sum(), queries)
    (gradient,) = torch.autograd.grad(exact.sum(), exact_queries)
    assert (ours_gradient - gradient).abs().max() / gradient.abs().max() < 1e-4


def test_confident_and_hopeless_queries_stay_finite():
    prototypes = 100 * torch.eye(8)
    labels = torch.tensor([0, 1, 2, 3])
    queries = prototypes[[0, 1, 3, 2]].clone().requires_grad_()
    loss = fastdis.prototypical_loss(queries, prototypes, labels, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 2e4, 2e4]))
    (gradient,) = torch.autograd.grad(loss.sum(), queries)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("label", [-1, 3, -100, 2**40])
def test_labels_out_of_range_are_refused(label):
    labels = torch.tensor([0, label, 1])
    with pytest.raises(RuntimeError, match=rf"labels holds {label} at position 1; allowed are 0 to 2"):
        fastdis.prototypical_loss(torch.randn(3, 4), torch.randn(3, 4), labels)


def test_bad_input_is_refused_by_name():
    q, p, y = torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64)
    loss = fastdis.prototypical_loss
    for kind, message, call in (
        (TypeError, "labels has dtype torch.float32; int64 is needed", lambda: loss(q, p, y.float())),
        (TypeError, "labels has dtype torch.int32; int64 is needed", lambda: loss(q, p, y.int())),
        (ValueError, r"labels has shape \[5\]; \[\*, Q\] of queries = \[2, 5\]", lambda: loss(q, p, y[0])),
        (ValueError, "prototypes has no rows", lambda: loss(q, p[:, :0], y)),
        (
            ValueError,
            "reduction is 'median'; allowed are 'none', 'mean', 'sum'",
            lambda: loss(q, p, y, reduction="median"),
        ),
        (TypeError, "prototypes has dtype torch.float64; that of queries", lambda: loss(q, p.double(), y)),
    ):
        with pytest.raises(kind, match=message):
            call()
