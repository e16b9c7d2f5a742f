import pytest
import torch
from column_suite import ColumnSuite, Sample
from test_sum_gradient_fields import draw

import fastdis
from fastdis import reference


def rows_sample(name, batch, latents, dimensions, **options):
    flags = {k: options.pop(k) for k in ("empty", "gradcheck", "slow_in_interpreter") if k in options}
    jacobian = draw(batch, latents, dimensions, seed=3) / max(dimensions, 1) ** 0.5
    return Sample(name, {"jacobian": jacobian}, options, **flags)


class TestJacobianGram(ColumnSuite):
    name = "jacobian_gram"
    op = staticmethod(fastdis.jacobian_gram)
    reference = staticmethod(reference.jacobian_gram)

    @staticmethod
    def samples():
        return [
            rows_sample("small", 3, 4, 7),
            rows_sample("two_latents", 5, 2, 33),
            rows_sample("tiles", 2, 9, 20),
            rows_sample("one_of_each", 1, 1, 1),
            rows_sample("split", 1, 5, 9001, gradcheck=False, slow_in_interpreter=True),
            rows_sample("many_latents", 2, 35, 1100, gradcheck=False, slow_in_interpreter=True),
            rows_sample("no_sample", 0, 3, 4, empty=True),
            rows_sample("no_latent", 2, 0, 4, empty=True),
            rows_sample("no_dimension", 2, 3, 0, empty=True),
        ]


@pytest.mark.parametrize("size", [(3, 4, 50), (1, 4, 50), (3, 1, 50), (2, 3, 1)])
def test_a_transposed_jacobian_is_read_where_it_lies_and_its_gradient_lies_like_it(size):
    batch, latents, dimensions = size
    stored = torch.randn(latents, batch, dimensions, dtype=torch.float64)
    jacobian = stored.transpose(0, 1).requires_grad_()
    weights = torch.randn(batch, latents, latents, dtype=torch.float64)
    ours, exact = ((op(jacobian), torch.autograd.grad((op(jacobian) * weights).sum(), jacobian)[0])
                   for op in (fastdis.jacobian_gram, reference.jacobian_gram))  # fmt: skip
    torch.testing.assert_close(ours, exact)
    assert ours[1].transpose(0, 1).is_contiguous()


def test_images_are_flattened_and_the_result_is_symmetric():
    jacobian = torch.randn(2, 5, 3, 8, 8)
    gram = fastdis.jacobian_gram(jacobian)
    assert torch.equal(gram, gram.mT)
    torch.testing.assert_close(gram, reference.jacobian_gram(jacobian.flatten(2)))


def test_half_precision_gives_float32():
    assert fastdis.jacobian_gram(torch.full((1, 2, 4096), 40.0, dtype=torch.float16)).tolist() == [
        [[6553600.0] * 2] * 2
    ]


def test_too_few_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"jacobian has shape \[3, 4\]; \[B, K, \*\], tangents by rows, is needed"):
        fastdis.jacobian_gram(torch.randn(3, 4))


@pytest.mark.parametrize("by_latents", [False, True])
@pytest.mark.parametrize("dimensions", [16384, 16383])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_too_large_for_a_cache(dtype, dimensions, by_latents):
    """They are stored in another way where rows allow it."""
    jacobian = torch.randn(10, 14, dimensions, dtype=dtype).transpose(0, 1)
    jacobian = (jacobian if by_latents else jacobian.contiguous()).requires_grad_()
    assert jacobian.numel() * jacobian.element_size() >= 8 << 20
    weights = torch.randn(14, 10, 10, dtype=dtype)
    (gradient,) = torch.autograd.grad((fastdis.jacobian_gram(jacobian) * weights).sum(), jacobian)
    exact = (weights + weights.mT).double() @ jacobian.detach().double()
    roundings = 16 * torch.finfo(dtype).eps * exact.abs().max().item()  # of sums of ten products
    torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=roundings)
