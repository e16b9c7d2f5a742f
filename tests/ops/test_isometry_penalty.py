import pytest
import torch
from column_suite import ColumnSuite
from test_jacobian_gram import rows_sample

import fastdis
from fastdis import reference
from fastdis.reference.isometry_penalty import KINDS


class TestIsometryPenalty(ColumnSuite):
    name = "isometry_penalty"
    op = staticmethod(fastdis.isometry_penalty)
    reference = staticmethod(reference.isometry_penalty)

    @staticmethod
    def samples():
        return [
            *(rows_sample(kind, 3, 4, 7, kind=kind) for kind in KINDS),
            rows_sample("one_of_each", 1, 1, 1, kind="isometry"),
            rows_sample("split", 1, 5, 9001, kind="relaxed_distortion", gradcheck=False, slow_in_interpreter=True),
            rows_sample("many_latents", 3, 20, 700, kind="conformal", gradcheck=False, slow_in_interpreter=True),
            rows_sample("no_sample", 0, 3, 4, kind="scaled_isometry", empty=True),
            rows_sample("no_dimension", 2, 3, 0, kind="isometry", empty=True),
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_orthonormal_tangents_are_the_least(kind):
    rows = torch.linalg.qr(torch.randn(5, 40, 4, dtype=torch.float64))[0].mT.contiguous()
    scale = 1.0 if kind == "isometry" else 3.0
    least = 0.25 if kind == "relaxed_distortion" else 0.0
    jacobian = (scale * rows).requires_grad_()
    penalty = fastdis.isometry_penalty(jacobian, kind)
    torch.testing.assert_close(penalty.item(), least, rtol=0, atol=1e-12)
    assert torch.autograd.grad(penalty, jacobian)[0].abs().max() < 1e-12
    assert fastdis.isometry_penalty(jacobian + 0.1 * torch.randn_like(jacobian), kind) > penalty


def test_what_is_left_near_an_isometry_keeps_its_digits():
    """q - 2 t + K would be rounding noise here."""
    rows = torch.linalg.qr(torch.randn(50, 300, 4, dtype=torch.float64))[0].mT
    jacobian = (rows + 1e-4 * torch.randn_like(rows)).float()
    exact = reference.isometry_penalty(jacobian.double(), "isometry").item()
    assert exact < 1e-5
    assert abs(fastdis.isometry_penalty(jacobian, "isometry").item() - exact) < 1e-3 * exact


def test_relaxed_distortion_does_not_depend_on_the_scale():
    jacobian = torch.randn(6, 3, 50)
    a, b = (fastdis.isometry_penalty(s * jacobian, "relaxed_distortion").item() for s in (1.0, 100.0))
    assert abs(a - b) < 1e-5 * a


def test_float16_tangents_whose_squares_leave_its_range():
    jacobian = torch.randn(2, 4, 12288, dtype=torch.float16)
    exact = reference.isometry_penalty(jacobian.double()).item()
    assert exact > 65504
    assert abs(fastdis.isometry_penalty(jacobian).item() - exact) < 1e-5 * exact


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind is 'isometric'; allowed are 'isometry', 'scaled_isometry', 'conformal'"):
        fastdis.isometry_penalty(torch.randn(2, 3, 4), "isometric")
