"""Codes of a dataset: every image once, in order, whatever the encoder is and however many processes share the work."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastdis.data import FactorDataset
from fastdis.metrics import encode


@pytest.fixture
def dataset():
    """24 images of 8 x 8, all different."""
    images = np.random.default_rng(0).integers(256, size=(24, 8, 8, 3)).astype(np.uint8)
    return FactorDataset(images, (2, 3, 4))


def flat(images):
    return images.flatten(1)[:, :5]


@pytest.mark.parametrize("batch_size", [1, 5, 24, 100])
def test_every_image_once_in_order(dataset, batch_size):
    seen = []
    codes = encode(lambda images: seen.append(len(images)) or flat(images), dataset, batch_size=batch_size)
    assert torch.equal(codes, flat(dataset.batch(range(24))))
    assert codes.dtype == torch.float32
    assert sum(seen) == 24
    assert max(seen) == min(batch_size, 24)


def test_nothing_is_differentiated(dataset):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    codes = encode(net, dataset, batch_size=7)
    assert not codes.requires_grad
    torch.testing.assert_close(codes, net(dataset.batch(range(24))).detach())


class Moody(nn.Module):
    """Tells in its codes which mode its parts are in."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.dropout = nn.Dropout(0.5)
        self.fails = fails

    def forward(self, images):
        if self.fails:
            raise KeyError("broken")
        return torch.full((len(images), 2), float(self.training or self.dropout.training))

    def means(self, images):
        return self.forward(images)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", [False, True])
def test_modules_are_evaluated_and_put_back(dataset, training, method):
    net = Moody()
    net.training = training
    assert (encode(net.means if method else net, dataset) == 0).all()
    assert net.training == training
    assert net.dropout.training
    assert not net.frozen.training


def test_modules_are_put_back_after_an_error(dataset):
    net = Moody(fails=True)
    with pytest.raises(KeyError, match="broken"):
        encode(net, dataset)
    assert net.training
    assert net.dropout.training
    assert not net.frozen.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_codes_of_every_type_become_float32(dataset, dtype):
    codes = encode(lambda images: (flat(images) * 4).to(dtype), dataset)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, (flat(dataset.batch(range(24))) * 4).to(dtype).float())


def test_mixed_precision(dataset):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    seen = []
    net.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    rounded = encode(net, dataset, autocast=torch.bfloat16)
    exact = encode(net, dataset)
    assert seen == [torch.bfloat16, torch.float32]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=2e-2, rtol=2e-2)
    assert not torch.equal(rounded, exact)
    with pytest.raises(TypeError, match=r"autocast must be a dtype such as torch.bfloat16, got True"):
        encode(net, dataset, autocast=True)


def test_images_go_where_the_module_is(dataset):
    where = []

    def shape_only(images):
        where.append(images.device.type)
        return torch.zeros(len(images), 1)

    encode(shape_only, dataset, device="meta")
    assert where == ["meta"]

    class OnMeta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.empty(3, device="meta"))

        def forward(self, images):
            return shape_only(images)

    encode(OnMeta(), dataset)
    assert where == ["meta", "meta"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_codes_that_are_not_finite_name_the_first_image(dataset, value):
    def broken(images):
        codes = flat(images).double()
        codes[3:, 2] = value
        return codes

    with pytest.raises(ValueError, match="image 3 hold NaN or infinity"):
        encode(broken, dataset, batch_size=20)


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (lambda images: (flat(images), flat(images)), TypeError, r"a tuple of 2; .*encode\(images\)\[0\]"),
        (lambda images: flat(images).numpy(), TypeError, "got ndarray"),
        (lambda images: None, TypeError, "got NoneType"),
        (lambda images: flat(images) + 0j, TypeError, "got torch.complex64"),
        (lambda images: flat(images)[:, 0], ValueError, r"codes \[10, d\] of 10 images, got \[10\]"),
        (lambda images: flat(images)[1:], ValueError, r"got \[9, 5\]"),
        (lambda images: flat(images)[:, :0], ValueError, r"got \[10, 0\]"),
        (lambda images: images, ValueError, r"got \[10, 3, 8, 8\]"),
        (lambda images: flat(images)[:, : len(images)], ValueError, "as many codes, got 5 and 4"),
        ("encoder", TypeError, "encode must be a function of images, got str"),
    ],
)
def test_encoders_that_return_something_else(dataset, encoder, error, message):
    with pytest.raises(error, match=message):
        encode(encoder, dataset, batch_size=10)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batches_must_hold_something(dataset, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        encode(flat, dataset, batch_size=batch_size)


def test_errors_of_the_dataset_come_through(dataset, monkeypatch):
    def unreadable(rows):
        raise OSError("the disk is gone")

    monkeypatch.setattr(dataset, "batch", unreadable)
    with pytest.raises(OSError, match="the disk is gone"):
        encode(flat, dataset)


def test_progress_bar_is_on_stderr_only(dataset, capsys):
    encode(flat, dataset, batch_size=10)
    assert capsys.readouterr() == ("", "")
    encode(flat, dataset, batch_size=10, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search("encoding.*24/24", err)


# What two processes do, each on its own; a closure or a lambda could not be sent to them.


def _last_images_break(images):
    codes = flat(images)
    return codes / (images.amax() < 1)  # image 23 is white


def _process(rank, processes, store, images, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    try:
        dataset = FactorDataset(images, (len(images),))
        seen = []
        codes = encode(lambda batch: seen.append(len(batch)) or flat(batch), dataset, batch_size=4)
        alone = encode(flat, dataset, distributed=False)
        single = encode(flat, FactorDataset(images[:1], (1,)))
        images[-1] = 255
        try:
            failure = f"no error, {encode(_last_images_break, dataset)}"
        except (ValueError, RuntimeError) as error:
            failure = f"{type(error).__name__}: {error}"
        torch.save((codes, alone, single, sum(seen), failure), f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_processes_share_the_work(tmp_path):
    # 23 images, so that the shares differ in size.
    images = np.random.default_rng(0).integers(255, size=(23, 4, 4)).astype(np.uint8)
    torch.multiprocessing.spawn(_process, (2, tmp_path / "store", images, tmp_path), nprocs=2)
    expected = flat(FactorDataset(images, (23,)).batch(range(23)))
    for rank, share in enumerate((12, 11)):
        codes, alone, single, seen, failure = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(codes, expected)
        assert torch.equal(alone, expected)
        assert torch.equal(single, expected[:1])
        assert seen == share
        # The one names the image; the other does not wait for it for ever.
        told = "ValueError: " if rank == 1 else "RuntimeError: process 1 could not encode its share: "
        assert failure.startswith(told)
        assert "NaN or infinity" in failure
