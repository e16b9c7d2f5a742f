import copy
import importlib
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Sequential
from torch.utils._python_dispatch import TorchDispatchMode

from fastdis.ops import _backends
from fastdis.ops.decoder_jacobian import decoder_isometry_penalty, decoder_jacobian
from fastdis.reference.decoder_jacobian import decoder_jacobian as reference
from fastdis.reference.isometry_penalty import KINDS
from fastdis.reference.isometry_penalty import isometry_penalty as reference_penalty

JETS = importlib.import_module("fastdis.ops._jets")
ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.ELU(1.3), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh(),
    nn.Sigmoid(), nn.Softplus(2.0), nn.Identity(), nn.Dropout(0.5).eval(),
]  # fmt: skip


def settled(decoder):
    """In evaluation mode, in float64, every normalisation with weights and statistics of its own."""
    for module in decoder.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            for parameter in module.parameters():
                nn.init.normal_(parameter)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return decoder.double().eval()


def mlp(activation=None, sizes=(3, 8, 7, 5), last=True):
    activation = activation or nn.ReLU()
    layers = []
    for ins, outs in pairwise(sizes):
        layers += [nn.Linear(ins, outs), activation]
    return Sequential(*layers) if last else Sequential(*layers[:-1])


def conv():
    return Sequential(
        nn.Linear(3, 16), nn.Unflatten(1, (4, 2, 2)), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.1), nn.Upsample(scale_factor=2),
        nn.Conv2d(6, 4, 3), nn.Tanh(), nn.ConvTranspose2d(4, 3, 1), nn.Sigmoid(),
    )  # fmt: skip


DECODERS = {
    "one_layer": lambda: Sequential(nn.Linear(3, 4)),
    "affine": lambda: Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.Flatten()),
    "two_linear_between_activations": lambda: Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 2),
        nn.ReLU(), nn.Flatten(),
    ),
    "conv": conv,
    "from_one_pixel": lambda: Sequential(
        nn.Unflatten(1, (3, 1, 1)), nn.ConvTranspose2d(3, 4, 2), nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 1),
    ),
    "batch_norms_folded_and_not": lambda: Sequential(
        nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Unflatten(1, (4, 2, 2)),
        nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4, affine=False), nn.ELU(), nn.BatchNorm2d(4),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten(2), nn.Linear(36, 5), nn.BatchNorm1d(3),
        nn.InstanceNorm1d(3, track_running_stats=True),
    ),
    "upsampling_pooling_shuffling": lambda: Sequential(
        nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.Unflatten(1, (4, 2, 2)), nn.Upsample(scale_factor=2),
        nn.Conv2d(4, 4, 3, padding=1), nn.SiLU(), nn.UpsamplingNearest2d(scale_factor=2), nn.ZeroPad2d(1),
        nn.Conv2d(4, 8, 3), nn.PixelShuffle(2), nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.AdaptiveAvgPool2d(5),
    ),
    "group_norms": lambda: Sequential(
        nn.Linear(3, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 6, 2, padding=1),
        nn.GroupNorm(3, 6), nn.SiLU(), nn.Conv2d(6, 6, 2), nn.InstanceNorm2d(6),
    ),
    "layer_norms": lambda: Sequential(
        nn.LayerNorm(3), nn.Linear(3, 16), nn.LayerNorm(16), nn.ReLU(), nn.Unflatten(1, (4, 4)), nn.LayerNorm((4, 4)),
        nn.Linear(4, 5), nn.GELU(), nn.Conv1d(4, 3, 2), nn.LayerNorm(4), nn.ConvTranspose1d(3, 2, 3, stride=2),
    ),
    "three_dimensions": lambda: Sequential(
        nn.Linear(3, 16), nn.ReLU(), nn.Unflatten(1, (2, 2, 2, 2)), nn.Conv3d(2, 2, 2, padding=1), nn.BatchNorm3d(2),
        nn.ReLU(), nn.ConvTranspose3d(2, 3, 2), nn.Upsample(scale_factor=2), nn.AvgPool3d(2), nn.Softplus(),
    ),
    "channels_last": lambda: conv().to(memory_format=torch.channels_last),
}  # fmt: skip


