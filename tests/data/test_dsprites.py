"""dSprites drawn and read: against an oracle pixel by pixel, the published totals, and damaged files."""

from __future__ import annotations

import os
import pickle
import zipfile

import h5py
import numpy as np
import pytest

from fastdis.data import load, load_dsprites, make_dsprites

SMALL = {"size": 32, "shapes": 3, "scales": 2, "orientations": 2, "x": 3, "y": 4}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_dsprites(tmp_path_factory.mktemp("dsprites") / "small.npz", **SMALL)


def oracle(shape: int, scale: float, angle: float, x: float, y: float, size: int) -> np.ndarray:
    """Draw one image, a pixel at a time, by the definition."""
    if shape == 1:
        corners = [(-9.6, -9.6), (9.6, -9.6), (9.6, 9.6), (-9.6, 9.6)]
    elif shape == 2:
        corners = [(9.6 * 1.33 * np.cos(t), 9.6 / 1.33 * np.sin(t)) for t in 2 * np.pi * np.arange(100) / 100]
    else:
        corners = [
            (
                9.6 * np.sin(t) ** 3,
                -(19.2 / 29) * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) - 1.44,
            )
            for t in 2 * np.pi * np.arange(150) / 150
        ]
    points = []
    for a, b in corners:
        px = 16 + 32 * x + scale * (a * np.cos(angle) + b * np.sin(angle))
        py = 16 + 32 * y + scale * (-a * np.sin(angle) + b * np.cos(angle))
        points.append((round(px * size / 64 * 256), round(py * size / 64 * 256)))
    image = np.zeros((size, size), np.uint8)
    for row in range(size):
        for column in range(size):
            cx, cy = 256 * column + 128, 256 * row + 128
            for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
                if (y1 >= cy) != (y2 >= cy):
                    side = (cx - x1) * (y2 - y1) - (cy - y1) * (x2 - x1)
                    image[row, column] ^= side < 0 if y2 > y1 else side > 0
    return image


@pytest.mark.parametrize("size", [64, 32])
def test_pixels_follow_the_definition(tmp_path, size):
    path = make_dsprites(tmp_path / "some.npz", size=size, scales=[5, 1], orientations=[7], x=[0, 30], y=[19])
    archive = np.load(path, allow_pickle=True)
    assert len(archive["imgs"]) == 12
    for image, (_, shape, scale, angle, x, y) in zip(archive["imgs"], archive["latents_values"], strict=True):
        assert np.array_equal(image, oracle(int(shape), scale, angle, x, y, size)), (shape, scale, x, y)


def test_every_position_of_a_grid_is_where_it_should_be(tmp_path):
    dataset = load(make_dsprites(tmp_path / "grid.npz", size=64, shapes=[0], scales=[0], orientations=[0]))
    images = dataset.images.astype(float)
    mass = images.sum(axis=(1, 2))
    centre_x = (images.sum(axis=1) @ (np.arange(64) + 0.5)) / mass
    centre_y = (images.sum(axis=2) @ (np.arange(64) + 0.5)) / mass
    at = dataset.factors(range(len(dataset))).numpy() / 31
    assert np.abs(centre_x - (16 + 32 * at[:, 3])).max() <= 0.5
    assert np.abs(centre_y - (16 + 32 * at[:, 4])).max() <= 0.5


def test_layout_is_the_published_one(small):
    archive = np.load(small, allow_pickle=True)
    assert set(archive.files) == {"imgs", "latents_classes", "latents_values", "metadata"}
    assert archive["imgs"].shape == (144, 32, 32)
    assert archive["imgs"].dtype == np.uint8
    assert set(np.unique(archive["imgs"])) == {0, 1}
    assert archive["latents_classes"].dtype == np.int64
    assert archive["latents_values"].dtype == np.float64
    metadata = archive["metadata"][()]
    assert set(metadata) == {
        "date",
        "description",
        "version",
        "latents_names",
        "latents_possible_values",
        "latents_sizes",
        "author",
        "title",
    }
    assert metadata["latents_names"] == ("color", "shape", "scale", "orientation", "posX", "posY")
    assert metadata["latents_sizes"].tolist() == [1, 3, 2, 2, 3, 4]
    for k, name in enumerate(metadata["latents_names"]):
        possible = metadata["latents_possible_values"][name]
        assert np.array_equal(archive["latents_values"][:, k], possible[archive["latents_classes"][:, k]])
    assert archive["latents_classes"][-1].tolist() == [0, 2, 1, 1, 2, 3]
    assert archive["latents_classes"][1].tolist() == [0, 0, 0, 0, 0, 1]


