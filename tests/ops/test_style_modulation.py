import pytest
import torch
import torch.nn.functional as F
from column_suite import ColumnSuite, Sample

import fastdis
from fastdis import reference


def image_sample(name, shape, *, affine=False, channels_last=False, empty=False, gradcheck=True, slow=False, **options):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(*shape)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    tensors = {"x": x, "scale": 1 + 0.3 * draw(*shape[:2]), "shift": draw(*shape[:2])}
    if affine:
        tensors |= {"weight": 1 + 0.3 * draw(shape[1]), "bias": draw(shape[1])}
    return Sample(name, tensors, options, empty=empty, gradcheck=gradcheck, slow_in_interpreter=slow)


class TestStyleModulation(ColumnSuite):
    name = "style_modulation"
    op = staticmethod(fastdis.style_modulation)
    reference = staticmethod(reference.style_modulation)

    @staticmethod
    def samples():
        return [
            image_sample("plain", (2, 3, 4, 5)),
            image_sample("instance", (2, 3, 5, 7), groups=3),
            image_sample("one_group", (2, 6, 3, 3), groups=1),
            image_sample("groups_silu_affine", (2, 6, 3, 5), groups=3, affine=True, activation="silu"),
            image_sample("relu", (2, 4, 3, 3), groups=2, activation="relu"),
            image_sample("leaky", (1, 4, 3, 3), activation="leaky_relu", negative_slope=0.2),
            image_sample("last_instance", (2, 5, 3, 4), groups=5, channels_last=True),
            image_sample(
                "last_silu_affine", (2, 8, 3, 3), groups=2, channels_last=True, affine=True, activation="silu"
            ),
            image_sample("last_wide", (1, 70, 3, 3), groups=35, channels_last=True, gradcheck=False),
            image_sample("no_position", (3, 8), groups=2, activation="silu"),
            image_sample("one_dimension", (2, 4, 9), groups=2, eps=1e-3),
            image_sample("tokens_last", (2, 4, 9), groups=2, channels_last=True),
            image_sample("three_dimensions", (1, 4, 2, 3, 2), groups=4, activation="silu"),
            image_sample("one_position", (2, 6, 1, 1), groups=2),
            image_sample("one_channel", (2, 1, 4, 4), groups=1),
            image_sample("threads", (3, 20, 33, 31), groups=10, activation="silu", gradcheck=False, slow=True),
            image_sample("split", (1, 24, 64, 65), groups=1, activation="silu", gradcheck=False, slow=True),
            image_sample("split_last", (1, 24, 64, 65), groups=1, channels_last=True, gradcheck=False, slow=True),
            image_sample("no_batch", (0, 4, 3, 3), groups=2, empty=True),
            image_sample("no_channel", (2, 0, 3, 3), groups=1, empty=True),
            image_sample("no_pixel", (2, 4, 0, 3), groups=2, affine=True, empty=True),
        ]