class Residual(nn.Module):
    """Views, arithmetic with constants and parameters, chunks, concatenation, indices."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 6)
        self.block = Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1)
        )
        self.position, self.gain = nn.Parameter(torch.randn(4, 2, 2)), nn.Parameter(torch.randn(1, 4, 2, 2))
        self.mixing = nn.Parameter(torch.randn(6, 5))

    def forward(self, z):
        h = F.relu(self.first(z).view(-1, 4, 2, 2) + self.position)
        for _ in range(2):
            h = 0.7 * (h + self.block(h)) / 1.3 - h * self.gain
        h = h.reshape(h.size(0), -1)
        a, b = self.last(h).chunk(2, dim=1)
        c = torch.cat([torch.tanh(a), 1 - b * a, z[:, :1], torch.ones(z.shape[0], 1, dtype=z.dtype)], dim=-1)
        c = c[..., :6] - self.last(h).mean(-1, keepdim=True)
        return (c @ self.mixing).unsqueeze(1).permute(0, 2, 1).squeeze(-1)


class SpatialBroadcast(nn.Module):
    """Latents at every pixel, beside its coordinates."""

    def __init__(self):
        super().__init__()
        self.net = Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.register_buffer("grid", torch.randn(1, 2, 4, 4))

    def forward(self, z):
        pixels = z.view(*z.shape, 1, 1).expand(-1, -1, 4, 4)
        return self.net(torch.cat([pixels, self.grid.expand(len(z), -1, -1, -1)], 1))


class Tokens(nn.Module):
    """The batch folded with tokens, and not in front for a while."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(3, 8), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, z):
        h = F.gelu(self.down(F.gelu(self.up(self.first(z).view(-1, 2, 4)))) + 1)
        h = self.up(h.view(-1, 4)).view(z.size(0), 2, 6)
        return torch.stack(h.permute(1, 0, 2).unbind(0), 1).sum(1)


class Constants(nn.Module):
    """Constants that differ from sample to sample, before and after the first activation."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 4)
        self.register_buffer("noise", torch.randn(4, 8))

    def forward(self, z):
        h = torch.tanh(self.first(z + self.noise[:, :3]) * self.noise[:, :1] - 2)
        return 2 - torch.sub(self.last((h + self.noise).to(z.dtype) * self.noise), h[:, :4], alpha=3)


class Unknown(nn.Module):
    """Functions that have no rule."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, z):
        h = torch.sin(self.first(z))
        h = h * torch.exp(-(h**2)) + F.leaky_relu(h, -0.2)
        x = self.last(F.hardswish(h))
        x = torch.where(x > 0, x, 0.1 * x) + F.softmax(input=x, dim=-1) + torch.tanh(input=x)
        return torch.einsum("bi,ij->bj", F.normalize(x), self.last.weight) + torch.zeros_like(h)


DECODERS |= {
    "as_many_tokens_as_channels": lambda: Sequential(
        nn.Linear(3, 12), nn.Tanh(), nn.Unflatten(1, (3, 4)), nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 3), nn.Flatten(),
    ),
    "residual": Residual, "spatial_broadcast": SpatialBroadcast, "tokens": Tokens, "unknown": Unknown,
}  # fmt: skip


def outputs_and_gradients(jacobian, decoder, z):
    """x, the Jacobian, and gradients of a function of both in z and all parameters."""
    z = z.detach().requires_grad_()
    x, j = jacobian(decoder, z)
    generator = torch.Generator().manual_seed(7)
    u, v, w = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (x.shape, j.shape, j.shape))
    loss = (x * u).sum() + (j * v).sum() + (j * w).square().sum() + (j.sum(1) * x).sum()
    return x, j, *torch.autograd.grad(loss, [z, *decoder.parameters()], allow_unused=True, materialize_grads=True)


def assert_equal(ours, exact):
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * (1 + (b.abs().max().item() if b.numel() else 0)))


