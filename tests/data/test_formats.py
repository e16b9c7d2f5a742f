"""The one door: formats told from content, and what is said of the rest."""

from __future__ import annotations

import shutil
import zipfile

import h5py
import numpy as np
import pytest

from fastdis.data import load, make_dsprites
from fastdis.data.formats import load_grid


@pytest.fixture
def sprites(tmp_path):
    return make_dsprites(tmp_path / "sprites.npz", size=32, scales=1, orientations=1, x=2, y=2)


def test_names_do_not_matter(sprites, tmp_path):
    for name in ("dsprite_train", "sprites.h5", "sprites.zip"):
        assert load(shutil.copy(sprites, tmp_path / name)).factor_sizes == (3, 1, 1, 2, 2)
    archive = np.load(sprites)
    with h5py.File(tmp_path / "twin.npy", "w") as file:
        file["imgs"] = archive["imgs"]
        file["latents/classes"], file["latents/values"] = archive["latents_classes"], archive["latents_values"]
    assert load(str(tmp_path / "twin.npy")).factor_sizes == (3, 1, 1, 2, 2)


def test_options_reach_the_reader(sprites):
    assert isinstance(load(sprites, cache=True).images, np.memmap)
    with pytest.raises(TypeError, match=r"load got the option 'size', and .*sprites\.npz is read with cache, progress"):
        load(sprites, size=64)


def test_unknown_files_are_named_with_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "nothing").write_bytes(b"")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.zeros(3)
    (tmp_path / "folder").mkdir()
    for name in ("notes.txt", "nothing", "array.npy", "some.zip", "other.h5", "folder"):
        message = rf"{name}: a (file|folder).*that is no dataset known here; looked for dSprites"
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder; looked for"):
        load(tmp_path / "gone")


def test_grids_only(sprites, tmp_path):
    assert load_grid(sprites).factor_sizes == (3, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="no dataset"):
        load_grid(tmp_path)
