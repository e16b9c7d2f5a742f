"""SmallNORB read from its binary matrices: the grid put in order, both splits or one, and damaged files."""

from __future__ import annotations

import gzip
import itertools

import numpy as np
import pytest
from PIL import Image

from fastdis.data import load, load_small_norb

NAMES = {"training": "smallnorb-5x46789x9x18x6x2x96x96-training", "testing": "smallnorb-5x01235x9x18x6x2x96x96-testing"}
INSTANCES = {"training": (4, 6), "testing": (0, 1)}
ELEVATIONS, AZIMUTHS, LIGHTINGS = (0, 8), (0, 2, 34), (0, 5)
MAGIC = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54, "float32": 0x1E3D4C51}


def matrix(array: np.ndarray) -> bytes:
    sizes = [*array.shape, *[1] * (3 - array.ndim)]
    header = np.array([MAGIC[array.dtype.name], array.ndim, *sizes], "<i4")
    return header.tobytes() + array.tobytes()


def parts(split: str) -> dict[str, np.ndarray]:
    """Return what the files of a split hold, images in no order; a pixel tells its factors."""
    table = np.array(list(itertools.product(range(2), INSTANCES[split], ELEVATIONS, AZIMUTHS, LIGHTINGS)), np.int32)
    table = np.random.default_rng(0).permutation(table)
    pairs = np.zeros((len(table), 2, 6, 6), np.uint8)
    pairs[:, 0, 0, :5] = table + 200
    pairs[:, 1] = 7
    return {"dat": pairs, "cat": table[:, 0].copy(), "info": table[:, 1:].copy()}


def write(folder, *, packed=False, splits=("training", "testing"), **changes):
    for split in splits:
        for kind, array in {**parts(split), **(changes if split == "training" else {})}.items():
            content = matrix(array)
            name = f"{NAMES[split]}-{kind}.mat"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, 1))
            else:
                (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_both_splits_make_one_grid(tmp_path, packed):
    dataset = load(write(tmp_path, packed=packed))
    assert dataset.factor_names == ("category", "instance", "elevation", "azimuth", "lighting")
    assert dataset.factor_sizes == (2, 4, 2, 3, 2)
    assert dataset.image_shape == (1, 6, 6)
    stored = dataset.images[:, 0, :5].astype(int) - 200
    grid = list(itertools.product(range(2), (0, 1, 4, 6), ELEVATIONS, AZIMUTHS, LIGHTINGS))
    assert stored.tolist() == [list(row) for row in grid]
    degrees = [[c, i, 30 + 5 * e, 10 * a, light] for c, i, e, a, light in grid]
    assert dataset.values(range(len(dataset))).tolist() == degrees


@pytest.mark.parametrize("split", ["training", "testing"])
def test_one_split_has_its_own_instances(tmp_path, split):
    dataset = load(write(tmp_path, splits=(split,)), split=split)
    assert dataset.factor_sizes == (2, 2, 2, 3, 2)
    assert dataset.factor_values[1].tolist() == list(INSTANCES[split])
    assert dataset.factor_values[3].tolist() == [0, 20, 340]
    assert dataset.images[0, 0, 1] == 200 + INSTANCES[split][0]


def test_a_file_stands_for_its_folder(tmp_path):
    write(tmp_path)
    file = tmp_path / f"{NAMES['training']}-cat.mat"
    assert np.array_equal(load(file).images, load_small_norb(tmp_path).images)


def test_resizing(tmp_path):
    whole, small = load(write(tmp_path)), load(tmp_path, size=3, resample="box")
    wanted = np.asarray(Image.fromarray(whole.images[17]).resize((3, 3), Image.Resampling.BOX))
    assert np.array_equal(small.images[17], wanted)


def test_missing_files_are_named(tmp_path):
    write(tmp_path, splits=("training",))
    with pytest.raises(FileNotFoundError, match=r'no smallnorb-\.\.\.-testing-dat\.mat.*split="training"'):
        load(tmp_path)
    (tmp_path / f"{NAMES['training']}-info.mat").unlink()
    with pytest.raises(FileNotFoundError, match="training-info"):
        load(tmp_path, split="training")
    with pytest.raises(FileNotFoundError, match="gone"):
        load_small_norb(tmp_path / "gone")
    with pytest.raises(ValueError, match="split must be both, training or testing, got 'train'"):
        load_small_norb(tmp_path, split="train")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [0, 3, 10, 50, -1])
def test_truncated_file(tmp_path, packed, keep):
    write(tmp_path, packed=packed)
    path = tmp_path / f"{NAMES['training']}-dat.mat{'.gz' if packed else ''}"
    content = path.read_bytes()[:keep]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"training-dat\.mat.*: not a readable SmallNORB dat file"):
        load(tmp_path)
    assert path.read_bytes() == content


def odd_azimuth() -> np.ndarray:
    info = parts("training")["info"]
    info[3, 2] = 1
    return info


def doubled() -> np.ndarray:
    info = parts("training")["info"]
    info[:] = info[0]
    return info


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dat": parts("training")["dat"].astype(np.int32)}, "dat file.*int32"),
        ({"dat": parts("training")["dat"][:, :1]}, r"expected uint8 \[n, 2, H, W\]"),
        ({"dat": parts("training")["dat"][:, 0]}, r"expected uint8 \[n, 2, H, W\]"),
        ({"dat": parts("training")["dat"][:0]}, "dat file"),
        ({"cat": parts("training")["cat"].astype(np.float32)}, r"cat file.*expected int32 \[n\]"),
        ({"cat": parts("training")["cat"][:-1]}, "48 images, 47 categories"),
        ({"info": parts("training")["info"][:, :3].copy()}, r"info file.*expected int32 \[n, 4\]"),
        ({"info": odd_azimuth()}, "training-info.mat: azimuths are odd"),
        ({"info": -parts("training")["info"]}, "negative"),
        ({"info": doubled()}, "96 images of SmallNORB, expected one for each combination of category 2, instance"),
        ({"info": parts("testing")["info"]}, "expected one for each combination"),
    ],
)
def test_files_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, **changes))


def test_other_content(tmp_path):
    write(tmp_path)
    path = tmp_path / f"{NAMES['testing']}-cat.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file, Platform")
    with pytest.raises(ValueError, match=r"testing-cat\.mat.*starts with 0x4c54414d, expected one of 0x1e3d4c51"):
        load(tmp_path)