def latents(batch=4, size=3, dtype=torch.float64):
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def check(decoder, z):
    assert_equal(outputs_and_gradients(decoder_jacobian, decoder, z), outputs_and_gradients(reference, decoder, z))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [True, False], ids=["activation_last", "linear_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_perceptrons(activation, last):
    check(mlp(activation, last=last).double(), latents())


@pytest.mark.filterwarnings("ignore:decoder_jacobian has no rule")
@pytest.mark.parametrize("name", DECODERS)
def test_values_and_gradients(name):
    check(settled(DECODERS[name]()), latents())


def test_constants_that_differ_between_samples():
    decoder, z = Constants().double(), latents()
    x, jacobian = decoder_jacobian(decoder, z)
    exact = torch.autograd.functional.jacobian(lambda z: decoder(z).sum(0), z)  # [*, B, K]
    assert_equal((x, jacobian), (decoder(z), exact.permute(1, 2, 0)))


def test_gradients_against_finite_differences():
    """Not only against the reference, whose own second derivatives are torch's."""
    decoder = settled(Sequential(nn.Linear(2, 6), nn.LayerNorm(6), nn.SiLU(), nn.Linear(6, 4), nn.GroupNorm(2, 4)))
    names, parameters = zip(*decoder.named_parameters(), strict=True)

    def function(z, *values):
        call = lambda z: torch.func.functional_call(decoder, dict(zip(names, values, strict=True)), z)  # noqa: E731
        return decoder_jacobian(call, z)

    assert torch.autograd.gradcheck(function, (latents(2, 2).requires_grad_(), *parameters))


@pytest.mark.parametrize(("batch", "size"), [(4, 1), (1, 3), (1, 1)])
def test_one_latent_and_one_sample(batch, size):
    decoder = Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2), nn.ReLU())
    check(decoder.double(), latents(batch, size))


@pytest.mark.filterwarnings("ignore:decoder_jacobian has no rule")
@pytest.mark.parametrize("name", DECODERS)
def test_empty_batch(name):
    decoder = settled(DECODERS[name]())
    x, jacobian = decoder_jacobian(decoder, latents(0))
    sample = decoder(latents(1)).shape[1:]
    assert x.shape == (0, *sample)
    assert jacobian.shape == (0, 3, *sample)
    if not any(isinstance(module, nn.PixelShuffle) for module in decoder.modules()):  # torch's own backward refuses
        gradients = torch.autograd.grad(jacobian.sum() + x.sum(), list(decoder.parameters()), allow_unused=True)
        assert all(g is None or not g.any() for g in gradients)


def test_samples_of_numbers():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(sizes=(3, 8, 1), last=False)

        def forward(self, z):
            return torch.tanh(self.net(z).squeeze(-1) + 0.5)

    decoder, z = Energy().double(), latents()
    check(decoder, z)
    assert decoder_jacobian(decoder, z)[1].shape == (4, 3)


def test_an_output_that_does_not_depend_on_the_latents():
    constant = torch.randn(4, 5)
    x, jacobian = decoder_jacobian(lambda z: constant, latents())
    assert torch.equal(x, constant)
    assert torch.equal(jacobian, torch.zeros(4, 3, 5))


def test_the_jacobian_of_an_affine_decoder_is_expanded():
    for decoder in (nn.Linear(3, 4).double(), nn.Identity()):
        assert decoder_jacobian(decoder, latents())[1].stride(0) == 0


def test_dropout_in_training_uses_one_mask_for_a_sample_and_its_tangents():
    layer = nn.Linear(3, 500, bias=False).double()
    for decoder in (Sequential(layer, nn.Dropout(0.5)), Sequential(layer, nn.Tanh(), nn.Dropout(0.5, inplace=True))):
        x, jacobian = decoder_jacobian(decoder, latents())
        kept = (x != 0).unsqueeze(1).expand_as(jacobian)
        assert 0.4 < kept.double().mean() < 0.6
        assert torch.equal(jacobian != 0, kept)
    assert len(x.unique(dim=0)) == 4
    mask = (decoder_jacobian(Sequential(layer, nn.Dropout(0.5)), latents())[0] != 0).unique(dim=0)
    assert len(mask) == 4  # one for each sample


