"""Coloured, noisy and scream sprites: their definitions, and that image i is one image."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastdis.data import FactorDataset, dsprites_variant, load, make_dsprites


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return load(make_dsprites(tmp_path_factory.mktemp("sprites") / "s.npz", size=32, orientations=2, x=8, y=8))


@pytest.fixture(scope="module")
def painting():
    return np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)


def variant(sprites, kind, painting, seed=0):
    return dsprites_variant(sprites, kind, seed=seed, scream_image=painting if kind == "scream" else None)


def everything(dataset):
    return dataset.images[np.arange(len(dataset))]


KINDS = ("color", "noisy", "scream")


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_one_image(sprites, painting, kind):
    dataset = variant(sprites, kind, painting)
    images = everything(dataset)
    assert images.shape == (len(sprites), 32, 32, 3)
    assert images.dtype == np.uint8
    rows = torch.randperm(len(sprites), generator=torch.Generator().manual_seed(0))[:99].numpy()
    assert np.array_equal(dataset.images[rows], images[rows])
    assert np.array_equal(everything(variant(sprites, kind, painting)), images)
    assert np.array_equal(everything(pickle.loads(pickle.dumps(dataset))), images)
    assert dataset[5][0].tolist() == images[5].transpose(2, 0, 1).tolist()
    assert dataset.batch([7]).max() <= 1
    assert dataset.factor_sizes == sprites.factor_sizes
    assert dataset.factor_names == sprites.factor_names
    assert torch.equal(dataset.values(range(50)), sprites.values(range(50)))


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_images_differ(sprites, painting, kind):
    images = everything(variant(sprites, kind, painting))
    other = everything(variant(sprites, kind, painting, seed=1))
    assert (images != other).any(axis=(1, 2, 3)).mean() > 0.99
    # All the same sprite: the first and the last orientation, were it not for what is drawn at random.
    nuisance = images[np.arange(0, len(images), 64)]
    assert len(np.unique(nuisance.reshape(len(nuisance), -1), axis=0)) == len(nuisance)


def test_workers_see_the_same_images(sprites, painting):
    dataset = variant(sprites, "noisy", painting)
    images = torch.cat([batch for batch, _ in DataLoader(dataset, batch_size=100, num_workers=2)])
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), everything(dataset))


def test_colour(sprites, painting):
    images = everything(variant(sprites, "color", painting))
    inside = sprites.images == 1
    assert not images[~inside].any()
    colours = images.reshape(len(images), -1, 3).max(axis=1)
    for image, mask, colour in zip(images, inside, colours, strict=True):
        assert (image[mask] == colour).all()
    assert colours.min() == 128
    assert colours.max() == 255
    # Uniform over 128 levels, in each channel for itself.
    n = len(colours)
    assert abs(colours.mean(axis=0) - 191.5).max() < 5 * 36.9 / n**0.5
    assert abs(np.corrcoef(colours.T)[np.triu_indices(3, 1)]).max() < 5 / n**0.5


def test_noise(sprites, painting):
    images = everything(variant(sprites, "noisy", painting))
    inside = sprites.images == 1
    assert (images[inside] == 255).all()
    noise = images[~inside]
    counts = np.bincount(noise.reshape(-1), minlength=256)
    expected = noise.size / 256
    # Chi-square with 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * 22.6
    pixels = images[:, 0, :4].reshape(len(images), -1).astype(float)  # no sprite reaches the first row
    assert abs(np.corrcoef(pixels.T)[np.triu_indices(12, 1)]).max() < 6 / len(images) ** 0.5


def test_scream(sprites, painting):
    dataset = variant(sprites, "scream", painting)
    crops = np.lib.stride_tricks.sliding_window_view(painting, (32, 32), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    seen = set()
    for row in range(0, len(sprites), 151):
        image = dataset.images[np.array([row])][0].astype(int)
        inside = sprites.images[row] == 1
        background = np.where(inside[..., None], 255 - image, image)
        # The mean with one colour: twice it less the crop is that colour, up to rounding, at every pixel.
        colour = 2 * background - crops
        spread = colour.max(axis=(2, 3)) - colour.min(axis=(2, 3))
        top, left = np.unravel_index(spread.max(axis=2).argmin(), spread.shape[:2])
        assert spread[top, left].max() <= 1
        assert 0 <= colour[top, left].max() <= 255
        seen.add((top, left))
    tops, lefts = zip(*seen, strict=True)
    assert max(tops) <= 70 - 32 - 1
    assert max(lefts) <= 50 - 32 - 1
    assert max(tops) - min(tops) > 20
    assert max(lefts) - min(lefts) > 8


def test_scream_from_a_file_is_shrunk_in_proportion(sprites, tmp_path):
    gradient = np.zeros((548, 400, 3), np.uint8)
    gradient[..., 0] = 100
    Image.fromarray(gradient).save(tmp_path / "big.png")
    dataset = dsprites_variant(sprites, "scream", scream_image=tmp_path / "big.png")
    assert dataset.images._painting.shape == (274, 200 * 3)
    Image.fromarray(gradient[:40, :40]).convert("L").save(tmp_path / "small.png")
    assert dsprites_variant(sprites, "scream", scream_image=str(tmp_path / "small.png")).image_shape == (3, 32, 32)


def test_paintings_that_do_not_do(sprites, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        dsprites_variant(sprites, "scream", scream_image=tmp_path / "none.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.jpg: not a readable image"):
        dsprites_variant(sprites, "scream", scream_image=tmp_path / "bad.jpg")
    Image.fromarray(np.zeros((32, 90, 3), np.uint8)).save(tmp_path / "low.png")
    with pytest.raises(ValueError, match=r"low\.png is 32 x 90 pixels.*larger than the images of 32 x 32"):
        dsprites_variant(sprites, "scream", scream_image=tmp_path / "low.png")
    with pytest.raises(ValueError, match="float64"):
        dsprites_variant(sprites, "scream", scream_image=np.zeros((90, 90, 3)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "abstract"}, ValueError, "kind must be one of color, noisy, scream"),
        ({"kind": "scream"}, ValueError, "needs scream_image"),
        ({"kind": "color", "scream_image": "x.jpg"}, ValueError, "kind is 'color'"),
        ({"kind": "color", "seed": -1}, ValueError, "seed"),
        ({"kind": "color", "seed": 0.5}, ValueError, "seed"),
        ({"kind": "color", "seed": True}, ValueError, "seed"),
    ],
)
def test_arguments_that_do_not_exist(sprites, arguments, error, message):
    with pytest.raises(error, match=message):
        dsprites_variant(sprites, **arguments)


def test_only_sprites_have_variants(sprites):
    with pytest.raises(TypeError, match="ndarray"):
        dsprites_variant(sprites.images, "color")
    for images, top in ((np.zeros((4, 8, 8, 3), np.uint8), 1), (np.zeros((4, 8, 8), np.uint8), 255)):
        with pytest.raises(ValueError, match="zeros and ones"):
            dsprites_variant(FactorDataset(images, (4,), max_value=top), "color")


def test_a_subgrid_of_a_variant_keeps_its_images(sprites, painting):
    dataset = variant(sprites, "noisy", painting)
    part = dataset.subgrid({"shape": 1})
    assert torch.equal(part.batch([3]), dataset.batch(dataset.index([[1, 0, 0, 0, 3]])))


def test_large_seeds_do_not_overflow(sprites):
    with np.errstate(all="raise"):
        assert dsprites_variant(sprites, "color", seed=2**64 - 1).batch([0]).shape == (1, 3, 32, 32)