@pytest.mark.parametrize("spatial", [(8, 8), (9,), (2, 3, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_layout_of_x_is_kept_without_a_copy(spatial, channels_last):
    x = torch.randn(2, 6, *spatial)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    y = fastdis.style_modulation(x, torch.ones(2, 6), torch.zeros(2, 6), groups=3)
    assert y.stride() == x.stride()
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.stride() == x.stride()


def test_instance_norm_of_torch_is_the_same():
    x = torch.randn(4, 8, 16, 16) * 3 + 5
    ours = fastdis.style_modulation(x, torch.ones(4, 8), torch.zeros(4, 8), groups=8)
    torch.testing.assert_close(ours, F.instance_norm(x), rtol=1e-5, atol=1e-5)


def test_group_norm_and_silu_of_torch_are_the_same():
    x, weight, bias = torch.randn(4, 8, 16, 16), torch.randn(8), torch.randn(8)
    scale, shift = torch.randn(4, 8), torch.randn(4, 8)
    ours = fastdis.style_modulation(x, 1 + scale, shift, groups=4, weight=weight, bias=bias, activation="silu")
    torch_s = F.group_norm(x, 4, weight, bias) * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(ours, F.silu(torch_s), rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_costs_no_digits():
    x = torch.randn(2, 4, 64, 64) * 1e-2 + 1000
    ours = fastdis.style_modulation(x, torch.ones(2, 4), torch.zeros(2, 4), groups=4, eps=0.0)
    exact = reference.style_modulation(x.double(), torch.ones(2, 4), torch.zeros(2, 4), groups=4, eps=0.0)
    # One part in 1e5 of a deviation of 1e-2 about 1000 is one rounding of x itself.
    assert (ours - exact).abs().max() < 2e-2


def test_style_in_another_dtype_than_x_is_used_as_it_is():
    x, scale, shift = torch.randn(2, 4, 5, 5).bfloat16(), torch.randn(2, 4), torch.randn(2, 4, dtype=torch.float64)
    scale.requires_grad_()
    y = fastdis.style_modulation(x, scale, shift)
    assert y.dtype == torch.bfloat16
    (dscale,) = torch.autograd.grad(y.float().sum(), scale)
    assert dscale.dtype == torch.float32
    torch.testing.assert_close(dscale, x.float().sum((2, 3)), rtol=1e-2, atol=1e-2)


def test_exponential_is_right_over_its_whole_range():
    t = torch.cat([torch.linspace(-120, 120, 200_001), torch.tensor([-1e30, 1e30, 0.0, -0.0])])
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for dtype, bound in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        x = t.to(dtype).view(1, 1, -1)
        ours = fastdis.style_modulation(x, one, zero, activation="silu")
        exact = F.silu(x.double())
        relative = (ours - exact).abs() / exact.abs().clamp_min(1e-30)
        assert relative.max() < bound
    for special in (float("inf"), -float("inf"), float("nan")):
        x = torch.full((1, 1, 3), special)
        ours = fastdis.style_modulation(x, one, zero, activation="silu")
        torch.testing.assert_close(ours, F.silu(x), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_a_half_precision_dtype_passes_through(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).view(1, 1, -1)
    y = fastdis.style_modulation(x, torch.ones(1, 1), torch.zeros(1, 1))
    # Adding a zero shift turns -0 into +0; every other value, subnormals and infinities too, is kept.
    torch.testing.assert_close(y, x + 0, rtol=0, atol=0, equal_nan=True)
    rounded = fastdis.style_modulation(x, torch.full((1, 1), 1 / 3), torch.zeros(1, 1))
    torch.testing.assert_close(rounded, (x.float() * torch.tensor(1 / 3)).to(dtype), rtol=0, atol=0, equal_nan=True)


class TestAdain:
    def test_it_gives_content_the_statistics_of_style(self):
        content, style = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 9, 11) * 2 + 1
        y = fastdis.adain(content, style)
        torch.testing.assert_close(y.mean((2, 3)), style.mean((2, 3)), rtol=1e-4, atol=1e-4)
        deviation = style.flatten(2).var(-1, correction=0).sqrt()
        torch.testing.assert_close(y.flatten(2).var(-1, correction=0).sqrt(), deviation, rtol=1e-4, atol=1e-4)

    def test_adain_of_x_with_x_is_x(self):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(fastdis.adain(x, x), x, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("unbiased", [False, True])
    def test_gradients_reach_both(self, unbiased):
        content = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        style = torch.randn(2, 3, 3, 5, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(
            fastdis.adain(content, style, unbiased=unbiased), reference.adain(content, style, unbiased=unbiased)
        )
        assert torch.autograd.gradcheck(lambda c, s: fastdis.adain(c, s, unbiased=unbiased), (content, style))

    def test_bad_input(self):
        x = torch.randn(2, 3, 4, 4)
        with pytest.raises(ValueError, match=r"style has shape \[2, 4, 4, 4\]; \[B, C, \*\] with B and C of content"):
            fastdis.adain(x, torch.randn(2, 4, 4, 4))
        with pytest.raises(ValueError, match="style has 1 positions; at least 2 are needed"):
            fastdis.adain(x, torch.randn(2, 3, 1, 1), unbiased=True)
        with pytest.raises(ValueError, match=r"content has shape \[2, 3\]"):
            fastdis.adain(x[:, :, 0, 0], x)
        with pytest.raises(ValueError, match="style is on meta, content on cpu"):
            fastdis.adain(x, x.to("meta"))


def test_bad_shapes_and_names_are_refused_by_name():
    x, scale, shift = torch.randn(2, 6, 4, 4), torch.randn(2, 6), torch.randn(2, 6)
    modulate = fastdis.style_modulation
    for message, call in {
        r"x has shape \[6\]; \[B, C, \*\] is needed": lambda: modulate(x[0, :, 0, 0], scale, shift),
        r"scale has shape \[2, 5\]; \[B, C\] of x = \[2, 6\]": lambda: modulate(x, scale[:, :5], shift),
        r"shift has shape \[1, 6\]; \[B, C\] of x = \[2, 6\]": lambda: modulate(x, scale, shift[:1]),
        r"weight has shape \[5\]; \[C\] of x = \[6\]": lambda: modulate(x, scale, shift, weight=torch.ones(5)),
        r"bias has shape \[6, 1\]": lambda: modulate(x, scale, shift, bias=torch.ones(6, 1)),
        "groups is 4; allowed are 0 and the divisors of the 6 channels": lambda: modulate(x, scale, shift, groups=4),
        "groups is -1; allowed are 0 and the divisors": lambda: modulate(x, scale, shift, groups=-1),
        "activation is 'gelu'; allowed are 'none', 'relu'": lambda: modulate(x, scale, shift, activation="gelu"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"groups is 2\.0; an integer is needed"):
        modulate(x, scale, shift, groups=2.0)
