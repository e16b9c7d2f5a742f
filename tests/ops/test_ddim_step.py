import itertools

import pytest
import torch
from column_suite import ColumnSuite, Sample
from test_sum_gradient_fields import draw

import fastdis
from fastdis import reference

SCHEDULE = ("alpha_bar", "alpha_bar_prev", "sigma")


def step_sample(name, batch, factors, *size, weights=None, eta=False, schedule=True, **flags):
    images = {"x": draw(batch, *size, seed=1), "noise": draw(batch, *size, seed=2),
              "fields": draw(batch, factors, *size, seed=3)}  # fmt: skip
    options = {}
    if schedule:
        images["alpha_bar"] = torch.linspace(0.3, 0.8, batch, dtype=torch.float64)
        images["alpha_bar_prev"] = torch.linspace(0.4, 0.85, batch, dtype=torch.float64)
    else:
        options = {"alpha_bar": 0.5, "alpha_bar_prev": 0.75}
    if weights is not None:
        images["weights"] = draw(*((batch, factors) if weights == "each" else (factors,)), seed=4)
    if eta:
        images["eta_noise"] = draw(batch, *size, seed=5)
        if schedule:
            images["sigma"] = torch.linspace(0.1, 0.3, batch, dtype=torch.float64)
        else:
            options["sigma"] = 0.25
    return Sample(name, images, options, **flags)


class TestDdimStep(ColumnSuite):
    name = "ddim_step"
    op = staticmethod(fastdis.ddim_step)
    reference = staticmethod(reference.ddim_step)

    def maps(self, name, tensor):
        # The schedule has to stay one.
        return [tensor, tensor.flip(0), 0.9 * tensor] if name in SCHEDULE else super().maps(name, tensor)

    @staticmethod
    def samples():
        return [
            step_sample("image", 3, 6, 2, 3, 5, schedule=False),
            step_sample("schedule", 3, 2, 7),
            step_sample("eta", 2, 3, 9, weights="shared", eta=True, schedule=False),
            step_sample("everything", 2, 3, 4, weights="each", eta=True),
            step_sample("one_of_each", 1, 1, 1, schedule=False),
            step_sample("blocks", 3, 5, 4100, weights="each", eta=True, gradcheck=False, slow_in_interpreter=True),
            step_sample("stretches", 2, 12, 12300, eta=True, gradcheck=False, slow_in_interpreter=True),
            step_sample(
                "stretches_without_eta", 2, 11, 12300, schedule=False, gradcheck=False, slow_in_interpreter=True
            ),
            step_sample("no_sample", 0, 3, 4, eta=True, empty=True, schedule=False),
            step_sample("no_element", 2, 3, 0, empty=True, schedule=False),
        ]


def test_steps_lead_from_noise_to_the_data_that_an_exact_model_knows():
    """With the true noise of one image as the prediction and fields that cancel, x0 is that image at every step."""
    image, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    fields = torch.stack([noise, -noise], 1)
    alphas = torch.linspace(0.02, 1.0, 30, dtype=torch.float64).tolist()
    x = alphas[0] ** 0.5 * image + (1 - alphas[0]) ** 0.5 * noise
    for now, then in itertools.pairwise(alphas):
        x, x0 = fastdis.ddim_step(x, noise, fields, now, then)
        torch.testing.assert_close(x0, image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x, image, rtol=1e-4, atol=1e-4)


def test_one_output_alone_may_be_differentiated():
    x, noise, fields = (t.requires_grad_() for t in (draw(2, 5), draw(2, 5, seed=1), draw(2, 3, 5, seed=2)))
    for index in (0, 1):
        ours = torch.autograd.grad(fastdis.ddim_step(x, noise, fields, 0.5, 0.6)[index].sum(), (x, noise, fields))
        exact = torch.autograd.grad(reference.ddim_step(x, noise, fields, 0.5, 0.6)[index].sum(), (x, noise, fields))
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivatives_at_the_last_step_are_finite():
    """There the derivative by alpha_bar_prev, which nobody asks for, is infinite."""
    images = [draw(2, 5), draw(2, 5, seed=1), draw(2, 3, 5, seed=2)]

    def second(op):
        leaves = [t.clone().requires_grad_() for t in images]
        grads = [torch.ones(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        first = torch.autograd.grad(list(op(*leaves, 0.9, 1.0)), leaves, grads, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), grads)

    for ours, exact in zip(second(fastdis.ddim_step), second(reference.ddim_step), strict=True):
        torch.testing.assert_close(ours, exact)


def test_the_largest_sigma_leaves_nothing_under_the_root():
    x, noise, fields = torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 3, 5)
    x_prev, _ = fastdis.ddim_step(x, noise, fields, 0.5, 0.7, sigma=0.3**0.5, eta_noise=noise)
    assert torch.isfinite(x_prev).all()


def test_bad_schedules_are_refused_by_name():
    x, noise, fields = torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 3, 5)
    op = fastdis.ddim_step
    for kind, message, call in (
        (ValueError, r"alpha_bar is 0.0; a number in \(0, 1\]", lambda: op(x, noise, fields, 0.0, 0.5)),
        (ValueError, r"alpha_bar_prev is 1.5; a number in \[0, 1\]", lambda: op(x, noise, fields, 0.5, 1.5)),
        (
            ValueError,
            "sigma is 0.9; a number from 0 to",
            lambda: op(x, noise, fields, 0.5, 0.5, sigma=0.9, eta_noise=x),
        ),
        (ValueError, "eta_noise is None; where sigma", lambda: op(x, noise, fields, 0.5, 0.5, sigma=0.1)),
        (ValueError, r"noise has shape \[2, 4\]; that of x", lambda: op(x, noise[:, :4], fields, 0.5, 0.5)),
        (TypeError, "alpha_bar is a NoneType; a tensor is needed", lambda: op(x, noise, fields, None, 0.5)),
    ):
        with pytest.raises(kind, match=message):
            call()
