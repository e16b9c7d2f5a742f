"""A training step with a penalty of the decoder's Jacobian, against the ways to get that from torch.

It has no kernels of its own, so this is no ``ColumnBench``: ours, and each peer, is a whole step, from latents to the
gradients of all parameters. Every exact peer is checked like ours before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from column_bench import Contender, race
from torch import Tensor, nn
from torch.autograd import functional
from torch.func import jacfwd, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from fastdis.ops import _backends, _products
from fastdis.ops.decoder_jacobian import decoder_isometry_penalty
from fastdis.reference.isometry_penalty import isometry_penalty

Penalised = Callable[[nn.Module, Tensor, str], tuple[Tensor, Tensor]]


def by_jacfwd(decoder, z, kind):
    jacobian = vmap(jacfwd(lambda latents: decoder(latents.unsqueeze(0)).squeeze(0)))(z).movedim(-1, 1)
    return decoder(z), isometry_penalty(jacobian.flatten(2), kind)


def by_directions(decoder, z, kind):
    """All tangents of the batch mapped over: torch shares the primal."""
    units = torch.eye(z.shape[1], dtype=z.dtype)
    x, tangents = vmap(lambda v: jvp(decoder, (z,), (v.expand_as(z),)), out_dims=(None, 0))(units)
    return x, isometry_penalty(tangents.transpose(0, 1).flatten(2), kind)


def by_repeating(decoder, z, kind):
    """As FlatVI does: one Jacobian-vector product, by two backward passes, of each latent repeated K times."""
    batch, size = z.shape
    repeated, units = z.repeat_interleave(size, 0), torch.eye(size, dtype=z.dtype).repeat(batch, 1)
    x, tangents = functional.jvp(decoder, repeated, units, create_graph=True)
    return x[::size], isometry_penalty(tangents.reshape(batch, size, -1), kind)


def by_sampling(decoder, z, kind):
    """The estimator of IRVAE's relaxed distortion, with its variance: one random direction a sample."""
    x, tangent = functional.jvp(decoder, z, torch.randn_like(z), create_graph=True)
    pulled_back = functional.vjp(decoder, z, tangent, create_graph=True)[1]
    return x, pulled_back.square().sum(1).mean() / tangent.flatten(1).square().sum(1).mean().square()


@dataclass(frozen=True)
class Case:
    """A decoder and its latents."""

    name: str
    decoder: nn.Module
    z: Tensor
    kind: str = "relaxed_distortion"
    peers: dict[str, Penalised] = field(default_factory=dict)  # beside the exact ones
    targets: dict[str, float] = field(default_factory=dict)
    quick: bool = False


EXACT = {"eager": by_jacfwd, "directions": by_directions, "repeated": by_repeating}


def perceptron(latents, *, sigmoid, batch=100, hidden=256, outputs=784, **options):
    layers = [nn.Linear(latents, hidden), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(hidden, hidden), nn.ReLU()]
    layers += [nn.Linear(hidden, outputs)] + [nn.Sigmoid()] * sigmoid
    name = f"MLP K{latents} B{batch} D{outputs} {'sigmoid' if sigmoid else 'linear'}"
    return Case(name, nn.Sequential(*layers), torch.randn(batch, latents), **options)


def convolutions(latents, *, batch=8, **options):
    layers = [nn.Linear(latents, 8 * 8 * 128), nn.Unflatten(1, (128, 8, 8))]
    for ins, outs in ((128, 64), (64, 32), (32, 16)):
        layers += [nn.ConvTranspose2d(ins, outs, 4, 2, 1), nn.ReLU()]
    layers += [nn.ConvTranspose2d(16, 3, 1), nn.Tanh()]
    return Case(f"conv K{latents} B{batch} 64x64", nn.Sequential(*layers), torch.randn(batch, latents), **options)


