"""The grid of factors: what is an index, what is an image, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastdis.data import FactorDataset

SIZES = (2, 3, 4)
NAMES = ("shape", "x", "y")


@pytest.fixture
def dataset() -> FactorDataset:
    images = np.zeros((24, 5, 6), np.uint8)
    images[:, 2, 1] = np.arange(24)
    return FactorDataset(images, SIZES, NAMES)


def test_last_factor_varies_fastest(dataset):
    assert dataset.factors(range(24)).tolist() == [list(v) for v in itertools.product(*map(range, SIZES))]


def test_index_inverts_factors(dataset):
    everything = torch.arange(24).reshape(4, 6)
    assert dataset.factors(everything).shape == (4, 6, 3)
    assert torch.equal(dataset.index(dataset.factors(everything)), everything)
    assert dataset.index([1, 2, 3]).shape == ()


def test_item_is_an_untouched_image_and_its_factors(dataset):
    image, factors = dataset[23]
    assert image.dtype == torch.uint8
    assert image.shape == (1, 5, 6)
    assert image[0, 2, 1] == 23
    assert factors.tolist() == [1, 2, 3]
    assert torch.equal(dataset[-1][0], image)


def test_items_end(dataset):
    assert sum(1 for _ in dataset) == 24
    with pytest.raises(IndexError, match="24"):
        dataset[24]
    with pytest.raises(IndexError):
        dataset[-25]


def test_data_loader(dataset):
    images, factors = next(iter(DataLoader(dataset, batch_size=7)))
    assert images.shape == (7, 1, 5, 6)
    assert images.dtype == torch.uint8
    assert factors.tolist() == dataset.factors(range(7)).tolist()


@pytest.mark.parametrize("indices", [[5, 0, 5], np.array([5, 0, 5], np.uint8), torch.tensor([5, 0, 5])])
def test_batch(dataset, indices):
    batch = dataset.batch(indices)
    assert batch.dtype == torch.float32
    assert batch.shape == (3, 1, 5, 6)
    assert batch[:, 0, 2, 1].tolist() == pytest.approx([5 / 255, 0, 5 / 255])


def test_batch_of_binary_colour_images_does_not_alias_them():
    images = np.random.default_rng(0).integers(0, 2, (4, 3, 5, 2), dtype=np.uint8)
    dataset = FactorDataset(images, [4], max_value=1)
    batch = dataset.batch([1])
    assert batch.shape == (1, 2, 3, 5)
    assert np.array_equal(batch[0].permute(1, 2, 0).numpy(), images[1])
    before = images.copy()
    dataset[2][0].zero_()
    batch.zero_()
    assert np.array_equal(images, before)


def test_empty_batch(dataset):
    assert dataset.batch([]).shape == (0, 1, 5, 6)


def test_read_only_memory_map_works(tmp_path):
    np.save(tmp_path / "images.npy", np.full((4, 2, 2), 255, np.uint8))
    dataset = FactorDataset(np.load(tmp_path / "images.npy", mmap_mode="r"), (2, 2))
    assert dataset.batch([3]).min() == 1
    assert dataset[0][0].max() == 255
    assert dataset.factor_names == ("factor_0", "factor_1")


def test_sampled_factors_cover_the_grid_and_repeat_with_the_seed(dataset):
    draw = dataset.sample_factors(2000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw, dataset.sample_factors(2000, generator=torch.Generator().manual_seed(3)))
    counts = torch.bincount(dataset.index(draw), minlength=24)
    assert counts.min() > 40
    assert counts.max() < 140


@pytest.mark.parametrize("key", ["x", 1])
def test_fixed_factor_keeps_its_value_and_leaves_the_others(dataset, key):
    free = dataset.sample_factors(50, generator=torch.Generator().manual_seed(0))
    held = dataset.sample_factors(50, generator=torch.Generator().manual_seed(0), fixed={key: 2})
    assert held[:, 1].tolist() == [2] * 50
    assert torch.equal(held[:, [0, 2]], free[:, [0, 2]])


@pytest.mark.parametrize(
    ("fixed", "message"), [({"colour": 0}, "colour"), ({3: 0}, "3"), ({"x": 3}, "0 to 2"), ({-1: 0}, "-1")]
)
def test_fixed_must_exist(dataset, fixed, message):
    with pytest.raises(ValueError, match=message):
        dataset.sample_factors(1, generator=torch.Generator(), fixed=fixed)


@pytest.mark.parametrize("indices", [[24], [-1], torch.tensor([0, 99])])
def test_index_outside_is_refused(dataset, indices):
    with pytest.raises(ValueError, match="0 to 23"):
        dataset.batch(indices)
    with pytest.raises(ValueError, match="0 to 23"):
        dataset.factors(indices)


def test_fractions_are_refused_rather_than_rounded(dataset):
    with pytest.raises(TypeError, match="whole numbers"):
        dataset.batch([0.5])
    with pytest.raises(TypeError, match="whole numbers"):
        dataset.index(torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(TypeError, match="whole numbers"):
        dataset.batch([True, False])


def test_factors_outside_are_refused(dataset):
    with pytest.raises(ValueError, match=r"holds 3 for 'x'.*0 to 2"):
        dataset.index([[0, 1, 0], [0, 3, 0]])
    with pytest.raises(ValueError, match=r"\[\*, 3\]"):
        dataset.index([0, 0])


@pytest.mark.parametrize(
    ("images", "sizes", "names", "error", "message"),
    [
        (np.zeros((4, 2, 2), np.float32), (4,), None, TypeError, "uint8"),
        ([[0]], (1,), None, TypeError, "list"),
        (np.zeros((4, 2), np.uint8), (4,), None, ValueError, r"\[4, 2\]"),
        (np.zeros((4, 2, 2), np.uint8), (2, 3), None, ValueError, "grid of 6"),
        (np.zeros((4, 2, 2), np.uint8), (), None, ValueError, "factor_sizes"),
        (np.zeros((4, 2, 2), np.uint8), (-2, -2), None, ValueError, "factor_sizes"),
        (np.zeros((4, 2, 2), np.uint8), (2, 2), ("a",), ValueError, "2 distinct names"),
        (np.zeros((4, 2, 2), np.uint8), (2, 2), ("a", "a"), ValueError, "2 distinct names"),
    ],
)
def test_parts_that_do_not_fit(images, sizes, names, error, message):
    with pytest.raises(error, match=message):
        FactorDataset(images, sizes, names)
