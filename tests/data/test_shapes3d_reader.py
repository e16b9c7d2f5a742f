"""3D Shapes read: grids told from labels, mapping, caching, and damaged files."""

from __future__ import annotations

import itertools
import pickle

import h5py
import numpy as np
import pytest

from fastdis.data import load, load_shapes3d
from fastdis.data.read_shapes3d import FACTOR_NAMES

VALUES = ((0.0, 0.1, 0.9), (0.0,), (0.5, 0.2), (0.75, 1.25), (0.0, 1.0, 2.0, 3.0), (-30.0, 30.0))
SIZES = tuple(map(len, VALUES))


def labels() -> np.ndarray:
    return np.array(list(itertools.product(*VALUES)))


def images(side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (len(labels()), side, side, 3), dtype=np.uint8)


def write(path, *, names=("images", "labels"), **options):
    arrays = {"images": images(), "labels": labels()}
    arrays |= {name: options.pop(name) for name in ("images", "labels") if name in options}
    with h5py.File(path, "w", userblock_size=options.pop("userblock", 0)) as file:
        if "images" in names:
            file.create_dataset("images", data=arrays["images"], **options)
        if "labels" in names:
            file["labels"] = arrays["labels"]
    return path


PACKED = {"compression": "gzip", "chunks": (7, 4, 8, 3)}


def test_grid_is_told_from_the_labels(tmp_path):
    dataset = load(write(tmp_path / "3dshapes.h5", **PACKED))
    assert dataset.factor_names == FACTOR_NAMES
    assert dataset.factor_sizes == SIZES
    assert [column.tolist() for column in dataset.factor_values] == [list(column) for column in VALUES]
    assert np.allclose(dataset.values(range(len(dataset))).numpy(), labels())
    assert np.array_equal(dataset.images, images())
    assert dataset.image_shape == (3, 8, 8)
    assert dataset.batch([3])[0, 1, 2, 5].item() == pytest.approx(images()[3, 2, 5, 1] / 255)


@pytest.mark.parametrize("userblock", [0, 1024])
def test_one_uncompressed_block_is_mapped_in_place(tmp_path, userblock):
    dataset = load_shapes3d(write(tmp_path / "s.h5", userblock=userblock), cache=True)
    assert isinstance(dataset.images, np.memmap)
    assert np.array_equal(dataset.images, images())
    assert np.array_equal(pickle.loads(pickle.dumps(dataset)).images, images())
    assert load(tmp_path / "s.h5").factor_sizes == SIZES
    assert [file.name for file in tmp_path.iterdir()] == ["s.h5"]


@pytest.mark.parametrize("chunks", [(1, 8, 8, 3), (96, 1, 1, 1), (50, 8, 8, 3), True, None])
def test_any_chunks(tmp_path, chunks):
    path = write(tmp_path / "s.h5", compression=None if chunks is None else "lzf", chunks=chunks, maxshape=None)
    assert np.array_equal(load(path).images, images())


def test_cache(tmp_path):
    path = write(tmp_path / "s.h5", **PACKED)
    dataset = load(path, cache=True)
    assert isinstance(dataset.images, np.memmap)
    assert np.array_equal(dataset.images, images())
    assert (tmp_path / "s.h5.cache.npy").exists()
    calls = []
    load_shapes3d(path, cache=True, progress=lambda *call: calls.append(call))
    assert calls == []
    load_shapes3d(path, progress=lambda *call: calls.append(call))
    assert calls[-1] == (len(labels()), len(labels()))


def test_labels_with_the_noise_of_their_arithmetic(tmp_path):
    noisy = labels() * (1 + 1e-12 * np.random.default_rng(0).standard_normal(labels().shape))
    assert load(write(tmp_path / "s.h5", labels=noisy)).factor_sizes == SIZES
    assert load(write(tmp_path / "f.h5", labels=labels().astype(np.float32))).factor_sizes == SIZES


def test_slabs_smaller_than_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdis.data.hdf5.SLAB", 8 * 8 * 3 * 10)
    path = write(tmp_path / "s.h5", **PACKED)
    calls = []
    dataset = load(path, cache=True, progress=lambda done, total: calls.append(done))
    assert np.array_equal(dataset.images, images())
    assert calls[0] == 7
    assert len(calls) == -(-len(labels()) // 7)


def swapped() -> np.ndarray:
    result = labels()
    result[[0, 1]] = result[[1, 0]]
    return result


def with_nan() -> np.ndarray:
    result = labels()
    result[3, 2] = np.nan
    return result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("images",)}, "lacks the array labels; it has images"),
        ({"names": ("images", "labels"), "images": images().astype(np.float32)}, "images are float32"),
        ({"images": images().astype(np.int8)}, "images are int8"),
        ({"images": images()[..., :1]}, "expected uint8"),
        ({"images": images()[..., 0]}, "expected uint8"),
        ({"images": images()[:0]}, "expected uint8"),
        ({"images": images()[:-1]}, "95 images and 96 labels"),
        ({"images": images()[:-1], "labels": labels()[:-1]}, "expected .96, 6."),
        ({"labels": labels()[:, :5]}, r"labels are \[96, 5\]"),
        ({"labels": labels()[:, 0]}, r"labels are \[96\]"),
        ({"labels": swapped()}, "grid of sizes"),
        ({"labels": with_nan()}, "finite"),
        ({"labels": labels().astype("S8")}, "finite"),
    ],
)
def test_files_that_are_not_3d_shapes(tmp_path, changes, message):
    path = write(tmp_path / "odd.h5", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_shapes3d(path)
    assert str(caught.value).startswith(f"{path}: not a readable 3D Shapes .h5")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_truncated_file(tmp_path, packed, keep):
    content = write(tmp_path / "whole.h5", **(PACKED if packed else {})).read_bytes()
    path = tmp_path / "cut.h5"
    path.write_bytes(content[:keep])
    for reader in (load, load_shapes3d):
        with pytest.raises(ValueError, match=r"cut\.h5"):
            reader(path)
    assert path.read_bytes() == content[:keep]


def test_damaged_chunk(tmp_path):
    path = write(tmp_path / "bad.h5", **PACKED)
    with h5py.File(path) as file:
        place = file["images"].id.get_chunk_info(20)
    content = bytearray(path.read_bytes())
    content[place.byte_offset + place.size // 2] ^= 0xFF
    path.write_bytes(content)
    for cache in (None, True):
        with pytest.raises(ValueError, match=r"bad\.h5: not a readable 3D Shapes"):
            load(path, cache=cache)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.h5"]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.h5"):
        load_shapes3d(tmp_path / "gone.h5")
    with pytest.raises(IsADirectoryError, match="a folder; expected a 3D Shapes"):
        load_shapes3d(tmp_path)
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(ValueError, match=r"text\.h5: not a readable 3D Shapes"):
        load_shapes3d(tmp_path / "text.h5")


def test_without_h5py(tmp_path, monkeypatch):
    path = write(tmp_path / "s.h5")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"needs h5py: pip install 'fastdis\[data\]'"):
        load(path)
