import pytest
import torch
from column_suite import ColumnSuite, Sample
from test_sum_gradient_fields import draw

import fastdis
from fastdis import reference


def gaussian(name, batch, latents, *, weights=False, reduction="mean", **flags):
    tensors = {"mean": draw(batch, latents, seed=1), "logvar": draw(batch, latents, seed=2)}
    if weights:
        tensors["weights"] = draw(latents, seed=3)
    return Sample(name, tensors, {"reduction": reduction}, **flags)


class TestGaussianKl(ColumnSuite):
    name = "gaussian_kl"
    op = staticmethod(fastdis.gaussian_kl)
    reference = staticmethod(reference.gaussian_kl)

    @staticmethod
    def samples():
        return [
            gaussian("mean", 5, 3),
            gaussian("weights", 5, 3, weights=True),
            gaussian("sum", 4, 7, weights=True, reduction="sum"),
            gaussian("none", 4, 2, weights=True, reduction="none"),
            gaussian("one_of_each", 1, 1, reduction="none"),
            gaussian("threads", 700, 51, weights=True, gradcheck=False, slow_in_interpreter=True),
            gaussian("no_sample", 0, 3, weights=True, empty=True),
            gaussian("no_latent", 3, 0, reduction="none", empty=True),
        ]


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_divergence_of_torch_distributions(weighted):
    mean, logvar = draw(6, 4), draw(6, 4, seed=1)
    weights = torch.rand(4, dtype=torch.float64) if weighted else None
    normal = torch.distributions.Normal
    each = torch.distributions.kl_divergence(normal(mean, torch.exp(logvar / 2)), normal(0.0, 1.0))
    wanted = (each * (1 if weights is None else weights)).sum(1)
    torch.testing.assert_close(fastdis.gaussian_kl(mean, logvar, weights=weights, reduction="none"), wanted)


def test_bad_arguments_are_refused_by_name():
    mean, op = torch.randn(4, 3), fastdis.gaussian_kl
    for kind, message, call in (
        (ValueError, r"mean has shape \[4, 3, 1\]; \[B, K\]", lambda: op(mean[..., None], mean[..., None])),
        (ValueError, r"logvar has shape \[4, 2\]; that of mean", lambda: op(mean, mean[:, :2])),
        (ValueError, r"weights has shape \[4\]; \[K\] of mean", lambda: op(mean, mean, weights=torch.ones(4))),
        (ValueError, "reduction is 'avg'; allowed are 'none', 'mean', 'sum'", lambda: op(mean, mean, reduction="avg")),
        (TypeError, "logvar has dtype torch.float64; that of mean", lambda: op(mean, mean.double())),
    ):
        with pytest.raises(kind, match=message):
            call()
