import pytest
import torch
from column_suite import ColumnSuite, Sample
from test_sum_gradient_fields import draw

import fastdis
from fastdis import reference
from fastdis.reference.reparameterize import _philox, standard_normal


def seeded(mean, logvar, **options):
    """Every call draws from a generator in the same state."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return fastdis.reparameterize(mean, logvar, **options)


def seeded_reference(mean, logvar):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        seed = torch.randint(2**63 - 1, (1,), device=mean.device)
    return reference.reparameterize(mean, logvar, seed)


def posterior(name, *size, **flags):
    return Sample(name, {"mean": draw(*size, seed=1), "logvar": draw(*size, seed=2)}, **flags)


class TestReparameterize(ColumnSuite):
    name = "reparameterize"
    op = staticmethod(seeded)
    reference = staticmethod(seeded_reference)

    @staticmethod
    def samples():
        return [
            posterior("small", 5, 3),
            posterior("one_dimension", 9),
            posterior("one", 1, 1),
            posterior("blocks", 7, 150, gradcheck=False, slow_in_interpreter=True),
            posterior("threads", 300, 71, gradcheck=False, slow_in_interpreter=True),
            posterior("no_sample", 0, 3, empty=True),
        ]

    def test_func_grad_and_vmap(self, sample, backend, device):
        mean, logvar = sample.to(torch.float64, device).values()
        stack = torch.stack([mean, 2 * mean, -mean])

        def loss(mean, logvar):
            return fastdis.reparameterize(mean, logvar, backend=backend).square().sum()

        def exact(mean, logvar, seed):
            return reference.reparameterize(mean, logvar, seed).square().sum()

        for randomness in ("same", "different"):
            torch.manual_seed(5)
            mapped = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None), randomness=randomness)(stack, logvar)
            torch.manual_seed(5)
            size = (1, 1) if randomness == "same" else (3, 1)
            seeds = torch.randint(2**63 - 1, size, device=device).expand(3, 1)
            for i in range(3):
                for a, b in zip(mapped, torch.func.grad(exact, (0, 1))(stack[i], logvar, seeds[i]), strict=True):
                    torch.testing.assert_close(a[i], b)

    def test_compile_fullgraph(self, backend, device):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda mean, logvar: fastdis.reparameterize(mean, logvar, backend=backend), fullgraph=True,
            backend="aot_eager",
        )  # fmt: skip
        mean, logvar = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device, requires_grad=True)
        torch.manual_seed(1)
        ours = compiled(mean, logvar)
        (gradient,) = torch.autograd.grad(ours.sum(), logvar)
        torch.testing.assert_close(gradient, (ours - mean).detach() / 2)


def test_philox_gives_the_words_that_its_authors_publish():
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    words = [int(w) for w in _philox((zero,) * 4, torch.tensor(0))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [int(w) for w in _philox((ones,) * 4, torch.tensor(-1))]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_the_noise_is_standard_normal():
    noise = fastdis.reparameterize(torch.zeros(1000, 1000), torch.zeros(1000, 1000),
                                   generator=torch.Generator().manual_seed(0)).double()  # fmt: skip
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean().item() - moment) < 5 * (deviation / noise.numel()) ** 0.5
    ordered = noise.flatten().sort().values
    uniform = 0.5 * torch.special.erfc(-ordered / 2**0.5)
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    assert (uniform - steps).abs().max() < 1.95 / len(ordered) ** 0.5  # Kolmogorov and Smirnov, 0.1 %
    pairs = noise.flatten().unflatten(0, (-1, 4))
    assert (torch.corrcoef(pairs.T) - torch.eye(4)).abs().max() < 0.01


def test_a_seed_gives_one_draw_whatever_the_threads_dtype_and_layout():
    mean, logvar = torch.randn(300, 171), torch.randn(300, 171)
    draw = lambda m, v: fastdis.reparameterize(m, v, generator=torch.Generator().manual_seed(9))  # noqa: E731
    threads = torch.get_num_threads()
    try:
        draws = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            draws.append(draw(mean, logvar))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(d, draws[0]) for d in draws)
    assert torch.equal(draw(mean.T.contiguous().T, logvar), draws[0])
    torch.testing.assert_close(draw(mean.double(), logvar.double()).float(), draws[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(fastdis.reparameterize(mean, logvar), fastdis.reparameterize(mean, logvar))


def test_float32_noise_keeps_its_digits_where_the_radius_is_small():
    noise = fastdis.reparameterize(torch.zeros(2**20), torch.zeros(2**20), generator=torch.Generator().manual_seed(4))
    seed = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(4))
    exact = standard_normal(torch.Size([2**20]), seed)
    assert (noise - exact).abs().max() < 2e-6
    assert ((noise - exact).abs() / exact.abs().clamp(min=1e-3)).max() < 1e-4


def test_bad_arguments_are_refused_by_name():
    mean, op = torch.randn(4, 3), fastdis.reparameterize
    for kind, message, call in (
        (ValueError, r"logvar has shape \[4, 2\]; that of mean", lambda: op(mean, mean[:, :2])),
        (TypeError, "generator is a int; a torch.Generator", lambda: op(mean, mean, generator=3)),
        (TypeError, "logvar has dtype torch.float64; that of mean", lambda: op(mean, mean.double())),
    ):
        with pytest.raises(kind, match=message):
            call()
