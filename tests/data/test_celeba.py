"""CelebA: attributes, crops, splits, folders and archives, in any number of processes."""

from __future__ import annotations

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastdis.data import CelebA, load, load_celeba

COUNT = 9
NAMES = [f"{number:06d}.jpg" for number in range(1, COUNT + 1)]
ATTRIBUTE_NAMES = ("5_o_Clock_Shadow", "Bald", "Young")
TABLE = np.random.default_rng(1).integers(0, 2, (COUNT, 3))
SPLITS = [0, 0, 0, 0, 1, 1, 2, 2, 2]


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "img_align_celeba"
    images.mkdir()
    for number, name in enumerate(NAMES):
        yy, xx = np.mgrid[:218, :178]
        pixels = np.stack([yy, xx, np.full_like(xx, 20 * number)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(images / name, quality=95)
    rows = [f"{name}  " + " ".join("1" if a else "-1" for a in row) for name, row in zip(NAMES, TABLE, strict=True)]
    (tmp_path / "list_attr_celeba.txt").write_text("\n".join([str(COUNT), " ".join(ATTRIBUTE_NAMES) + " ", *rows, ""]))
    lines = [f"{name} {split}\n" for name, split in zip(NAMES, SPLITS, strict=True)]
    (tmp_path / "list_eval_partition.txt").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def archive(folder):
    """Pack the images and take the folder away."""
    images = folder / "img_align_celeba"
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as file:
        file.mkdir("img_align_celeba") if hasattr(file, "mkdir") else None
        for name in NAMES:
            file.write(images / name, f"img_align_celeba/{name}")
            (images / name).unlink()
    images.rmdir()
    return folder


def decoded(folder, name) -> Image.Image:
    return Image.open(folder / "img_align_celeba" / name).convert("RGB")


def test_images_and_attributes(folder):
    dataset = load(folder)
    assert isinstance(dataset, CelebA)
    assert len(dataset) == COUNT
    assert dataset.attribute_names == ATTRIBUTE_NAMES
    assert dataset.attributes.tolist() == TABLE.tolist()
    assert dataset.file_names == NAMES
    image, attributes = dataset[4]
    assert image.dtype == torch.uint8
    assert attributes.tolist() == TABLE[4].tolist()
    wanted = decoded(folder, NAMES[4]).crop((15, 35, 163, 183)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(wanted))
    assert torch.equal(dataset[-1][0], dataset[COUNT - 1][0])
    batch = dataset.batch([4, 0])
    assert batch.shape == (2, *dataset.image_shape)
    assert torch.equal(batch[0], image / 255)
    assert dataset.batch([]).shape == (0, 3, 64, 64)


@pytest.mark.parametrize(
    ("options", "size", "box"),
    [
        ({"crop": None, "size": None}, (178, 218), (0, 0, 178, 218)),
        ({"crop": 178, "size": None}, (178, 178), (0, 20, 178, 198)),
        ({"crop": (15, 40, 163, 188), "size": None}, (148, 148), (15, 40, 163, 188)),
        ({"crop": None, "size": 32}, (32, 32), (0, 0, 178, 218)),
        ({"crop": (0, 0, 10, 20), "size": 8, "resample": "box"}, (8, 8), (0, 0, 10, 20)),
    ],
)
def test_crops(folder, options, size, box):
    dataset = load(folder, **options)
    wanted = decoded(folder, NAMES[0]).crop(box)
    if options["size"]:
        wanted = wanted.resize(size, Image.Resampling[options.get("resample", "bilinear").upper()])
    assert dataset.image_shape == (3, size[1], size[0])
    assert np.array_equal(dataset[0][0].permute(1, 2, 0).numpy(), np.asarray(wanted))


def test_archive_is_the_same(folder, archive, tmp_path_factory):
    dataset = load(archive)
    assert len(dataset) == COUNT
    assert torch.equal(dataset[3][0], load(archive / "img_align_celeba.zip")[3][0])
    pickled = pickle.dumps(dataset)
    assert torch.equal(pickle.loads(pickled)[3][0], dataset[3][0])
    unpacked = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive / "img_align_celeba.zip") as file:
        file.extractall(unpacked)
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        (unpacked / name).write_bytes((archive / name).read_bytes())
    for place in (unpacked, unpacked / "img_align_celeba"):
        assert torch.equal(load(place)[3][0], dataset[3][0])


def test_workers_open_the_archive_for_themselves(archive):
    dataset = load(archive, size=16)
    alone = torch.stack([dataset[item][0] for item in range(COUNT)])
    for workers in (0, 2):
        loader = DataLoader(dataset, batch_size=2, num_workers=workers)
        images, attributes = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal(images, alone)
        assert torch.equal(attributes, dataset.attributes)


@pytest.mark.slow
def test_spawned_workers(archive):
    dataset = load(archive, size=16)
    loader = DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context="spawn")
    assert torch.equal(torch.cat([images for images, _ in loader]), torch.stack([image for image, _ in dataset]))


