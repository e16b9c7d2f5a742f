import math

import pytest
import torch
from column_suite import ColumnSuite, Sample
from test_sum_gradient_fields import draw

import fastdis
from fastdis import reference
from fastdis.reference.total_correlation import log_importance_weights


def posteriors(name, *size, estimator="mws", dataset_size=1000, **flags):
    mean, logvar = draw(*size, seed=1), 0.5 * draw(*size, seed=2) - 1
    z = mean + torch.exp(logvar / 2) * draw(*size, seed=3)
    return Sample(name, {"z": z, "mean": mean, "logvar": logvar},
                  {"dataset_size": dataset_size, "estimator": estimator}, **flags)  # fmt: skip


class TestTotalCorrelation(ColumnSuite):
    name = "total_correlation"
    op = staticmethod(fastdis.total_correlation)
    reference = staticmethod(reference.total_correlation)
    roundings = 64  # the terms are small differences of log densities

    @staticmethod
    def samples():
        return [
            posteriors("mws", 5, 3),
            posteriors("mss", 6, 4, estimator="mss", slow_in_interpreter=True),
            # Of three latents: with two the total correlation is by chance below a hundredth of the log densities whose
            # difference it is, and one rounding of these more than is allowed of it.
            posteriors("two_samples", 2, 3, estimator="mss", dataset_size=2, slow_in_interpreter=True),
            posteriors("one_sample", 1, 2, slow_in_interpreter=True),
            posteriors("batches", 2, 5, 3, estimator="mss", slow_in_interpreter=True),
            posteriors("tiles", 70, 3, estimator="mss", gradcheck=False, slow_in_interpreter=True),
            posteriors("threads", 270, 5, gradcheck=False, slow_in_interpreter=True, interpreted=False),
            posteriors("no_sample", 0, 3, empty=True),
        ]


def test_stratified_weights_sum_to_one_with_one_nth_on_the_diagonal():
    for batch in (2, 3, 10):
        weights = log_importance_weights(batch, 1000, "mss").exp()
        torch.testing.assert_close(weights.sum(1), torch.ones(batch, dtype=torch.float64))
        torch.testing.assert_close(weights.diagonal(), torch.full((batch,), 1 / 1000, dtype=torch.float64))


def test_the_terms_sum_to_the_divergence_of_the_draws():
    sample = posteriors("", 40, 6, estimator="mss")
    z, mean, logvar = sample.tensors.values()
    log_q = -0.5 * ((z - mean) ** 2 / logvar.exp() + logvar + math.log(2 * math.pi))
    log_p = -0.5 * (z**2 + math.log(2 * math.pi))
    total = sum(fastdis.total_correlation(z, mean, logvar, **sample.options))
    torch.testing.assert_close(total, (log_q - log_p).sum(1).mean())


def test_stratified_information_is_capped_by_the_dataset_and_not_by_the_batch():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(256, 10, generator=generator)
    z = mean + 0.1 * torch.randn(256, 10, generator=generator)
    terms = fastdis.total_correlation(z, mean, torch.full_like(z, 2 * math.log(0.1)), dataset_size=100_000,
                                      estimator="mss")  # fmt: skip
    # The widely copied weights, with 1 / N in the first column, cap it at the logarithm of the batch.
    assert math.log(256) + 1 < terms.mutual_information < math.log(100_000) + 1e-4


def test_far_away_points_neither_overflow_nor_underflow():
    z = torch.tensor([[0.0, 1e3], [2e3, -1e3], [-3e3, 5.0]])
    mean, logvar = z.flip(0).clone().requires_grad_(), torch.tensor([[-10.0, 5.0], [0.0, -20.0], [8.0, 1.0]])
    ours = fastdis.total_correlation(z, mean, logvar, dataset_size=10)
    exact = reference.total_correlation(z.double(), mean.double(), logvar.double(), dataset_size=10)
    for a, b in zip(ours, exact, strict=True):
        assert abs(a.item() - b.item()) < 1e-5 * abs(b.item())
    assert torch.isfinite(torch.autograd.grad(sum(ours), mean)[0]).all()


def test_one_term_alone_may_be_differentiated():
    sample = posteriors("", 9, 3)
    leaves = {k: t.requires_grad_() for k, t in sample.tensors.items()}
    for index in range(3):
        ours = torch.autograd.grad(fastdis.total_correlation(**leaves, **sample.options)[index], leaves.values())
        exact = torch.autograd.grad(reference.total_correlation(**leaves, **sample.options)[index], leaves.values(),
                                    allow_unused=True, materialize_grads=True)  # fmt: skip
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b)


def test_leading_dimensions_are_batches_of_their_own():
    z, mean, logvar = (draw(2, 3, 5, 2, seed=s) for s in range(3))
    whole = fastdis.total_correlation(z, mean, logvar, dataset_size=50)
    assert whole.total_correlation.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = fastdis.total_correlation(z[i, j], mean[i, j], logvar[i, j], dataset_size=50)
            for a, b in zip(whole, one, strict=True):
                torch.testing.assert_close(a[i, j], b)


def test_bad_arguments_are_refused_by_name():
    z = torch.randn(4, 3)
    op = fastdis.total_correlation
    for kind, message, call in (
        (ValueError, r"mean has shape \[4, 2\]; that of z", lambda: op(z, z[:, :2], z, dataset_size=9)),
        (TypeError, "dataset_size is 9.0; an integer", lambda: op(z, z, z, dataset_size=9.0)),
        (ValueError, "dataset_size is 0; a positive", lambda: op(z, z, z, dataset_size=0)),
        (ValueError, "batch of 4 samples; estimator 'mss' needs from 2 to dataset_size = 3",
         lambda: op(z, z, z, dataset_size=3, estimator="mss")),
        (ValueError, "batch of 1 samples", lambda: op(z[:1], z[:1], z[:1], dataset_size=3, estimator="mss")),
        (ValueError, "estimator is 'mwss'; allowed are 'mws', 'mss'",
         lambda: op(z, z, z, dataset_size=9, estimator="mwss")),
        (TypeError, "logvar has dtype torch.float64; that of z", lambda: op(z, z, z.double(), dataset_size=9)),
    ):  # fmt: skip
        with pytest.raises(kind, match=message):
            call()
