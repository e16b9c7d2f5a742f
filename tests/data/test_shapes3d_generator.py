"""Coloured 3D shapes drawn: the file, the scene against geometry worked out by hand, and what must not change it."""

from __future__ import annotations

import colorsys
import hashlib
import itertools
import os
import platform
import signal
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

import fastdis
from fastdis.data import _host_shapes3d as renderer
from fastdis.data import load, make_shapes3d, shapes3d

SMALL = {"size": 32, "floor_hues": 2, "wall_hues": 3, "object_hues": 2, "scales": 3, "shapes": 4, "orientations": 2}
SIZES = (2, 3, 2, 3, 4, 2)
SCENE = renderer.Scene()
compiled = pytest.mark.skipif(renderer.extension is None, reason="nothing was compiled")
IMPLEMENTATIONS = [
    pytest.param(renderer.weights, id="compiled", marks=compiled),
    pytest.param(renderer.weights_numpy, id="numpy"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_shapes3d(tmp_path_factory.mktemp("shapes") / "small.h5", **SMALL)


@pytest.fixture(scope="module")
def all_weights():
    """The weights of all 480 geometries at 32 pixels, [8, 4, 15, 3, 1024]."""
    triples = itertools.product(*list(shapes3d.VALUES.values())[3:])
    geometries = np.array([shapes3d._geometry(*triple) for triple in triples])
    return renderer.weights(SCENE.numbers(), geometries, 32, 4).reshape(8, 4, 15, 3, 1024)


def read(path) -> tuple[np.ndarray, np.ndarray]:
    with h5py.File(path) as file:
        return file["images"][...], file["labels"][...]


def geometry(shape: int, scale: float = 1.0, orientation: float = 0.0) -> np.ndarray:
    return np.array([shapes3d._geometry(scale, shape, orientation)])


def project(points: np.ndarray, orientation: float, size: int) -> np.ndarray:
    """Return where points [n, 3] of the room appear, column and row in pixels [n, 2], by turning the room."""
    angle = np.radians(orientation)
    x = points[:, 0] * np.cos(angle) + points[:, 1] * np.sin(angle)
    y = -points[:, 0] * np.sin(angle) + points[:, 1] * np.cos(angle)
    tilt = np.arctan2(SCENE.height - SCENE.target, SCENE.distance)
    ahead, above = y + SCENE.distance, points[:, 2] - SCENE.height
    depth = ahead * np.cos(tilt) - above * np.sin(tilt)
    half = depth * np.tan(np.radians(SCENE.view / 2))
    return size / 2 * np.stack([1 + x / half, 1 - (ahead * np.sin(tilt) + above * np.cos(tilt)) / half], axis=-1)


def surface_points(shape: int, radius: float, height: float) -> np.ndarray:
    """Return points all over an object, its edges and corners among them."""
    if shape == 0:
        grid = np.linspace(-radius, radius, 41)
        points = np.stack(np.meshgrid(grid, grid, grid + radius, indexing="ij"), axis=-1).reshape(-1, 3)
        outside = np.abs(points - [0, 0, radius]).max(axis=1) > radius - 1e-9
        return points[outside]
    turn, rise = (g.ravel() for g in np.meshgrid(np.linspace(0, 2 * np.pi, 200), np.linspace(0, np.pi, 101)))
    if shape == 1:
        return np.stack([radius * np.cos(turn), radius * np.sin(turn), height * rise / np.pi], axis=-1)
    z = height / 2 - radius * np.cos(rise) + (height / 2 - radius) * -np.sign(np.cos(rise))
    return np.stack([radius * np.sin(rise) * np.cos(turn), radius * np.sin(rise) * np.sin(turn), z], axis=-1)


# The file


@pytest.mark.parametrize("size", [64, 32])
def test_layout_is_the_published_one(tmp_path, size):
    path = make_shapes3d(tmp_path / "new" / "grid.h5", **{**SMALL, "size": size})
    with h5py.File(path) as file:
        assert set(file) == {"images", "labels"}
        assert not file.attrs
        assert file["images"].shape == (288, size, size, 3)
        assert file["images"].dtype == np.uint8
        assert file["labels"].shape == (288, 6)
        assert file["labels"].dtype == np.float64
    labels = read(path)[1]
    assert labels[0].tolist() == [0, 0, 0, 0.75, 0, -30]
    assert labels[1].tolist() == [0, 0, 0, 0.75, 0, 30]
    assert labels[2].tolist() == [0, 0, 0, 0.75, 1, -30]
    assert labels[-1].tolist() == [0.5, 0.7, 0.5, 1.25, 3, 30]
    assert list(path.parent.iterdir()) == [path]


def test_values_of_the_full_grid():
    values = list(shapes3d.VALUES.values())
    assert [len(v) for v in values] == [10, 10, 10, 8, 4, 15]
    for hues in values[:3]:
        assert hues.tolist() == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert values[3] == pytest.approx([0.75 + k / 14 for k in range(8)])
    assert values[4].tolist() == [0, 1, 2, 3]
    assert values[5] == pytest.approx([-30 + 30 / 7 * k for k in range(15)])


def test_the_flat_file_is_one_block_and_the_packed_one_has_whole_images(small, tmp_path):
    packed = make_shapes3d(tmp_path / "packed.h5", compress=True, **SMALL)
    with h5py.File(small) as flat, h5py.File(packed) as file:
        assert flat["images"].chunks is None
        assert flat["images"].compression is None
        offset = flat["images"].id.get_offset()
        assert file["images"].compression == "gzip"
        assert file["images"].chunks == (21, 32, 32, 3)  # 288 images are no multiple of it
    for ours, theirs in zip(read(small), read(packed), strict=True):
        assert np.array_equal(ours, theirs)
    assert np.array_equal(np.memmap(small, np.uint8, "r", offset, (288, 32, 32, 3)), read(small)[0])
    assert packed.stat().st_size < small.stat().st_size / 3


@pytest.mark.parametrize("compress", [False, True])
def test_blocks_do_not_show(small, tmp_path, monkeypatch, compress):
    monkeypatch.setattr(shapes3d, "BLOCK_BYTES", 5 * 24 * 3072 + 1)  # five colourings, of twelve
    path = make_shapes3d(tmp_path / "blocks.h5", compress=compress, **SMALL)
    assert np.array_equal(read(path)[0], read(small)[0])


def test_it_loads(small, tmp_path):
    dataset = load(small)
    assert isinstance(dataset.images, np.memmap)
    assert dataset.factor_sizes == SIZES
    images, labels = read(small)
    assert np.array_equal(dataset.images, images)
    for column, values in zip(labels.T, dataset.factor_values, strict=True):
        assert list(dict.fromkeys(column)) == pytest.approx(list(values))
    packed = load(make_shapes3d(tmp_path / "packed.h5", compress=True, **SMALL))
    assert packed.factor_sizes == SIZES
    assert np.array_equal(packed.images, images)


def test_one_image(tmp_path):
    one = dict.fromkeys(["floor_hues", "wall_hues", "object_hues", "scales", "shapes", "orientations"], 1)
    for compress in (False, True):
        images, labels = read(make_shapes3d(tmp_path / "one.h5", compress=compress, **one))
        assert images.shape == (1, 64, 64, 3)
        # Of each factor the middle; of hues, a circle, the first.
        assert labels.tolist() == [[0, 0, 0, pytest.approx(0.75 + 3 / 14), 1, 0]]


def test_selections(small, tmp_path):
    some = {"floor_hues": [5], "wall_hues": (7, 0), "object_hues": range(0, 6, 5), "scales": np.array([7, 0])}
    path = make_shapes3d(tmp_path / "some.h5", size=32, **some, shapes=iter([2, 0]), orientations=[np.int64(14)])
    images, labels = read(path)
    assert labels[:, 0].tolist() == [0.5] * 16
    assert list(dict.fromkeys(labels[:, 1])) == [0.7, 0]
    assert list(dict.fromkeys(labels[:, 3])) == [1.25, 0.75]
    assert labels[:4, 4].tolist() == [2, 0, 2, 0]
    # The same factors make the same image, whatever else is drawn.
    where = {tuple(row): image for row, image in zip(np.round(read(small)[1], 9), read(small)[0], strict=True)}
    for image, row in zip(images, np.round(labels, 9), strict=True):
        assert np.array_equal(image, where[tuple(row)])


def test_hues_spread_over_a_circle(tmp_path):
    counts = {"floor_hues": 4, "wall_hues": 10, "object_hues": 5, "scales": 1, "shapes": 2, "orientations": 3}
    labels = read(make_shapes3d(tmp_path / "s.h5", size=32, **counts))[1]
    values = [list(dict.fromkeys(column)) for column in labels.T]
    assert values[0] == [0, 0.2, 0.5, 0.8]
    assert values[1] == [k / 10 for k in range(10)]
    assert values[2] == [0, 0.2, 0.4, 0.6, 0.8]
    assert values[4:] == [[0, 3], [-30, 0, 30]]


@pytest.mark.parametrize("compress", [False, True])
def test_progress_counts_up_to_the_end(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(shapes3d, "BLOCK_BYTES", 1)
    seen: list[tuple[int, int]] = []
    make_shapes3d(tmp_path / "p.h5", compress=compress, progress=lambda *call: seen.append(call), **SMALL)
    assert len(seen) >= 12
    assert seen[-1] == (288, 288)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 28}, ValueError, "size must be 32 or 64, got 28"),
        ({"size": "64"}, ValueError, "size must be 32 or 64, got '64'"),
        ({"floor_hues": 11}, ValueError, "floor_hues must ask for 1 to 10 values, got 11"),
        ({"wall_hues": 0}, ValueError, "wall_hues must ask for 1 to 10"),
        ({"object_hues": [10]}, ValueError, "object_hues must hold distinct positions from 0 to 9"),
        ({"scales": [1, 1]}, ValueError, "scales must hold distinct positions from 0 to 7"),
        ({"shapes": []}, ValueError, "shapes must hold distinct positions from 0 to 3, at least one"),
        ({"shapes": "cube"}, TypeError, "shapes must be a whole number"),
        ({"orientations": 2.0}, TypeError, "orientations must be a whole number"),
        ({"orientations": [0.5]}, TypeError, "orientations must be a whole number"),
        ({"scales": True}, TypeError, "scales must be a whole number"),
        ({"scales": -1}, ValueError, "scales must ask for 1 to 8 values, got -1"),
    ],
)
def test_refused_requests_leave_nothing(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        make_shapes3d(tmp_path / "new" / "s.h5", **arguments)
    assert not list(tmp_path.iterdir())


def test_missing_h5py_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"h5py.*pip install 'fastdis\[data\]'"):
        make_shapes3d(tmp_path / "new" / "s.h5", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_the_file_that_was_there(tmp_path, compress, error):
    path = tmp_path / "s.h5"
    path.write_text("mine")

    def interrupt(done, total):
        raise error("stop")

    with pytest.raises(error, match="stop"):
        make_shapes3d(path, compress=compress, progress=interrupt, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["s.h5"]
    assert path.read_text() == "mine"


def test_too_full_a_disk_is_known_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes3d.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 288 * 3072 - 1}))
    with pytest.raises(OSError, match=r"0\.00 GB are needed and 0\.00 GB are free"):
        make_shapes3d(tmp_path / "s.h5", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("limit", [1000, 40_000])
def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path, compress, limit):
    import resource

    path = tmp_path / "s.h5"
    path.write_text("mine")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            make_shapes3d(path, compress=compress, **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [file.name for file in tmp_path.iterdir()] == ["s.h5"]
    assert path.read_text() == "mine"


# The scene


@pytest.mark.parametrize("weights", IMPLEMENTATIONS)
@pytest.mark.parametrize("orientation", [-30.0, 0.0, 12.0])
@pytest.mark.parametrize("shape", [0, 1, 2, 3])
def test_the_object_stands_where_perspective_puts_it(weights, shape, orientation):
    body = geometry(shape, 1.2, orientation)
    seen = project(surface_points(shape, *body[0, 1:3]), orientation, 64)
    part = weights(SCENE.numbers(), body, 64, 4)[0, 2].reshape(64, 64)
    columns, rows = np.flatnonzero(part.any(axis=0)), np.flatnonzero(part.any(axis=1))
    # Rays are a quarter of a pixel apart.
    assert [columns[0], columns[-1] + 1] == pytest.approx([seen[:, 0].min(), seen[:, 0].max()], abs=1.25)
    assert [rows[0], rows[-1] + 1] == pytest.approx([seen[:, 1].min(), seen[:, 1].max()], abs=1.25)
    # Where its points are seen there is object; those on the outline may fall on the pixel beside it.
    inside = np.floor(seen).astype(int)
    assert (part[inside[:, 1], inside[:, 0]] > 0).mean() > 0.97


@pytest.mark.parametrize("weights", IMPLEMENTATIONS)
def test_a_sphere_is_round_and_shaded_by_lambert(weights):
    radius, height = shapes3d.PROPORTIONS[2]
    part = weights(SCENE.numbers(), geometry(2), 64, 1)[0, 2].reshape(64, 64)
    camera = np.array([0.0, -SCENE.distance, SCENE.height])
    forward = np.array([0.0, SCENE.distance, SCENE.target - SCENE.height])
    forward /= np.linalg.norm(forward)
    right, up = np.array([1.0, 0.0, 0.0]), np.cross([1.0, 0.0, 0.0], forward)
    v, u = np.meshgrid(1 - (np.arange(64) + 0.5) / 32, (np.arange(64) + 0.5) / 32 - 1, indexing="ij")
    tangent = np.tan(np.radians(SCENE.view / 2))
    rays = forward + tangent * (u[..., None] * right + v[..., None] * up)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    to_centre = np.array([0.0, 0.0, radius]) - camera
    closest = rays @ to_centre
    off = to_centre @ to_centre - closest**2
    hit = off < radius**2
    assert np.array_equal(part > 0, hit)
    t = closest - np.sqrt(np.where(hit, radius**2 - off, 0.0))
    normal = (camera + t[..., None] * rays - [0.0, 0.0, radius]) / radius
    light = np.array(SCENE.light) / np.linalg.norm(SCENE.light)
    expected = SCENE.ambient + (1 - SCENE.ambient) * np.maximum(normal @ light, 0)
    assert part[hit] / 65535 == pytest.approx(expected[hit], abs=1e-4)
    assert height == 2 * radius


@pytest.mark.parametrize("weights", IMPLEMENTATIONS)
def test_floor_walls_and_shadow_have_their_light(weights):
    orientation = 10.0
    part = weights(SCENE.numbers(), geometry(2, 1.0, orientation), 64, 4)[0].reshape(3, 64, 64) / 65535
    light = np.array(SCENE.light) / np.linalg.norm(SCENE.light)

    def at(surface, *point):
        column, row = np.floor(project(np.array([point], float), orientation, 64)[0]).astype(int)
        assert part[np.arange(3) != surface, row, column].max() == 0
        return part[surface, row, column]

    def lit(facing):
        return pytest.approx(SCENE.ambient + (1 - SCENE.ambient) * facing, abs=1e-4)

    room, radius = SCENE.room, shapes3d.PROPORTIONS[2][0]
    assert at(0, -2, -2, 0) == lit(light[2])
    assert at(1, 1, room, 2) == lit(-light[1])
    assert at(1, -room, 3.5, 2) == lit(0)
    # Where light just misses the floor behind the sphere, and where it just does not.
    across = np.array([0.0, 0.0, 1.0]) - light[2] * light
    for distance, facing in ((0.85, 0), (1.15, light[2])):
        point = [0, 0, radius] + distance * radius * across / np.linalg.norm(across)
        assert at(0, *(point - light * point[2] / light[2])) == lit(facing)


@pytest.mark.parametrize("weights", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [0, 1, 2, 3])
def test_the_mirrored_scene_is_the_mirrored_image(weights, shape):
    mirrored = replace(SCENE, light=(-SCENE.light[0], *SCENE.light[1:]))
    for orientation in (30.0, 0.0, 12.5):
        ours = weights(SCENE.numbers(), geometry(shape, 1.1, orientation), 32, 3).reshape(3, 32, 32).astype(int)
        theirs = weights(mirrored.numbers(), geometry(shape, 1.1, -orientation), 32, 3).reshape(3, 32, 32)
        # A ray along an edge may fall to either side.
        assert (np.abs(ours - theirs[:, :, ::-1]) > 1).mean() < 1e-3


def test_weights_never_overflow(all_weights):
    # One more for every rounding.
    assert all_weights.sum(axis=-2, dtype=np.int64).max() <= 65535 + 2


def test_every_factor_changes_every_image(all_weights):
    # The next scale, shape or orientation: by more than five grey levels in at least forty of 1,024 pixels.
    for axis in range(3):
        changed = np.abs(np.diff(all_weights.astype(int), axis=axis)) > 5 * 257
        assert changed.any(axis=-2).sum(axis=-1).min() >= 40
    # Of one hue all over, where only light tells floor, wall and object apart.
    colors = np.array([[shapes3d._color(hue)] * 3 for hue in shapes3d.VALUES["wall_hue"]], np.uint16)
    images = np.empty((10, 480, 1024, 3), np.uint8)
    renderer.images(all_weights.reshape(480, 3, 1024), colors, images)
    assert len({image.tobytes() for image in images.reshape(4800, -1)}) == 4800


@pytest.mark.slow
def test_all_images_are_distinct(tmp_path):
    path = make_shapes3d(tmp_path / "all.h5", size=32)
    dataset = load(path)
    path.unlink()  # or pytest would keep its gigabytes; it stays mapped
    assert len({hashlib.blake2b(image, digest_size=16).digest() for image in dataset.images}) == 480_000


def test_pixels_have_the_hue_of_their_surface(tmp_path):
    path = make_shapes3d(tmp_path / "hues.h5", scales=[0], shapes=[1], orientations=[0, 7])
    images, labels = read(path)
    # The lower left corner, the middle of the upper edge, the middle of the cylinder.
    for k, (row, column) in enumerate(((63, 0), (0, 32), (36, 32))):
        for color, hue in {(tuple(c), h) for c, h in zip(images[:, row, column].tolist(), labels[:, k], strict=True)}:
            found, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
            assert min(abs(found - hue), 1 - abs(found - hue)) < 0.005
            assert saturation == 1
            assert value > SCENE.ambient - 0.01


# What must not change it


@compiled
@pytest.mark.parametrize(("size", "samples"), [(64, 4), (32, 4), (7, 3), (1, 1)])
def test_compiled_and_numpy_agree(size, samples):
    triples = itertools.product([0.75, 1.25], [0, 1, 2, 3], [-30.0, -4.3, 0.0, 17.0, 30.0])
    geometries = np.array([shapes3d._geometry(*triple) for triple in triples])
    ours = renderer.weights(SCENE.numbers(), geometries, size, samples)
    theirs = renderer.weights_numpy(SCENE.numbers(), geometries, size, samples)
    if platform.machine() == "x86_64":
        assert np.array_equal(ours, theirs)
    else:  # where products and sums are fused, a ray along an edge may fall to either side
        assert (np.abs(ours.astype(int) - theirs) > 257).mean() < 1e-4

    colors = np.random.default_rng(0).integers(0, 65281, (5, 3, 3)).astype(np.uint16)
    images, twins = np.empty((2, 5, len(geometries), size * size, 3), np.uint8)
    renderer.images(ours, colors, images)
    renderer.images_numpy(ours, colors, twins)
    assert np.array_equal(images, twins)
    exact = np.einsum("gkp,ckx->cgpx", ours / 65535, colors / 256)
    assert np.abs(images - exact).max() < 0.51


@compiled
def test_images_of_odd_sizes_and_none():
    rng = np.random.default_rng(0)
    for geometries, colorings, pixels in ((0, 3, 4), (3, 0, 4), (1, 1, 1), (2, 9, 31), (1, 3, 33), (3, 2, 100)):
        weights = rng.integers(0, 65536 // 3, (geometries, 3, pixels)).astype(np.uint16)
        colors = rng.integers(0, 65281, (colorings, 3, 3)).astype(np.uint16)
        images, twins = np.full((2, colorings, geometries, pixels, 3), 9, np.uint8)
        renderer.images(weights, colors, images)
        renderer.images_numpy(weights, colors, twins)
        assert np.array_equal(images, twins)


def test_without_the_extension_the_file_is_the_same(small, tmp_path, monkeypatch):
    monkeypatch.setattr(renderer, "extension", None)
    path = make_shapes3d(tmp_path / "numpy.h5", **SMALL)
    if platform.machine() == "x86_64":
        assert path.read_bytes() == small.read_bytes()
    else:
        assert (np.abs(read(path)[0].astype(int) - read(small)[0]) > 1).mean() < 1e-3


@pytest.mark.parametrize("compress", [False, True])
def test_threads_do_not_show(tmp_path, compress):
    before = torch.get_num_threads()
    try:
        files = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            files.append(make_shapes3d(tmp_path / f"{threads}.h5", compress=compress, **SMALL).read_bytes())
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1] == files[2]


@compiled
def test_instruction_sets_do_not_show(small, tmp_path):
    build = fastdis.build_info()["extension"]
    levels = build["isa_compiled"][: build["isa_compiled"].index(build["isa_in_use"])]
    paths = [tmp_path / f"{level}.h5" for level in levels]
    code = "import sys; from fastdis.data import make_shapes3d; make_shapes3d(sys.argv[1], **{})"
    started = [
        subprocess.Popen([sys.executable, "-c", code.format(SMALL), path], env={**os.environ, "FASTDIS_ISA": level})
        for level, path in zip(levels, paths, strict=True)
    ]
    assert [process.wait() for process in started] == [0] * len(levels)
    for path in paths:
        assert path.read_bytes() == small.read_bytes(), path
