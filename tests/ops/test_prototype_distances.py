import pytest
import torch
from column_suite import ColumnSuite, Sample

import fastdis
from fastdis import reference


def episode(name, queries, prototypes, *, offset=0.0, scale=1.0, **flags):
    generator = torch.Generator().manual_seed(5)
    draw = lambda size: scale * torch.randn(size, generator=generator, dtype=torch.float64) + offset  # noqa: E731
    return Sample(name, {"queries": draw(queries), "prototypes": draw(prototypes)}, **flags)


class TestPrototypeDistances(ColumnSuite):
    name = "prototype_distances"
    op = staticmethod(fastdis.prototype_distances)
    reference = staticmethod(reference.prototype_distances)

    @staticmethod
    def samples():
        return [
            episode("small", (5, 3), (4, 3)),
            episode("episodes", (3, 7, 5), (3, 2, 5)),
            episode("two_leading", (2, 2, 3, 4), (2, 2, 5, 4)),
            episode("one_of_each", (1, 1, 1), (1, 1, 1)),
            episode("one_prototype", (4, 3), (1, 3)),
            episode("blocks", (2, 70, 33), (2, 19, 33), gradcheck=False, slow_in_interpreter=True),
            episode("chunks", (1, 150, 96), (1, 40, 96), gradcheck=False, slow_in_interpreter=True),
            episode("no_episode", (0, 3, 2), (0, 2, 2), empty=True),
            episode("no_query", (1, 0, 2), (1, 3, 2), empty=True),
            episode("no_prototype", (1, 3, 2), (1, 0, 2), empty=True),
            episode("no_dimension", (1, 3, 0), (1, 2, 0), empty=True),
        ]


def test_a_common_offset_costs_no_digits():
    generator = torch.Generator().manual_seed(1)
    base = 50 + torch.randn(1, 64, generator=generator)
    queries = base + 6e-3 * torch.randn(256, 64, generator=generator)
    prototypes = base + 6e-3 * torch.randn(32, 64, generator=generator)
    exact = reference.prototype_distances(queries.double(), prototypes.double())
    assert exact.min() < 5e-3
    assert ((fastdis.prototype_distances(queries, prototypes) - exact).abs() / exact).max() < 1e-4


def test_distances_are_never_negative_and_zero_on_the_diagonal():
    x = torch.randn(100, 16) * 1e3
    distances = fastdis.prototype_distances(x, x)
    assert (distances >= 0).all()
    # A squared norm of about 1.6e7 holds one float32 rounding of about 1.
    assert distances.diagonal().max() < 1e7 * 1e-5


def test_leading_dimensions_broadcast():
    queries, prototypes = torch.randn(3, 1, 5, 4), torch.randn(2, 6, 4)
    ours = fastdis.prototype_distances(queries, prototypes)
    assert ours.shape == (3, 2, 5, 6)
    torch.testing.assert_close(ours, reference.prototype_distances(queries, prototypes))


def test_bad_shapes_and_dtypes_are_refused_by_name():
    q, p = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    distances = fastdis.prototype_distances
    for kind, message, call in (
        (ValueError, r"queries has shape \[4\]; at least two dimensions", lambda: distances(q[0, 0], p)),
        (ValueError, r"prototypes has 3 dimensions in shape \[2, 3, 3\]; 4", lambda: distances(q, p[..., :3])),
        (ValueError, r"prototypes has leading dimensions \[3\]", lambda: distances(q, torch.randn(3, 3, 4))),
        (TypeError, "prototypes has dtype torch.float64; that of queries", lambda: distances(q, p.double())),
    ):
        with pytest.raises(kind, match=message):
            call()