def step(penalised: Penalised, decoder: nn.Module, z: Tensor, kind: str) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and backward into all parameters, through the output and the penalty."""
    parameters = list(decoder.parameters())

    def run() -> tuple[Tensor, ...]:
        x, penalty = penalised(decoder, z, kind)
        return penalty.detach(), *torch.autograd.grad(x.square().mean() + penalty, parameters)

    return run


class BenchDecoderJacobian:
    name = "decoder_jacobian"

    @staticmethod
    def cases() -> list[Case]:
        sampled = {"peers": {"stochastic": by_sampling}, "targets": {"fastest": 1.5, "stochastic": 1.3}}
        with torch.random.fork_rng():
            # In one draw of ten some ReLU's input is so near 0 that in float32, ours and every peer's alike, it has the
            # other sign than in float64, and the gradients differ by 1e-3. In this one none is.
            torch.manual_seed(0)
            return [
                perceptron(2, sigmoid=True, **sampled, quick=True),
                perceptron(8, sigmoid=True, targets={"fastest": 1.5}),
                perceptron(2, sigmoid=False, **sampled),
                perceptron(8, sigmoid=False, targets={"fastest": 1.5}),
                convolutions(8, targets={"fastest": 1.5}),
            ]

    @classmethod
    def generate(cls, metafunc: pytest.Metafunc) -> None:
        column = _backends.columns()["tangent_activation"]
        backends = [b for b in _backends.BACKENDS if (b, "cpu") in column.choices and b != "reference"]
        metafunc.parametrize("case", cls.cases(), ids=lambda c: c.name)
        metafunc.parametrize("direction", ["forward+backward"])
        metafunc.parametrize("backend", backends)

    def test_speed(self, benchmark, case: Case, direction: str, backend: str, machine_rates, quick: bool):
        def ours(decoder: nn.Module, z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
            return decoder_isometry_penalty(decoder, z, kind, backend=backend)

        exact = {"ours": ours, **EXACT}
        error = self.check(exact, case)
        contenders = {
            name: Contender(step(penalised, case.decoder, case.z, case.kind))
            for name, penalised in {**exact, **case.peers}.items()
        }
        if self.by_onednn(case.decoder):
            contenders["mkl"] = Contender(self.by_mkl(contenders["ours"].run))
        parameters = sum(p.nbytes for p in case.decoder.parameters())
        race(
            benchmark, contenders, EXACT, quick, self.floor(case), machine_rates, parameters + case.z.nbytes,
            op=self.name, case=case.name, direction=direction, backend=backend, error=error, targets=case.targets,
            yardsticks=["mkl"] if "mkl" in contenders else [],
        )  # fmt: skip

    @staticmethod
    def by_onednn(decoder: nn.Module) -> bool:
        """Whether we leave the products, all that oneDNN could do here, to another library than torch does."""
        linear = not any(isinstance(m, nn.modules.conv._ConvNd) for m in decoder.modules())
        return linear and _products.MKL_HOLDS_BACK

    @staticmethod
    def by_mkl(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        """Run the same with MKL's products, to show what the library is worth and what the rest."""

        def without_onednn() -> tuple[Tensor, ...]:
            with torch.backends.mkldnn.flags(enabled=False):
                return run()

        return without_onednn

    @staticmethod
    def floor(case: Case) -> tuple[float, float]:
        """Bytes of the output and its tangents and of the parameters, and three times the products of 1 + K rows."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            x = case.decoder(case.z)
        rows = 1 + case.z.shape[1]
        parameters = sum(p.nbytes for p in case.decoder.parameters())
        return 2 * (rows * x.nbytes + parameters), 3.0 * rows * counter.get_total_flops()

    @staticmethod
    def check(exact: dict[str, Penalised], case: Case) -> float:
        """The largest relative error of our penalty and gradients against float64; the peers are held to it too."""
        wanted = step(by_jacfwd, copy.deepcopy(case.decoder).double(), case.z.double(), case.kind)()
        errors = {}
        for name, penalised in exact.items():
            found = step(penalised, case.decoder, case.z, case.kind)()
            errors[name] = max(((a - e).norm() / e.norm()).item() for a, e in zip(found, wanted, strict=True))
            assert errors[name] < 1e-4, f"{case.name}: relative error {errors[name]} of {name}; nothing is timed"
        return errors["ours"]