# -- the penalty -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [True, False, "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_penalty(kind, fold):
    decoder, z = mlp(nn.SiLU(), last=False).double(), latents(6).requires_grad_()
    wanted = [z, *decoder.parameters()]
    x, penalty = decoder_isometry_penalty(decoder, z, kind, fold=fold)
    exact_x, jacobian = reference(decoder, z)
    exact = reference_penalty(jacobian, kind)
    assert_equal((x, penalty), (exact_x, exact))
    weights = torch.randn(x.shape, dtype=torch.float64)
    ours = torch.autograd.grad(penalty + (x * weights).sum(), wanted)
    assert_equal(ours, torch.autograd.grad(exact + (exact_x * weights).sum(), wanted))


def test_penalty_of_images_and_of_an_affine_decoder():
    for decoder in (settled(conv()), nn.Linear(3, 5).double()):
        jacobian = reference(decoder, latents())[1].flatten(2)
        for fold in ("auto", False):
            _, penalty = decoder_isometry_penalty(decoder, latents(), "conformal", fold=fold)
            assert_equal((penalty,), (reference_penalty(jacobian, "conformal"),))


@pytest.mark.parametrize(("batch", "hidden", "outputs", "folds"), [(64, 8, 200, True), (2, 64, 70, False)])
def test_folding_where_it_pays(batch, hidden, outputs, folds):
    decoder = mlp(sizes=(3, hidden, outputs), last=False)
    with Recorder() as recorder:
        decoder_isometry_penalty(decoder, latents(batch, dtype=torch.float32))
    assert ((3 * batch, outputs) not in recorder.products) == folds


def test_folded_gram_matrices_are_not_of_half_precision():
    decoder = mlp(sizes=(3, 16, 64), last=False)
    exact = decoder_isometry_penalty(decoder, latents(8, dtype=torch.float32), fold=True)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, penalty = decoder_isometry_penalty(decoder, latents(8, dtype=torch.float32), fold=True)
    assert (x.dtype, penalty.dtype) == (torch.bfloat16, torch.float32)
    assert abs(penalty / exact - 1) < 0.02


# -- work --------------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The outputs' shapes of products, the inputs' batches of convolutions, the sizes of copies, scalings and sums."""

    def __init__(self):
        super().__init__()
        self.products, self.convolutions, self.copies, self.scalings, self.sums = [], [], [], [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
            self.products.append(tuple(output.shape))
        elif name == "aten::convolution":
            self.convolutions.append(len(args[0]))
        elif name in ("aten::cat", "aten::clone", "aten::slice_backward", "aten::select_backward", "aten::copy_"):
            self.copies.append(output.numel())
        elif name == "aten::mul":
            self.scalings.append(output.numel())
        elif name in ("aten::add", "aten::add_"):
            self.sums.append(output.numel())
        return output


def compiled():
    """Whether activations run in kernels, not in many operations of torch."""
    return _backends.columns()["tangent_activation"].choices["auto", "cpu"] != "reference"


def test_one_product_a_layer():
    z = latents(10, dtype=torch.float32)
    with Recorder() as recorder:
        decoder_jacobian(mlp(sizes=(3, 8, 9, 11, 7)), z)
    assert recorder.products == [(10, 8), (40, 9), (40, 11), (40, 7)]
    with Recorder() as recorder:
        decoder_jacobian(mlp(sizes=(3, 8, 9, 11, 7), last=False), z)
    assert recorder.products == [(10, 8), (40, 9), (40, 11), (10, 7), (30, 7)]  # the last layer's rows apart


def test_one_convolution_a_layer():
    with Recorder() as recorder:
        decoder_jacobian(settled(conv()), latents(10))
    assert recorder.products == [(10, 16)]
    assert recorder.convolutions == [40, 40, 40]
    with Recorder() as recorder:
        decoder_jacobian(settled(DECODERS["from_one_pixel"]()), latents(10))
    assert recorder.convolutions == [10, 3, 40, 10, 30]


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 1, bias=False)], ids=str)
def test_a_batch_norm_after_a_layer_costs_no_pass(layer):
    decoder = settled(Sequential(nn.Unflatten(1, (4, 2, 2)), nn.ReLU(), layer, nn.BatchNorm2d(6), nn.ReLU()))
    with Recorder() as recorder:
        decoder_jacobian(decoder, latents(3, 16))
    parameters = sum(p.numel() for p in decoder.parameters())
    assert recorder.scalings[:1]
    if compiled():
        assert max(recorder.scalings) <= parameters < 3 * 6 * 2 * 2 * 17
    check(decoder, latents(3, 16))


