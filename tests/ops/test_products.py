"""Products by oneDNN: what it gives, and when it is left alone. A machine whose MKL needs no help runs them too."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdis.ops import _perceptron, _products
from fastdis.ops.decoder_jacobian import decoder_isometry_penalty, decoder_jacobian
from fastdis.reference.decoder_jacobian import decoder_jacobian as reference
from fastdis.reference.isometry_penalty import isometry_penalty as reference_penalty

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.fixture(autouse=True)
def held_back(monkeypatch):
    monkeypatch.setattr(_products, "MKL_HOLDS_BACK", True)
    monkeypatch.setattr(_products, "SMALLEST", 1)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of products that oneDNN was asked for."""
    shapes, asked = [], _products._by_onednn

    def record(rows, weight, bias):
        if asked(rows, weight, bias):
            shapes.append((tuple(rows.shape), tuple(weight.shape)))
            return True
        return False

    monkeypatch.setattr(_products, "_by_onednn", record)
    return shapes


def near(ours, exact):
    assert ours.shape == exact.shape
    assert (ours.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("size", [(1, 1, 1), (7, 5, 3), (900, 256, 31)], ids=str)
def test_values_of_matrices_that_lie_row_by_row_and_column_by_column(size, calls):
    rows, hidden, outputs = size
    a, b = torch.randn(rows, hidden), torch.randn(outputs, hidden)
    for left in (a, a.mT.contiguous().mT):
        for right in (b, b.mT.contiguous().mT):
            near(_products.linear(left, right), left.double() @ right.double().mT)
            near(_products.matmul(left, right.mT), left.double() @ right.double().mT)
            to = torch.randn(rows, outputs)
            exact = to.double() + left.double() @ right.double().mT
            _products.add_matmul_(to, left, right.mT)
            near(to, exact)
    assert len(calls) >= 8


def test_values_with_a_bias_and_in_three_dimensions(calls):
    rows, weight, bias = torch.randn(4, 9, 6), torch.randn(5, 6), torch.randn(5)
    near(_products.linear(rows[1:], weight, bias), F.linear(rows[1:].double(), weight.double(), bias.double()))
    assert calls == [((3, 9, 6), (5, 6))]


def test_nan_and_infinity_come_through(calls):
    rows, weight = torch.ones(2, 3), torch.ones(4, 3)
    rows[0, 1], rows[1, 2] = float("nan"), float("inf")
    product = _products.linear(rows, weight)
    assert product[0].isnan().all()
    assert product[1].isinf().all()
    assert calls


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("rows", "weight", "within"),
    [
        (torch.randn(4, 3).double(), torch.randn(5, 3).double(), nullcontext()),
        (torch.randn(4, 3).bfloat16(), torch.randn(5, 3).bfloat16(), nullcontext()),
        (torch.randn(4, 3), torch.randn(5, 3, requires_grad=True), nullcontext()),
        (torch.randn(1, 3).expand(4, 3), torch.randn(5, 3), nullcontext()),
        (torch.randn(4, 3), torch.randn(5, 1).expand(5, 3), nullcontext()),
        (torch.randn(4, 6)[:, ::2], torch.randn(5, 3), nullcontext()),
        (torch.randn(0, 3), torch.randn(5, 3), nullcontext()),
        (torch.randn(4, 0), torch.randn(5, 0), nullcontext()),
        (torch.randn(4, 3), torch.randn(5, 3), torch.autocast("cpu", dtype=torch.bfloat16)),
        (torch.randn(4, 3), torch.randn(5, 3), torch.backends.mkldnn.flags(enabled=False)),
        (torch.randn(4, 3), torch.randn(5, 3), Mode()),
    ],
    ids=["float64", "bfloat16", "gradient", "expanded", "expanded_weight", "strided", "no_row", "no_column", "autocast",
         "switched_off", "mode"],
)  # fmt: skip
def test_torch_keeps_what_is_not_for_onednn(rows, weight, within, calls):
    with within:
        product = _products.linear(rows, weight)
        torch.testing.assert_close(product, F.linear(rows, weight), equal_nan=True)
    assert not calls


