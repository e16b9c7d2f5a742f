import uuid

import pytest
import torch
from column_suite import ColumnSuite, Sample
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdis
from fastdis import reference
from fastdis.ops import _checks


def draw(*size, seed=5):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fields_sample(name, batch, factors, *size, weights=None, coefficient=None, **flags):
    tensors = {"noise": draw(batch, *size), "fields": draw(batch, factors, *size, seed=6)}
    options = {}
    if coefficient is None:
        tensors["coefficient"] = draw(batch, seed=7)
    else:
        options["coefficient"] = coefficient
    if weights is not None:
        tensors["weights"] = draw(*((batch, factors) if weights == "each" else (factors,)), seed=8)
    return Sample(name, tensors, options, **flags)


class TestSumGradientFields(ColumnSuite):
    name = "sum_gradient_fields"
    op = staticmethod(fastdis.sum_gradient_fields)
    reference = staticmethod(reference.sum_gradient_fields)

    @staticmethod
    def samples():
        return [
            fields_sample("image", 3, 6, 2, 3, 5),
            fields_sample("number", 2, 5, 7, coefficient=-0.5),
            fields_sample("weights", 3, 4, 2, 3, weights="shared"),
            fields_sample("weights_each", 2, 3, 9, weights="each"),
            fields_sample("one_of_each", 1, 1, 1),
            fields_sample("blocks", 3, 5, 4100, weights="each", gradcheck=False, slow_in_interpreter=True),
            fields_sample("one_sample", 1, 7, 3, 70, 60, gradcheck=False, slow_in_interpreter=True),
            fields_sample("stretches", 2, 12, 12300, weights="each", gradcheck=False, slow_in_interpreter=True),
            fields_sample("no_sample", 0, 3, 4, weights="each", empty=True),
            fields_sample("no_factor", 2, 0, 4, weights="shared", empty=True),
            fields_sample("no_element", 2, 3, 0, empty=True),
        ]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_fields_is_expanded_where_all_are_the_same(weighted):
    noise, fields = torch.randn(4, 3, 8, 8), torch.randn(4, 6, 3, 8, 8, requires_grad=True)
    weights = torch.rand(6) if weighted else None
    shifted = fastdis.sum_gradient_fields(noise, fields, -0.3, weights=weights)
    (gradient,) = torch.autograd.grad(shifted, fields, torch.ones_like(shifted))
    assert (gradient.stride(1) == 0) is not weighted
    assert gradient.untyped_storage().nbytes() == (6 if weighted else 1) * noise.nbytes


def test_fields_are_kept_only_where_a_gradient_needs_them():
    noise, fields = torch.randn(2, 5), torch.randn(2, 3, 5, requires_grad=True)
    kept = lambda **o: [  # noqa: E731
        t.shape for t in fastdis.sum_gradient_fields(noise, fields, **o).grad_fn.saved_tensors
    ]
    assert fields.shape not in kept(coefficient=torch.ones(2))
    assert fields.shape in kept(coefficient=torch.ones(2, requires_grad=True))


def test_channels_last_images_stay_so_and_are_not_copied():
    noise = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    fields = torch.randn(2 * 3, 4, 5, 6).to(memory_format=torch.channels_last).unflatten(0, (2, 3))
    shifted = fastdis.sum_gradient_fields(noise, fields, 0.5)
    assert shifted.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(shifted, reference.sum_gradient_fields(noise, fields, 0.5))


@pytest.mark.parametrize("weighted", [False, True])
def test_any_number_of_factors(weighted):
    """The CPU kernel reads up to ten fields at once, and more five at a time."""
    for factors in range(32):
        noise, fields = draw(2, 67, seed=1).float(), draw(2, factors, 67, seed=2).float()
        weights = draw(factors, seed=3).float() if weighted else None
        shifted = fastdis.sum_gradient_fields(noise, fields, -0.5, weights=weights)
        exact = reference.sum_gradient_fields(noise.double(), fields.double(), -0.5, weights=weights)
        torch.testing.assert_close(shifted.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_a_number_that_was_first_met_under_a_mode_serves_outside_of_it(mode):
    number = uuid.uuid4().int / 2**128  # new in this process
    with mode():
        fastdis.sum_gradient_fields(torch.zeros(2, 5), torch.zeros(2, 3, 5), number)
    noise, fields = torch.randn(2, 5), torch.randn(2, 3, 5, requires_grad=True)
    shifted = fastdis.sum_gradient_fields(noise, fields, number)
    torch.testing.assert_close(torch.autograd.grad(shifted.sum(), fields)[0], torch.full_like(fields, number))


def test_a_number_that_was_first_met_under_a_transform_is_not_kept_in_its_wrapper():
    number = uuid.uuid4().int / 2**128
    noise, fields = torch.randn(2, 5), torch.randn(2, 3, 5)
    torch.func.grad(lambda fields: fastdis.sum_gradient_fields(noise, fields, number).sum())(fields)
    (kept,) = _checks.per_sample("noise", noise, coefficient=number)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(kept)


def test_constants_are_kept_for_a_few_numbers_only():
    noise, fields = torch.zeros(1, 5), torch.ones(1, 3, 5)
    for number in range(3 * _checks.KEPT):
        shifted = fastdis.sum_gradient_fields(noise, fields, number)
        assert torch.equal(shifted, torch.full_like(noise, 3 * number))
    assert len(_checks._kept) <= _checks.KEPT


def test_bad_arguments_are_refused_by_name():
    noise, fields = torch.randn(2, 5), torch.randn(2, 3, 5)
    op = fastdis.sum_gradient_fields
    for kind, message, call in (
        (ValueError, r"noise has shape \[2\]; \[B, \*\]", lambda: op(noise[:, 0], fields, 1.0)),
        (ValueError, r"fields has shape \[2, 3, 4\]; .*\[2, N, 5\]", lambda: op(noise, fields[..., :4], 1.0)),
        (TypeError, "fields has dtype torch.float64; that of noise", lambda: op(noise, fields.double(), 1.0)),
        (TypeError, "coefficient is a str; a tensor is needed", lambda: op(noise, fields, "1")),
        (ValueError, r"coefficient has shape \[3\]; \[B\] of noise", lambda: op(noise, fields, torch.ones(3))),
        (
            ValueError,
            r"weights has shape \[2\]; \[N\] = \[3\] or",
            lambda: op(noise, fields, 1.0, weights=torch.ones(2)),
        ),
    ):
        with pytest.raises(kind, match=message):
            call()