@pytest.mark.parametrize("last", [True, False], ids=["activation_last", "linear_last"])
def test_no_copy_of_the_size_of_the_jacobian_and_no_gradient_twice(last):
    decoder = Sequential(mlp(nn.ReLU(inplace=True), sizes=(3, 8, 9, 700), last=last), nn.Unflatten(1, (7, 100)))
    with Recorder() as recorder:
        x, jacobian = decoder_jacobian(decoder, latents(10, dtype=torch.float32).requires_grad_())
        grads = torch.randn(3, 10, 7, 100).transpose(0, 1), torch.randn(10, 7, 100)
        recorder.products.clear()
        torch.autograd.backward((jacobian, x), grads)
    if compiled():
        assert max(recorder.copies, default=0) < 3 * 10 * 700
    # A gradient of the input and one of the weight for each product, the latents' included.
    assert len(recorder.products) == (6 if last else 8)
    assert 9 * 700 not in recorder.sums  # the last weight's gradients add up in the products


class Square(nn.Module):
    """Ends a run of layers. (Not a LayerNorm: of that torch's own second derivatives of a Jacobian are wrong.)"""

    def forward(self, x):
        return x * x


PERCEPTRONS = {
    "linear": lambda bias=True: [nn.Tanh(), nn.ReLU(), nn.Linear(6, 5, bias=bias)],
    "linear_after_a_curve": lambda bias=True: [nn.ReLU(), nn.SiLU(), nn.Linear(6, 5, bias=bias)],
    "relu": lambda bias=True: [nn.Softplus(2.0), nn.GELU(), nn.Linear(6, 5, bias=bias), nn.ReLU()],
    "sigmoid": lambda bias=True: [nn.LeakyReLU(0.2), nn.ELU(), nn.Linear(6, 5, bias=bias), nn.Sigmoid()],
    "not_from_latents": lambda bias=True: [Square(), nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.Sigmoid()],
    "not_to_the_end": lambda bias=True: [nn.ReLU(), nn.SiLU(), nn.Linear(6, 6, bias=bias), nn.Tanh(), Square()],
}


def perceptron(name, bias=True):
    first, second, *rest = PERCEPTRONS[name](bias)
    return settled(Sequential(nn.Linear(3, 8, bias=bias), first, nn.Linear(8, 6), second, *rest))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("frozen", [(), ("z",), ("0", "z"), ("2", "0"), ("2.bias", "4.weight"), ("4",)], ids=str)
@pytest.mark.parametrize("of", ["x", "jacobian", "both"])
@pytest.mark.parametrize("name", PERCEPTRONS)
def test_gradients_of_perceptrons(name, of, frozen, bias):
    decoder = perceptron(name, bias)
    for place, parameter in decoder.named_parameters():
        parameter.requires_grad_(place not in frozen and place.split(".")[0] not in frozen)
    z = latents().requires_grad_("z" not in frozen)
    wanted = [p for p in (z, *decoder.parameters()) if p.requires_grad]

    def gradients(jacobian):
        x, j = jacobian(decoder, z)
        loss = (0 if of == "jacobian" else x.square().sum()) + (0 if of == "x" else (j**3).sum())
        return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)

    assert_equal(gradients(decoder_jacobian), gradients(reference))


@pytest.mark.parametrize("of", ["x", "jacobian", "both"])
@pytest.mark.parametrize("name", PERCEPTRONS)
def test_second_derivatives_of_perceptrons(name, of):
    decoder, z = perceptron(name), latents().requires_grad_()
    wanted = [z, *decoder.parameters()]

    def second(jacobian):
        x, j = jacobian(decoder, z)
        loss = (0 if of == "jacobian" else x.square().sum()) + (0 if of == "x" else (j**3).sum())
        first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        total = sum(g.square().sum() for g in first)
        return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)

    assert_equal(second(decoder_jacobian), second(reference))