@pytest.mark.parametrize(("split", "rows"), [("train", range(4)), ("valid", [4, 5]), ("test", [6, 7, 8])])
def test_splits(folder, split, rows):
    dataset = load(folder, split=split)
    assert dataset.file_names == [NAMES[row] for row in rows]
    assert dataset.attributes.tolist() == TABLE[list(rows)].tolist()
    assert dataset.split == split


def test_lists_may_lie_where_the_site_has_them(folder):
    for place, name in (("Anno", "list_attr_celeba.txt"), ("Eval", "list_eval_partition.txt")):
        (folder / place).mkdir()
        (folder / name).rename(folder / place / name)
    assert len(load(folder, split="valid")) == 2


def test_indices_outside(folder):
    dataset = load(folder)
    with pytest.raises(IndexError, match="9 images"):
        dataset[9]
    with pytest.raises(ValueError, match="images 0 to 8"):
        dataset.batch([-1])
    with pytest.raises(TypeError, match="whole numbers"):
        dataset.batch([0.5])
    with pytest.raises(ValueError, match=r"\[b\]"):
        dataset.batch(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split must be all, train, valid or test"),
        ({"crop": 0}, "crop must be"),
        ({"crop": 1.5}, "crop must be"),
        ({"crop": True}, "crop must be"),
        ({"crop": (1, 2, 3)}, "crop must be"),
        ({"crop": (5, 5, 5, 9)}, "does not fit 178 x 218"),
        ({"crop": 179}, r"000001\.jpg: a crop of 179 does not fit 178 x 218"),
        ({"crop": (0, 0, 179, 10)}, "does not fit"),
        ({"size": -1}, "size must be"),
        ({"resample": "best"}, "resample must be"),
    ],
)
def test_arguments_that_do_not_exist(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_celeba(folder, **options)


def test_missing_parts_are_named(folder):
    (folder / "list_eval_partition.txt").unlink()
    assert len(load(folder)) == COUNT
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition\.txt"):
        load(folder, split="test")
    (folder / "img_align_celeba" / NAMES[2]).unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of 9 images of the list, {NAMES[2]} first"):
        load(folder)
    (folder / "list_attr_celeba.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"list_attr_celeba\.txt"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="gone"):
        load_celeba(folder / "gone")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no img_align_celeba\.zip and no folder"):
        load_celeba(folder / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], r"lines of attributes, expected the 9|its line \d+ is not"),
        (lambda text: "", "list index"),
        (lambda text: text.replace("9\n", "10\n", 1), "9 lines of attributes, expected the 10"),
        (lambda text: text.replace("-1", "0", 1), r"its line \d+ is not a name and 3 numbers"),
        (lambda text: text.replace("Bald ", "", 1), "its line 3 is not a name and 2 numbers"),
        (lambda text: "\x00" + text, "invalid literal"),
    ],
)
def test_damaged_list(folder, change, message):
    path = folder / "list_attr_celeba.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{path}: not a readable CelebA list_attr_celeba.txt")


def test_damaged_partition(folder):
    path = folder / "list_eval_partition.txt"
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt: not a readable"):
        load(folder, split="train")


def test_damaged_image_is_named_when_it_is_read(folder):
    path = folder / "img_align_celeba" / NAMES[5]
    path.write_bytes(path.read_bytes()[:2000])
    dataset = load(folder)
    assert dataset[4][0].shape == (3, 64, 64)
    with pytest.raises(ValueError, match=rf"img_align_celeba: {NAMES[5]} is not a readable image"):
        dataset[5]


def test_images_of_another_size(folder):
    Image.new("RGB", (90, 90)).save(folder / "img_align_celeba" / NAMES[5])
    assert load(folder, crop=None)[5][0].shape == (3, 64, 64)
    with pytest.raises(ValueError, match=rf"{NAMES[5]} is \[90, 90\] pixels"):
        load(folder, crop=None, size=None)[5]
    with pytest.raises(ValueError, match=rf"{NAMES[5]}: a crop of 148 does not fit 90 x 90"):
        load(folder)[5]


def test_truncated_and_other_archives(archive):
    path = archive / "img_align_celeba.zip"
    content = path.read_bytes()
    for keep in (0, 100, len(content) // 2, -1):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=r"img_align_celeba\.zip: not a readable img_align_celeba\.zip"):
            load_celeba(archive)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no images")
    with pytest.raises(ValueError, match="lacks img_align_celeba/"):
        load_celeba(path)


def test_names_cannot_leave_the_folder(folder):
    (folder / "secret.jpg").write_bytes((folder / "img_align_celeba" / NAMES[0]).read_bytes())
    path = folder / "list_attr_celeba.txt"
    path.write_text(path.read_text().replace(NAMES[0], f"..{os.sep}secret.jpg"))
    with pytest.raises(ValueError, match="lacks 1 of 9"):
        load(folder)