def test_loading_drops_the_colour(small):
    dataset = load_dsprites(small)
    assert dataset.factor_names == ("shape", "scale", "orientation", "posX", "posY")
    assert dataset.factor_sizes == (3, 2, 2, 3, 4)
    assert dataset.batch([0]).max() == 1
    assert np.array_equal(dataset.images, np.load(small)["imgs"])


def test_uncompressed_files_are_mapped_and_equal(small, tmp_path):
    dataset = load(make_dsprites(tmp_path / "flat.npz", compress=False, **SMALL))
    assert isinstance(dataset.images, np.memmap)
    assert np.array_equal(dataset.images, load(small).images)


def test_the_same_request_makes_the_same_file(small, tmp_path):
    assert make_dsprites(tmp_path / "again.npz", **SMALL).read_bytes() == small.read_bytes()


def test_evenly_spread_counts(tmp_path):
    path = make_dsprites(tmp_path / "s.npz", size=32, shapes=2, scales=1, orientations=3, x=2, y=32)
    values = np.load(path, allow_pickle=True)["metadata"][()]["latents_possible_values"]
    assert values["shape"].tolist() == [1, 3]
    assert values["scale"].tolist() == pytest.approx([0.7])
    # A third of a turn apart, the start not repeated at its end.
    assert values["orientation"].tolist() == pytest.approx([0, 2 * np.pi / 3, 4 * np.pi / 3])
    assert values["posX"].tolist() == [0, 1]
    assert len(values["posY"]) == 32


def test_first_and_last_orientation_are_the_same_images(tmp_path):
    images = load(make_dsprites(tmp_path / "turn.npz", size=32, scales=[5], orientations=[0, 39, 20], x=4, y=4)).images
    first, last, half = images.reshape(3, 3, 16, 32, 32).swapaxes(0, 1)
    assert np.array_equal(first, last)
    assert not np.array_equal(first, half)