@pytest.mark.parametrize("name", PERCEPTRONS)
def test_many_gradients_of_perceptrons_at_once(name):
    decoder, z = perceptron(name), latents().requires_grad_()
    wanted = [z, *decoder.parameters()]
    x, j = decoder_jacobian(decoder, z)
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.randn(2, *t.shape, generator=generator, dtype=torch.float64) for t in (x, j))
    both = torch.autograd.grad((x, j), wanted, (u, v), is_grads_batched=True, retain_graph=True)
    for i in range(2):
        assert_equal([g[i] for g in both], torch.autograd.grad((x, j), wanted, (u[i], v[i]), retain_graph=True))


class Used(nn.Module):
    """Outputs of layers and of activations that are used more than once, before or after what follows has run."""

    def __init__(self, way):
        super().__init__()
        self.way, self.norm = way, nn.LayerNorm(8, elementwise_affine=False)
        self.first, self.second, self.third = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, z):
        h = torch.tanh(self.first(z))
        a = self.second(h)
        y = {
            "skip": lambda: F.relu(a) + h,
            "skip_after_it_ran": lambda: self.norm(F.silu(a)) + h,
            "swish": lambda: a * torch.sigmoid(a),
            "hsiws": lambda: torch.sigmoid(a) * a,
            "layer_after_it_ran": lambda: self.norm(torch.sigmoid(a)) * a,
            "two_activations": lambda: torch.cat([F.relu(a), F.relu(-a)], 1)[:, 4:12],
            "never_run": lambda: h,
            "run_for_nothing": lambda: (h, self.norm(F.relu(a)))[0],
        }[self.way]()
        return self.third(F.relu(self.third(y)))


@pytest.mark.parametrize(
    ("way", "extra"),
    [("skip", 0), ("skip_after_it_ran", 0), ("swish", 0), ("hsiws", 0), ("layer_after_it_ran", 1),
     ("two_activations", 0), ("never_run", -1), ("run_for_nothing", 0)],
)  # fmt: skip
def test_what_is_used_twice_is_computed_once(way, extra):
    decoder, z = settled(Used(way)), latents(10)
    check(decoder, z)
    with Recorder() as recorder:
        decoder_jacobian(decoder, z)
    # The latents' layer, two or so in the middle, and the last one's primal and tangents.
    assert len(recorder.products) == 5 + extra


def test_a_perceptron_is_one_step_of_autograd():
    x, j = decoder_jacobian(mlp(nn.SiLU(), sizes=(3, 8, 9, 11, 7), last=False), latents(dtype=torch.float32))
    names, left = set(), [x.grad_fn, j.grad_fn]
    while left:
        node = left.pop()
        names.add(type(node).__name__)
        left += [n for n, _ in node.next_functions if n is not None]
    if compiled():
        assert names == {"_PerceptronBackward", "TransposeBackward0", "AccumulateGrad"}


@pytest.mark.parametrize("name", PERCEPTRONS)
def test_perceptrons_under_vmap_of_grad(name):
    decoder = perceptron(name)
    parameters = dict(decoder.named_parameters())

    def loss(parameters, z, u):
        x, j = decoder_jacobian(lambda z: torch.func.functional_call(decoder, parameters, z), z)
        return (x.square().sum() + (j**3).sum()) * u

    z, u = latents(10).reshape(5, 2, 3), latents(5, 1).squeeze(1)
    for zs, dim in ((z, 0), (z[0], None)):
        mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, dim, 0))(parameters, zs, u)
        for i in range(5):
            each = torch.func.grad(loss)(parameters, zs[i] if dim == 0 else zs, u[i])
            assert_equal([mapped[name][i] for name in each], each.values())


