"""MPI3D: factor sizes told from the number of images."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from fastdis.data import load, load_mpi3d


def pixels(count: int) -> np.ndarray:
    """Return images of one pixel that tell their number."""
    numbers = np.arange(count, dtype="<u4")
    return numbers.view(np.uint8).reshape(count, 4)[:, :3].reshape(count, 1, 1, 3)


@pytest.mark.parametrize(("count", "sizes"), [(1_036_800, (6, 6, 2, 3, 3, 40, 40)), (460_800, (4, 4, 2, 3, 3, 40, 40))])
def test_sizes_follow_the_number_of_images(tmp_path, count, sizes):
    np.savez(tmp_path / "mpi3d.npz", images=pixels(count))
    dataset = load(tmp_path / "mpi3d.npz")
    assert dataset.factor_sizes == sizes
    assert dataset.factor_names[0] == "object_color"
    assert dataset.factor_names[-1] == "vertical_axis"
    assert isinstance(dataset.images, np.memmap)
    row = int(dataset.index([3, 2, 1, 0, 2, 17, 39]))
    assert row == ((((((3 * sizes[1] + 2) * 2 + 1) * 3 + 0) * 3 + 2) * 40) + 17) * 40 + 39
    assert np.array_equal(dataset.images[row], pixels(count)[row])


def test_compressed_file_is_cached(tmp_path):
    path = tmp_path / "mpi3d.npz"
    np.savez_compressed(path, images=pixels(460_800))
    assert np.array_equal(load(path).images, pixels(460_800))
    dataset = load_mpi3d(path, cache=tmp_path / "unpacked.npy")
    assert isinstance(dataset.images, np.memmap)
    assert np.array_equal(dataset.images, pixels(460_800))


def test_fortran_order(tmp_path):
    images = np.asfortranarray(pixels(460_800))
    np.savez(tmp_path / "stored.npz", images=images)
    np.savez_compressed(tmp_path / "packed.npz", images=images)
    for name in ("stored.npz", "packed.npz"):
        assert np.array_equal(load(tmp_path / name).images[[5, 77]], pixels(460_800)[[5, 77]])


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("keep", [0, 100, 5000, -1])
def test_truncated_file(tmp_path, compress, keep):
    path = tmp_path / "cut.npz"
    (np.savez_compressed if compress else np.savez)(path, images=pixels(460_800))
    path.write_bytes(path.read_bytes()[:keep])
    for reader in (load, load_mpi3d):
        with pytest.raises(ValueError, match=r"cut\.npz: not a readable"):
            reader(path)


def test_damage_is_noticed_in_a_packed_file(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, images=pixels(460_800))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.npz: not a readable MPI3D"):
        load(path, cache=True)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.npz"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pixels(460_799)}, "460,799 images, expected 1,036,800 .6 x 6 x 2 x 3 x 3 x 40 x 40. or 460,800"),
        ({"images": pixels(1)}, "1 images, expected"),
        ({"images": pixels(460_800).astype(np.float16)}, "float16"),
        ({"images": pixels(460_800).view(np.int8)}, "int8"),
        ({"images": pixels(460_800)[..., 0]}, "expected uint8"),
        ({"images": pixels(460_800)[..., :2]}, "expected uint8"),
        ({"images": np.zeros((460_800, 0, 1, 3), np.uint8)}, "expected uint8"),
        ({"images": np.array([None])}, "pickled"),
        ({"pictures": pixels(10)}, "lacks images; it has pictures"),
    ],
)
def test_files_that_are_not_mpi3d(tmp_path, arrays, message):
    path = tmp_path / "odd.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_mpi3d(path)
    assert str(caught.value).startswith(f"{path}: not a readable MPI3D .npz")


def test_a_header_that_promises_more_than_there_is(tmp_path):
    path = tmp_path / "long.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("images.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1_036_800, 64, 64, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(1000))
    with pytest.raises(ValueError, match="in 1000 bytes, which do not fit"):
        load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.npz"):
        load_mpi3d(tmp_path / "gone.npz")
    with pytest.raises(IsADirectoryError, match="MPI3D"):
        load_mpi3d(tmp_path)
