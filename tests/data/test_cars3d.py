"""Cars3D read from folders and archives: the order of list.txt, and files that are wrong or missing."""

from __future__ import annotations

import io
import sys
import tarfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from fastdis.data import load, load_cars3d

NAMES = ("car_007_mesh", "car_001_mesh", "car_012_mesh")


def car(number: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side, side, 3, 24, 4), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    cars = tmp_path / "data" / "cars"
    cars.mkdir(parents=True)
    (cars / "list.txt").write_text("\n".join(NAMES) + "\n")
    for number, name in enumerate(NAMES):
        scipy.io.savemat(cars / f"{name}.mat", {"im": car(number)}, do_compression=True)
    return tmp_path


def archive(folder, path, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        # The list last, as a pass over the archive must not rely on it coming first.
        for name in [*NAMES, "list"]:
            file = folder / "data" / "cars" / (f"{name}.mat" if name != "list" else "list.txt")
            if file.exists():
                tar.add(file, f"./data/cars/{file.name}")
        other = tarfile.TarInfo("data/sprites/list.txt")
        other.size = 5
        tar.addfile(other, io.BytesIO(b"other"))
    return path


def check(dataset):
    assert dataset.factor_names == ("elevation", "azimuth", "type")
    assert dataset.factor_sizes == (4, 24, 3)
    for elevation, azimuth, kind in ((0, 0, 0), (3, 5, 1), (2, 23, 2), (1, 0, 2)):
        row = int(dataset.index([elevation, azimuth, kind]))
        assert np.array_equal(dataset.images[row], car(kind)[:, :, :, azimuth, elevation])


@pytest.mark.parametrize("place", [".", "data", "data/cars"])
def test_folder_in_the_order_of_its_list(folder, place):
    check(load(folder / place))


@pytest.mark.parametrize(("name", "mode"), [("cars.tar.gz", "w:gz"), ("cars.tar", "w")])
def test_archive_in_the_order_of_its_list(folder, tmp_path, name, mode):
    calls = []
    check(load(archive(folder, tmp_path / name, mode), progress=lambda *call: calls.append(call)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_names_with_suffix_folder_and_blank_lines(folder):
    (folder / "data/cars/list.txt").write_text("".join(f"cars/{name}.mat\r\n\n" for name in NAMES))
    check(load(folder))


@pytest.mark.parametrize("resample", ["lanczos", "box"])
def test_resizing(folder, resample):
    dataset = load(folder, size=4, resample=resample)
    assert dataset.image_shape == (3, 4, 4)
    image = Image.fromarray(np.ascontiguousarray(car(1)[:, :, :, 7, 2]))
    wanted = np.asarray(image.resize((4, 4), Image.Resampling[resample.upper()]))
    assert np.array_equal(dataset.images[int(dataset.index([2, 7, 1]))], wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be a positive"),
        ({"size": 64.0}, "size must be"),
        ({"size": True}, "size must be"),
        ({"size": 64, "resample": "antialias"}, "resample must be one of nearest"),
    ],
)
def test_sizes_that_do_not_exist(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_cars3d(folder, **options)


def test_missing_car_is_named(folder, tmp_path):
    (folder / "data/cars/car_001_mesh.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"car_001_mesh\.mat: no such file; expected a Cars3D"):
        load(folder)
    with pytest.raises(ValueError, match=r"cars\.tar\.gz.*lacks cars/car_001_mesh\.mat"):
        load(archive(folder, tmp_path / "cars.tar.gz"))


def test_missing_list(folder, tmp_path):
    (folder / "data/cars/list.txt").unlink()
    with pytest.raises(ValueError, match=r"cars\.tar\.gz: not a readable Cars3D.*lacks cars/list\.txt"):
        load(archive(folder, tmp_path / "cars.tar.gz"))
    with pytest.raises(FileNotFoundError, match=r"no cars/list\.txt"):
        load_cars3d(folder)


@pytest.mark.parametrize("text", ["", "\n\n", "car_007_mesh\ncar_007_mesh\n"])
def test_lists_that_do_not_do(folder, text):
    (folder / "data/cars/list.txt").write_text(text)
    with pytest.raises(ValueError, match=r"list\.txt: not a readable Cars3D list\.txt"):
        load(folder)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"im": car(1).astype(float)}, "float64"),
        ({"im": car(1).astype(np.int8)}, "int8"),
        ({"im": car(1).transpose(0, 1, 2, 4, 3)}, r"\[6, 6, 3, 4, 24\], expected uint8"),
        ({"im": car(1)[..., 0]}, "expected uint8"),
        ({"im": car(1, side=5)}, r"its images are \[5, 5\], and the others \[6, 6\]"),
        ({"image": car(1)}, "lacks im"),
    ],
)
def test_cars_that_do_not_do(folder, tmp_path, variables, message):
    scipy.io.savemat(folder / "data/cars/car_001_mesh.mat", variables)
    for path in (folder, archive(folder, tmp_path / "cars.tar.gz")):
        with pytest.raises(ValueError, match=message) as caught:
            load_cars3d(path)
        assert "car_001_mesh.mat" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 50, 200, -1])
def test_truncated_car(folder, keep):
    path = folder / "data/cars/car_012_mesh.mat"
    content = path.read_bytes()[:keep]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"car_012_mesh\.mat: not a readable Cars3D \.mat"):
        load(folder)
    assert path.read_bytes() == content


@pytest.mark.parametrize("keep", [0, 5, 1000, -10])
def test_truncated_archive(folder, tmp_path, keep):
    path = archive(folder, tmp_path / "cars.tar.gz")
    path.write_bytes(path.read_bytes()[:keep])
    for reader in (load, load_cars3d):
        with pytest.raises(ValueError, match=r"cars\.tar\.gz: not a readable Cars3D"):
            reader(path)


def test_no_such_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        load_cars3d(tmp_path / "gone")


def test_without_scipy(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"needs scipy: pip install 'fastdis\[data\]'"):
        load(folder)