def test_calling_leaves_everything_alone():
    decoder, z = settled(conv()), latents()
    state, before = copy.deepcopy(decoder.state_dict()), z.clone()
    decoder_jacobian(decoder, z)
    assert torch.equal(z, before)
    assert all(torch.equal(value, state[name]) for name, value in decoder.state_dict().items())
    assert all(p.grad is None for p in decoder.parameters())
    with torch.no_grad():
        assert not decoder_jacobian(decoder, z)[1].requires_grad


# -- functions without a rule ------------------------------------------------------------------------------------------


def test_a_function_without_a_rule_is_named_once(monkeypatch):
    monkeypatch.setattr(JETS, "_warned", set())
    decoder = Sequential(nn.Linear(3, 4), nn.Mish(), nn.Linear(4, 4), nn.Mish()).double()
    with pytest.warns(UserWarning, match="decoder_jacobian has no rule for mish") as caught:
        check(decoder, latents())
    assert sum("no rule" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder_jacobian(decoder, latents())
        decoder_jacobian(settled(Residual()), latents())


@pytest.mark.filterwarnings("ignore")
def test_scripted_and_compiled_modules():
    net = mlp(nn.Tanh()).double()
    exact = reference(net, latents())
    assert_equal(decoder_jacobian(torch.jit.script(net), latents()), exact)
    assert_equal(decoder_jacobian(torch.compile(net, fullgraph=True, backend="aot_eager"), latents()), exact)


def test_an_activation_in_place_changes_its_input_as_torch_does():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 5)

        def forward(self, z):
            h = self.first(z)
            return h + F.relu(h, inplace=True)

    check(Reused().double(), latents())


# -- torch's machinery -------------------------------------------------------------------------------------------------


