"""The file that packed images are unpacked into: when it is used again, when it is written, what it never replaces."""

from __future__ import annotations

import os

import numpy as np
import pytest

from fastdis.data import load, make_dsprites

SMALL = {"size": 32, "scales": 1, "orientations": 2, "x": 3, "y": 4}


@pytest.fixture
def packed(tmp_path):
    return make_dsprites(tmp_path / "sprites.npz", **SMALL)


def test_cache_beside_the_file_is_mapped_and_equal(packed):
    plain = load(packed)
    cached = load(packed, cache=True)
    assert isinstance(cached.images, np.memmap)
    assert not isinstance(plain.images, np.memmap)
    assert np.array_equal(cached.images, plain.images)
    assert cached.factor_sizes == plain.factor_sizes
    assert sorted(file.name for file in packed.parent.iterdir()) == ["sprites.npz", "sprites.npz.cache.npy"]


def test_cache_is_used_again_and_any_reader_of_npy_can(packed):
    place = packed.parent / "elsewhere" / "cache.npy"
    calls = []
    load(packed, cache=place, progress=lambda *call: calls.append(call))
    assert calls == [(72, 72)]
    first = place.stat().st_mtime_ns
    again = load(packed, cache=str(place), progress=lambda *call: calls.append(call))
    assert calls == [(72, 72)]
    assert place.stat().st_mtime_ns == first
    assert np.array_equal(np.load(place), again.images)


def test_cache_follows_its_source(packed):
    before = np.array(load(packed, cache=True).images)
    make_dsprites(packed, **{**SMALL, "scales": [5]})
    after = load(packed, cache=True)
    assert not np.array_equal(after.images, before)
    assert np.array_equal(after.images, load(packed).images)
    make_dsprites(packed, **{**SMALL, "x": 2})
    assert len(load(packed, cache=True)) == 48
    # The same number of bytes, another time.
    stamp = packed.stat()
    content = (packed.parent / "sprites.npz.cache.npy").read_bytes()
    os.utime(packed, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))
    load(packed, cache=True)
    assert (packed.parent / "sprites.npz.cache.npy").read_bytes() != content


def test_other_files_are_never_replaced(packed):
    other = packed.parent / "other.npz"
    make_dsprites(other, **SMALL)
    load(other, cache=packed.parent / "other.npy")
    np.save(packed.parent / "array.npy", np.zeros((72, 32, 32), np.uint8))
    np.save(packed.parent / "floats.npy", np.zeros((72, 32, 32)))
    (packed.parent / "text").write_text("precious")
    (packed.parent / "empty").write_bytes(b"")
    for name in ("other.npy", "array.npy", "floats.npy", "text", "empty", "sprites.npz"):
        content = (packed.parent / name).read_bytes()
        with pytest.raises(ValueError, match=rf"{name}: not a cache of sprites\.npz, and it is not written over"):
            load(packed, cache=packed.parent / name)
        assert (packed.parent / name).read_bytes() == content
    with pytest.raises(IsADirectoryError, match="a folder"):
        load(packed, cache=packed.parent)


def test_a_damaged_cache_of_the_source_is_not_used(packed):
    cached = load(packed, cache=True)
    wanted = np.array(cached.images)
    place = packed.parent / "sprites.npz.cache.npy"
    place.write_bytes(place.read_bytes()[:-200])
    with pytest.raises(ValueError, match="not a cache"):
        load(packed, cache=True)
    place.unlink()
    assert np.array_equal(load(packed, cache=True).images, wanted)


def test_failure_leaves_no_cache(packed):
    content = bytearray(packed.read_bytes())
    content[2000] ^= 0xFF
    packed.write_bytes(content)
    with pytest.raises(ValueError, match=r"sprites\.npz: not a readable dSprites"):
        load(packed, cache=True)

    make_dsprites(packed, **SMALL)

    def fail(done: int, total: int) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        load(packed, cache=True, progress=fail)
    assert [file.name for file in packed.parent.iterdir()] == ["sprites.npz"]


def test_progress_bar(packed, capsys):
    load(packed, cache=True, progress=True)
    assert "unpacking sprites.npz" in capsys.readouterr().err
    load(packed, progress=True)
    assert "reading sprites.npz" in capsys.readouterr().err