def test_progress_counts_up_to_the_end(tmp_path):
    seen: list[tuple[int, int]] = []
    make_dsprites(tmp_path / "p.npz", progress=lambda *call: seen.append(call), **SMALL)
    assert seen[-1] == (144, 144)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 28}, ValueError, "size must be 32 or 64, got 28"),
        ({"shapes": 4}, ValueError, "shapes must ask for 1 to 3 values, got 4"),
        ({"scales": 0}, ValueError, "scales"),
        ({"x": [0, 32]}, ValueError, "x must hold distinct positions from 0 to 31"),
        ({"y": [1, 1]}, ValueError, "y must hold distinct"),
        ({"y": [-1]}, ValueError, "y must hold distinct"),
        ({"orientations": []}, ValueError, "at least one"),
        ({"orientations": [0.5]}, TypeError, "orientations must be a whole number"),
        ({"x": 2.0}, TypeError, "x must be a whole number"),
        ({"x": "12"}, TypeError, "x must be"),
        ({"x": True}, TypeError, "x must be"),
    ],
)
def test_selections_that_do_not_exist(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        make_dsprites(tmp_path / "no.npz", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_the_old_file_and_nothing_else(small, tmp_path):
    path = tmp_path / "kept.npz"
    path.write_bytes(small.read_bytes())

    def fail(done: int, total: int) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        make_dsprites(path, progress=fail, **SMALL)
    assert path.read_bytes() == small.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["kept.npz"]


def test_writing_onto_a_folder_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        make_dsprites(tmp_path, **SMALL)


def test_missing_file(tmp_path):
    for reader in (load, load_dsprites):
        with pytest.raises(FileNotFoundError, match=r"gone\.npz"):
            reader(tmp_path / "gone.npz")


def test_other_formats_are_refused_by_name(tmp_path):
    (tmp_path / "shapes.h5").write_bytes(b"\x89HDF")
    with pytest.raises(ValueError, match=r"shapes\.h5.*'\.h5'"):
        load(tmp_path / "shapes.h5")


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated_file(small, tmp_path, keep):
    path = tmp_path / "cut.npz"
    path.write_bytes(small.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.npz: not a readable dSprites"):
        load(path)


def test_flipped_byte_is_noticed(small, tmp_path):
    content = bytearray(small.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path = tmp_path / "flipped.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.npz"):
        load(path)


def rewrite(source, path, **changes):
    """Copy a file with some of its arrays replaced, or left out where None."""
    arrays = {**np.load(source, allow_pickle=True), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_files_of_plain_savez_are_read(small, tmp_path):
    path = rewrite(small, tmp_path / "plain.npz")
    assert np.array_equal(load(path).images, load(small).images)


@pytest.mark.parametrize("name", ["imgs", "latents_classes", "metadata"])
def test_missing_part(small, tmp_path, name):
    with pytest.raises(ValueError, match=rf"lacks {name}"):
        load(rewrite(small, tmp_path / "part.npz", **{name: None}))


def test_parts_that_contradict_each_other(small, tmp_path):
    archive = np.load(small, allow_pickle=True)
    images, classes, metadata = archive["imgs"], archive["latents_classes"], archive["metadata"][()]
    path = tmp_path / "odd.npz"
    swapped = classes.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    sizes = {**metadata, "latents_sizes": np.array([1, 3, 2, 2, 4, 3])}
    names = {**metadata, "latents_names": ("color", "shape", "scale", "orientation", "posY", "posX")}
    for changes, message in (
        ({"imgs": images[:-1]}, "expected"),
        ({"imgs": images[:-1], "latents_classes": classes[:-1]}, "grid of 144"),
        ({"imgs": images.astype(np.float32)}, "float32"),
        ({"imgs": images * 255}, "other than 0 and 1"),
        ({"latents_classes": classes[:, 1:]}, "latents_classes"),
        ({"latents_classes": swapped}, "last factor fastest"),
        ({"metadata": np.array(sizes, dtype=object)}, "last factor fastest"),
        ({"metadata": np.array(names, dtype=object)}, "posY"),
        ({"metadata": np.array({}, dtype=object)}, "latents_names"),
        ({"metadata": np.array([1, 2])}, "its metadata is not"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load(rewrite(small, path, **changes))
        assert "odd.npz" in str(caught.value)


class Trap:
    """Unpickles into a call."""

    def __reduce__(self):
        return (os.mkdir, ("sprung",))


def test_metadata_cannot_run_code(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = rewrite(small, tmp_path / "trap.npz", metadata=np.array(Trap(), dtype=object))
    with pytest.raises(ValueError, match=r"trap\.npz.*mkdir"):
        load(path)
    assert not (tmp_path / "sprung").exists()


def test_metadata_pickled_by_python_2_is_read(small, tmp_path):
    """The published file: byte strings for keys and array contents, and the old module path of NumPy."""
    archive = np.load(small, allow_pickle=True)
    pickled = pickle.dumps(np.array(archive["metadata"][()], dtype=object), protocol=2)
    pickled = pickled.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
    # BINUNICODE, with a length of four bytes, becomes SHORT_BINSTRING, with one of one byte.
    for text in (b"latents_names", b"latents_sizes", b"color", b"shape", b"posX", b"posY"):
        pickled = pickled.replace(b"X" + len(text).to_bytes(4, "little") + text, b"U" + bytes([len(text)]) + text)
    path = tmp_path / "old.npz"
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            if name != "metadata.npy":
                target.writestr(name, source.read(name))
        with target.open("metadata.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": ()})
            member.write(pickled)
    assert load(path).factor_sizes == (3, 2, 2, 3, 4)


@pytest.mark.slow
def test_full_set_has_the_published_totals(tmp_path):
    dataset = load(make_dsprites(tmp_path / "full.npz", compress=False))
    assert dataset.factor_sizes == (3, 6, 40, 32, 32)
    white = np.concatenate(
        [part.reshape(len(part), -1).sum(axis=1, dtype=np.int64) for part in np.array_split(dataset.images, 100)]
    )
    # Published: mean pixel 0.042494423521889584 and mean per-image standard deviation 0.19516645880626055.
    assert abs(white.sum() - 128_328_862) <= 100
    share = white / 4096
    assert np.sqrt(share * (1 - share) * 4096 / 4095).mean() == pytest.approx(0.19516645880626055, abs=1e-6)


def test_values_are_those_of_the_file(small):
    dataset = load(small)
    values = np.load(small)["latents_values"]
    assert np.array_equal(dataset.values(range(len(dataset))).numpy(), values[:, 1:])
    assert dataset.factor_values[0].tolist() == [1, 2, 3]


def test_files_without_values_are_read(small, tmp_path):
    assert load(rewrite(small, tmp_path / "bare.npz", latents_values=None)).factor_values is None


def test_values_that_contradict_the_classes(small, tmp_path):
    values = np.load(small)["latents_values"]
    values[7, 2] += 0.1
    with pytest.raises(ValueError, match=r"odd\.npz.*values of factor 1"):
        load(rewrite(small, tmp_path / "odd.npz", latents_values=values))


def write_h5(source, path, *, leave_out=(), **options):
    """Write the published HDF5 twin of an npz."""
    archive = np.load(source)
    arrays = {"imgs": "imgs", "latents/classes": "latents_classes", "latents/values": "latents_values"}
    with h5py.File(path, "w") as file:
        for name, old in arrays.items():
            if name not in leave_out:
                file.create_dataset(name, data=archive[old], **(options if name == "imgs" else {}))
    return path


@pytest.mark.parametrize("options", [{}, {"chunks": (50, 2, 4), "compression": "gzip"}])
def test_hdf5_twin(small, tmp_path, options):
    dataset = load(write_h5(small, tmp_path / "twin.h5", **options))
    same = load(small)
    assert np.array_equal(dataset.images, same.images)
    assert isinstance(dataset.images, np.memmap) == (not options)
    assert dataset.factor_sizes == same.factor_sizes
    assert dataset.factor_names == same.factor_names
    assert dataset.max_value == 1
    assert np.array_equal(dataset.values(range(9)), same.values(range(9)))
    assert np.array_equal(load_dsprites(tmp_path / "twin.h5", cache=True).images, same.images)


@pytest.mark.parametrize("name", ["imgs", "latents/classes", "latents/values"])
def test_hdf5_twin_with_a_part_missing(small, tmp_path, name):
    with pytest.raises(ValueError, match=rf"part\.h5: not a readable dSprites .*lacks the array {name}"):
        load_dsprites(write_h5(small, tmp_path / "part.h5", leave_out=(name,)))


def test_hdf5_twin_that_contradicts_itself(small, tmp_path):
    path = write_h5(small, tmp_path / "odd.h5")
    for name, change, message in (
        ("latents/classes", lambda array: array[::-1], "last factor fastest"),
        ("latents/classes", lambda array: array[:, :5], "whole numbers"),
        ("latents/classes", lambda array: array + 0.5, "whole numbers"),
        ("latents/classes", lambda array: array + np.eye(1, 6, dtype=int), "2 colours"),
        ("latents/classes", lambda array: array[:100], "100 latents"),
        ("latents/values", lambda array: array[:100], "factor values"),
        ("imgs", lambda array: array * 255, "other than 0 and 1"),
        ("imgs", lambda array: array.astype(float), "float64"),
    ):
        with h5py.File(path, "r+") as file:
            whole = file[name][...]
            del file[name]
            file[name] = change(whole)
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert "odd.h5" in str(caught.value)
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = whole


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="a folder; expected a dSprites"):
        load_dsprites(tmp_path)