def test_bfloat16_is_as_good_as_the_reference_in_bfloat16():
    decoder, z = mlp(nn.SiLU(), sizes=(3, 32, 32, 20)).bfloat16(), latents(16, dtype=torch.bfloat16)
    exact = reference(copy.deepcopy(decoder).double(), z.double())
    for ours, peer, wanted in zip(decoder_jacobian(decoder, z), reference(decoder, z), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        allowed = 2 * (peer - wanted).abs().max() + 4 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
        assert (ours - wanted).abs().max() <= allowed


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_float32(backend):
    decoder, z = settled(conv()).float(), latents(dtype=torch.float32)
    exact = reference(copy.deepcopy(decoder).double(), z.double())
    for ours, wanted in zip(decoder_jacobian(decoder, z, backend=backend), exact, strict=True):
        torch.testing.assert_close(ours, wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [True, False], ids=["activation_last", "linear_last"])
def test_autocast(last):
    decoder, z = mlp(nn.SiLU(), sizes=(3, 32, 32, 20), last=last), latents(16, dtype=torch.float32)
    exact = outputs_and_gradients(decoder_jacobian, decoder, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, jacobian, *gradients = outputs_and_gradients(decoder_jacobian, decoder, z)
        assert decoder(z).dtype == x.dtype == jacobian.dtype == torch.bfloat16
    for ours, wanted in zip((x, jacobian, *gradients), exact, strict=True):
        assert (ours - wanted).norm() <= 0.05 * wanted.norm()
    assert all(g.dtype == torch.float32 for g in gradients)


class Switching(nn.Module):
    """A part without gradients, and one in or out of autocast, around what may wait."""

    def __init__(self, autocast):
        super().__init__()
        self.net, self.last, self.autocast = mlp(nn.Tanh(), (3, 8, 8)), nn.Linear(8, 5), autocast

    def forward(self, z):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            h = self.net(z)
            with torch.no_grad():
                scale = F.layer_norm(h, (8,)).shape[1]
            return self.last(h) * scale


def test_gradients_may_be_switched_off_and_on_on_the_way():
    check(Switching(False).double(), latents())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_autocast_may_be_switched_on_the_way(outside, inside):
    decoder, z = Switching(inside), latents(dtype=torch.float32)
    exact = outputs_and_gradients(reference, copy.deepcopy(decoder).double(), z.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        ours = outputs_and_gradients(decoder_jacobian, decoder, z)
    assert ours[0].dtype == ours[1].dtype == (torch.bfloat16 if inside else torch.float32)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).norm() <= (0.05 if inside else 1e-5) * b.norm()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["conv", "linear", "sigmoid"])
def test_compile_fullgraph(name, dynamic):
    torch.compiler.reset()
    decoder = (
        perceptron(name)
        if name in PERCEPTRONS
        else settled(
            Sequential(
                nn.Linear(3, 8), nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(),
                nn.Flatten(), nn.Linear(27, 6), nn.SiLU(), nn.Linear(6, 8), nn.Unflatten(1, (2, 4)),
            )
        )
    )  # fmt: skip
    compiled = torch.compile(decoder_jacobian, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_equal(
        outputs_and_gradients(compiled, decoder, latents()), outputs_and_gradients(decoder_jacobian, decoder, latents())
    )


def test_functional_call_under_grad():
    decoder, z = settled(conv()), latents()
    parameters = dict(decoder.named_parameters())

    def penalty(parameters):
        return decoder_isometry_penalty(lambda z: torch.func.functional_call(decoder, parameters, z), z)[1]

    ours = torch.func.grad(penalty)(parameters)
    exact = torch.autograd.grad(decoder_isometry_penalty(decoder, z)[1], list(parameters.values()))
    assert_equal(ours.values(), exact)


def test_hooks_and_parametrisations_run():
    decoder = Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2)).double()
    called = []
    decoder[1].register_forward_hook(lambda module, args, output: called.append(tuple(output.shape)))
    check(decoder, latents())
    assert called[0] == (4, 5)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals_name_the_argument():
    net, z = mlp(), latents(dtype=torch.float32)
    for kind, message, call in (
        (TypeError, "^z is a list; a tensor is needed", lambda: decoder_jacobian(net, z.tolist())),
        (TypeError, "^z has dtype torch.int64; allowed are float32", lambda: decoder_jacobian(net, z.long())),
        (ValueError, r"^z has shape \[3\]; \[B, K\] with K >= 1", lambda: decoder_jacobian(net, z[0])),
        (ValueError, r"^z has shape \[4, 0\]; \[B, K\] with K >= 1", lambda: decoder_jacobian(net, z[:, :0])),
        (TypeError, "^decoder is a str; a module or another callable", lambda: decoder_jacobian("net", z)),
        (TypeError, "^decoder returned a tuple; one tensor", lambda: decoder_jacobian(lambda z: (z, z), z)),
        (
            ValueError,
            r"^decoder returned shape \[12\]; \[B, \*\] with B of z, 4, is needed",
            lambda: decoder_jacobian(lambda z: z.flatten(), z),
        ),
        (
            ValueError,
            "^decoder has a BatchNorm1d at '0.1' that normalises over the batch.*eval",
            lambda: decoder_jacobian(Sequential(Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), z),
        ),
        (
            ValueError,
            "^decoder calls a batch_norm that normalises over the batch",
            lambda: decoder_jacobian(lambda z: F.batch_norm(z, None, None, training=True), z),
        ),
        (
            ValueError,
            "^decoder calls an instance_norm that updates running averages",
            lambda: decoder_jacobian(
                Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True)), z
            ),
        ),
        (TypeError, "^decoder calls relu_, which works in place; relu", lambda: decoder_jacobian(torch.relu_, z)),
        (ValueError, "^backend is 'quantum'; allowed are", lambda: decoder_jacobian(net, z, backend="quantum")),
        (RuntimeError, "^backend 'cuda' cannot serve", lambda: decoder_jacobian(nn.Identity(), z, backend="cuda")),
        (ValueError, "^kind is 'flat'; allowed are 'isometry'", lambda: decoder_isometry_penalty(net, z, "flat")),
        (ValueError, "^fold is 'no'; allowed are 'auto', True", lambda: decoder_isometry_penalty(net, z, fold="no")),
        (
            ValueError,
            "^fold is True, but the decoder does not end in a linear layer",
            lambda: decoder_isometry_penalty(net, z, fold=True),
        ),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_a_refused_batch_norm_has_not_counted_the_batch():
    decoder = Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="normalises over the batch"):
        decoder_jacobian(decoder, latents(dtype=torch.float32))
    assert decoder[1].num_batches_tracked == 0
