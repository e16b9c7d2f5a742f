"""The grid of factors: what is an index, what is an image, and what is refused."""

from __future__ import annotations

import itertools
import pickle

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


def test_items_are_fetched_together(dataset):
    together = dataset.__getitems__([3, -1, 3])
    assert len(together) == 3
    for (image, factors), item in zip(together, (3, 23, 3), strict=True):
        assert torch.equal(image, dataset[item][0])
        assert torch.equal(factors, dataset[item][1])
    assert dataset.__getitems__([]) == []
    with pytest.raises(IndexError, match="index 24"):
        dataset.__getitems__([0, 24])


def test_sample_returns_the_images_of_its_factors(dataset):
    factors, images = dataset.sample(9, generator=torch.Generator().manual_seed(1), fixed={"x": 1})
    assert torch.equal(factors, dataset.sample_factors(9, generator=torch.Generator().manual_seed(1), fixed={"x": 1}))
    assert torch.equal(images, dataset.batch(dataset.index(factors)))
    assert dataset.sample(0, generator=torch.Generator())[1].shape == (0, 1, 5, 6)


def test_values_are_looked_up():
    images = np.zeros((6, 2, 2), np.uint8)
    dataset = FactorDataset(images, (2, 3), ("scale", "x"), factor_values=([0.5, 1], np.array([0, 10, 20])))
    assert dataset.values(range(6)).tolist() == list(map(list, itertools.product((0.5, 1), (0, 10, 20))))
    assert dataset.values(4).tolist() == [1, 10]
    assert dataset.values([[0], [5]]).shape == (2, 1, 2)
    assert dataset.subgrid({"x": [2, 0]}).values(0).tolist() == [0.5, 20]
    with pytest.raises(ValueError, match="2 arrays"):
        FactorDataset(images, (2, 3), factor_values=([0.5, 1],))
    with pytest.raises(ValueError, match=r"3 numbers for 'x'"):
        FactorDataset(images, (2, 3), ("scale", "x"), factor_values=([0.5, 1], [1, 2]))


def test_unknown_values_are_said_to_be_unknown(dataset):
    assert dataset.factor_values is None
    with pytest.raises(ValueError, match="does not know the values"):
        dataset.values(0)


def test_subgrid(dataset):
    part = dataset.subgrid({"shape": 1, 2: [3, 0]})
    assert part.factor_sizes == (1, 3, 2)
    assert part.factor_names == NAMES
    assert part.max_value == dataset.max_value
    wanted = dataset.index([[1, x, y] for x in range(3) for y in (3, 0)])
    assert torch.equal(part.batch(range(6)), dataset.batch(wanted))
    assert torch.equal(part[-1][0], dataset[int(wanted[-1])][0])
    again = part.subgrid({"y": torch.tensor([1]), "x": np.arange(1, 3)})
    assert torch.equal(again.batch([1]), dataset.batch(dataset.index([[1, 2, 0]])))


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"colour": 0}, ValueError, "keep names the factor 'colour'"),
        ({"x": 3}, ValueError, "0 to 2 for 'x'"),
        ({"x": []}, ValueError, "at least one"),
        ({"x": [1, 1]}, ValueError, "distinct"),
        ({"x": -1}, ValueError, "0 to 2"),
        ({"x": [0.5]}, TypeError, "whole numbers"),
    ],
)
def test_subgrids_that_do_not_exist(dataset, keep, error, message):
    with pytest.raises(error, match=message):
        dataset.subgrid(keep)


class Squares:
    """Images that are made when they are asked for."""

    shape = (4, 2, 2)
    dtype = np.dtype(np.uint8)

    def __len__(self):
        return 4

    def __getitem__(self, rows):
        return np.broadcast_to((rows**2).astype(np.uint8)[:, None, None], (len(rows), 2, 2)).copy()


def test_images_may_be_anything_with_rows():
    dataset = FactorDataset(Squares(), (2, 2))
    assert dataset.image_shape == (1, 2, 2)
    assert dataset.batch([3, 1])[:, 0, 0, 0].tolist() == pytest.approx([9 / 255, 1 / 255])
    assert dataset[-1][0].unique().item() == 9
    with pytest.raises(TypeError, match="Tensor"):
        FactorDataset(torch.zeros(4, 2, 2, dtype=torch.uint8), (4,))


@pytest.fixture
def mapped(tmp_path) -> FactorDataset:
    images = np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    return FactorDataset(np.load(tmp_path / "images.npy", mmap_mode="r"), (20, 30))


@pytest.mark.parametrize("part", ["whole", "slice", "subgrid"])
def test_maps_are_pickled_as_paths(mapped, part):
    if part == "slice":
        mapped = FactorDataset(mapped.images[7:107], (10, 10))
    elif part == "subgrid":
        mapped = mapped.subgrid({0: range(3, 20)})
    pickled = pickle.dumps(mapped)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    rows = [0, len(mapped) - 1, 33]
    assert torch.equal(copy.batch(rows), mapped.batch(rows))
    assert copy.factor_sizes == mapped.factor_sizes


def test_what_no_file_holds_is_pickled_whole(tmp_path, mapped):
    changed = np.load(tmp_path / "images.npy", mmap_mode="c")
    changed[:] = 3
    for images in (changed[:4], mapped.images[:4, ::2], np.ones((4, 2, 2), np.uint8)):
        dataset = FactorDataset(images, (4,))
        assert np.array_equal(pickle.loads(pickle.dumps(dataset)).images, images)


def test_loader_with_workers(mapped):
    loader = DataLoader(mapped, batch_size=64, shuffle=True, num_workers=2)
    seen = []
    for images, factors in loader:
        assert images.dtype == torch.uint8
        rows = mapped.index(factors)
        assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), mapped.images[rows.numpy()])
        seen += rows.tolist()
    assert sorted(seen) == list(range(600))


@pytest.mark.slow
def test_loader_with_spawned_workers(mapped):
    loader = DataLoader(mapped.subgrid({0: [4, 2]}), batch_size=16, num_workers=2, multiprocessing_context="spawn")
    images = torch.cat([images for images, _ in loader])
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), mapped.images[[*range(120, 150), *range(60, 90)]])


def test_colour_images_come_out_contiguous():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), dtype=np.uint8)
    dataset = FactorDataset(images, [4])
    assert dataset.batch([1, 2]).is_contiguous()
    assert dataset[0][0].is_contiguous()
    assert all(image.is_contiguous() for image, _ in dataset.__getitems__([0, 3]))