def test_torch_keeps_small_products(monkeypatch, calls):
    monkeypatch.setattr(_products, "SMALLEST", 61)
    _products.linear(torch.randn(4, 3), torch.randn(5, 3))
    assert not calls
    monkeypatch.setattr(_products, "SMALLEST", 60)
    _products.linear(torch.randn(4, 3), torch.randn(5, 3))
    assert calls


def test_under_vmap_and_compiled(calls):
    rows, weight = torch.randn(2, 4, 3), torch.randn(5, 3)
    torch.testing.assert_close(torch.vmap(_products.linear, (0, None))(rows, weight), F.linear(rows, weight))
    compiled = torch.compile(_products.linear, fullgraph=True)
    torch.testing.assert_close(compiled(rows, weight), F.linear(rows, weight))
    assert not calls


@pytest.mark.parametrize("last", [[nn.Sigmoid()], []], ids=["sigmoid", "linear"])
@pytest.mark.parametrize("fold", [False, "auto"])
def test_a_decoder_with_its_products_by_onednn(last, fold, calls):
    decoder = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 300), *last)
    z = torch.randn(40, 4)

    def gradients(decoder, z, ours):
        wanted = [z.requires_grad_(), *decoder.parameters()]
        if ours:
            x, penalty = decoder_isometry_penalty(decoder, z, "isometry", fold=fold)
        else:
            x, jacobian = reference(decoder, z)
            penalty = reference_penalty(jacobian, "isometry")
        return penalty, *torch.autograd.grad(penalty + x.square().sum(), wanted)

    exact = gradients(copy.deepcopy(decoder).double(), z.double(), ours=False)
    for found, wanted in zip(gradients(decoder, z, ours=True), exact, strict=True):
        assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()
    assert len(calls) >= 8  # of every layer but the first, forward, and twice that backward
    calls.clear()
    with torch.no_grad():
        for found, wanted in zip(decoder_jacobian(decoder, z), reference(decoder, z), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert calls


def test_folded_gram_matrices_to_second_order():
    tangents = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    jacobian = (tangents @ weight.mT).transpose(0, 1)
    gram = _perceptron.folded_gram(tangents, weight, "cpu")
    torch.testing.assert_close(gram, jacobian @ jacobian.mT)
    of = lambda t, w: _perceptron.folded_gram(t, w, "cpu")  # noqa: E731
    assert torch.autograd.gradcheck(of, (tangents, weight))
    assert torch.autograd.gradgradcheck(of, (tangents, weight))


def test_folded_gram_matrices_under_vmap_and_for_one_input_alone():
    tangents, weight = torch.randn(3, 4, 5).double(), torch.randn(7, 5).double()
    of = lambda t, w: _perceptron.folded_gram(t, w, "cpu")  # noqa: E731
    each = torch.vmap(torch.func.grad(lambda t: of(t, weight).square().sum()))(torch.stack([tangents, 2 * tangents]))
    for batch, found in zip((tangents, 2 * tangents), each, strict=True):
        batch = batch.clone().requires_grad_()
        torch.testing.assert_close(found, torch.autograd.grad(of(batch, weight).square().sum(), batch)[0])
    weight.requires_grad_()
    (ours,) = torch.autograd.grad(of(tangents, weight).square().sum(), weight)
    jacobian = (tangents @ weight.mT).transpose(0, 1)
    (exact,) = torch.autograd.grad((jacobian @ jacobian.mT).square().sum(), weight)
    torch.testing.assert_close(ours, exact)


def test_folded_gram_matrices_compiled():
    tangents = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    of = lambda t, w: _perceptron.folded_gram(t, w, "cpu").square().sum()  # noqa: E731
    compiled = torch.compile(of, fullgraph=True)
    for ours, exact in zip(
        torch.autograd.grad(compiled(tangents, weight), (tangents, weight)),
        torch.autograd.grad(of(tangents, weight), (tangents, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact)
