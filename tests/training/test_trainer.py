"""Training: seeds, resuming, divergence, and folders that are not empty."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from fastdis.data import FactorDataset
from fastdis.models import VAE, ProtoVAE
from fastdis.training import Trainer, TrainingDivergedError, load_checkpoint


@pytest.fixture(scope="module")
def dataset() -> FactorDataset:
    images = np.zeros((16, 32, 32), np.uint8)
    for i in range(16):
        images[i, 8 * (i // 4) : 8 * (i // 4) + 8, 8 * (i % 4) : 8 * (i % 4) + 8] = 1
    return FactorDataset(images, (4, 4), ("y", "x"), max_value=1)


def model(kind: type[VAE] = ProtoVAE) -> VAE:
    torch.manual_seed(0)
    options = {"shots": 1, "queries": 1} if kind is ProtoVAE else {}
    return kind(latent_dim=3, image_size=32, **options)


def train(dataset, kind=ProtoVAE, **options) -> Trainer:
    trainer = Trainer(model(kind), dataset, **{"steps": 6, "batch_size": 4, "lr": 1e-3, **options})
    trainer.fit()
    return trainer


def same_weights(a: VAE, b: VAE) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", [VAE, ProtoVAE])
def test_a_seed_names_the_whole_course(dataset, kind):
    first = train(dataset, kind, seed=3)
    torch.manual_seed(12345)
    again = train(dataset, kind, seed=3)
    other = train(dataset, kind, seed=4)
    assert first.history == again.history
    assert same_weights(first.model, again.model)
    assert first.history != other.history


def test_global_generator_is_left_alone(dataset):
    trainer = Trainer(model(), dataset, steps=2, batch_size=4)
    state = torch.get_rng_state()
    trainer.fit()
    assert torch.equal(torch.get_rng_state(), state)


def test_loss_falls(dataset):
    history = train(dataset, VAE, steps=60, lr=3e-3).history
    assert np.mean(history["loss"][-5:]) < 0.5 * history["loss"][0]


def test_history_and_callbacks_see_every_term_of_every_step(dataset, tmp_path):
    seen = []
    trainer = train(dataset, out=tmp_path / "run", callbacks=[lambda *call: seen.append(call)])
    assert [(step, steps) for step, steps, _ in seen] == [(i, 6) for i in range(1, 7)]
    assert set(trainer.history) == {"loss", "reconstruction", "kl", "prototypical", "accuracy"}
    for name, values in trainer.history.items():
        assert values == [terms[name] for _, _, terms in seen]
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == trainer.history


def test_resumed_training_is_training_that_never_stopped(dataset, tmp_path):
    whole = train(dataset, steps=7)
    train(dataset, steps=4, out=tmp_path / "run")
    torch.manual_seed(99)
    resumed = Trainer.resume(tmp_path / "run", dataset, steps=7, out=tmp_path / "run")
    assert resumed.step == 4
    assert resumed.fit() == whole.history
    assert same_weights(resumed.model, whole.model)
    assert load_checkpoint(tmp_path / "run").step == 7
    assert load_checkpoint(tmp_path / "run").settings["steps"] == 7


def test_interrupted_training_goes_on_from_the_last_checkpoint(dataset, tmp_path):
    def interrupt(step, steps, terms):
        if step == 5:
            raise KeyboardInterrupt

    trainer = Trainer(
        model(), dataset, steps=6, batch_size=4, lr=1e-3, out=tmp_path, checkpoint_every=2, callbacks=[interrupt]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert load_checkpoint(tmp_path).step == 4
    resumed = Trainer.resume(tmp_path, dataset)
    assert resumed.fit() == train(dataset).history


def test_resuming_what_is_done_changes_nothing(dataset, tmp_path):
    trainer = train(dataset, out=tmp_path)
    resumed = Trainer.resume(tmp_path / "checkpoint.pt", dataset)
    assert resumed.fit() == trainer.history
    assert same_weights(resumed.model, trainer.model)


def test_resuming_on_another_dataset(dataset, tmp_path):
    train(dataset, out=tmp_path)
    other = FactorDataset(dataset.images[:8], (2, 4), max_value=1)
    with pytest.raises(ValueError, match=r"8 images.*16"):
        Trainer.resume(tmp_path, other)


def test_checkpoint_is_plain_data_and_rebuilds_the_model(dataset, tmp_path):
    trainer = train(dataset, out=tmp_path)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["model"] == "ProtoVAE"
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.model.config() == trainer.model.config()
    assert same_weights(checkpoint.model, trainer.model)
    assert checkpoint.settings == {"steps": 6, "batch_size": 4, "lr": 1e-3, "seed": 0, "images": 16}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "history.json"]


@pytest.mark.parametrize("term", ["reconstruction", "kl"])
def test_nan_names_step_and_term_and_keeps_the_weights(dataset, term):
    class Breaking(VAE):
        calls = 0

        def elbo_terms(self, *arguments):
            terms = super().elbo_terms(*arguments)
            self.calls += 1
            if self.calls == 3:
                terms[term] = terms[term] * float("nan")
                terms["loss"] = terms["reconstruction"] + terms["kl"]
            return terms

    torch.manual_seed(0)
    broken = Breaking(latent_dim=3, image_size=32)
    trainer = Trainer(broken, dataset, steps=6, batch_size=4, lr=1e-3)
    with pytest.raises(TrainingDivergedError, match=rf"the {term} term became nan at step 3"):
        trainer.fit()
    assert trainer.step == 2
    assert len(trainer.history["loss"]) == 2
    assert same_weights(broken, train(dataset, VAE, steps=2).model)


def test_huge_lr_is_stopped(dataset):
    with pytest.raises(TrainingDivergedError, match="a smaller lr"):
        train(dataset, VAE, lr=1e6, steps=50)


def test_folder_that_is_not_empty(dataset, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(dataset, out=tmp_path)
    train(dataset, out=tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="is a file"):
        train(dataset, out=tmp_path / "notes.txt", overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lr": float("nan")}, "lr must be a positive number, got nan"),
    ],
)
def test_numbers_outside_their_range(dataset, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(dataset, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_the_model(dataset):
    with pytest.raises(ValueError, match=r"\[1, 32, 32\].*\[1, 64, 64\]"):
        Trainer(VAE(image_size=64), dataset, steps=1)


def test_checkpoints_that_cannot_be_read(dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt"):
        load_checkpoint(tmp_path)
    path = tmp_path / "checkpoint.pt"
    train(dataset, out=tmp_path / "run")
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: not a readable checkpoint"):
            load_checkpoint(path)
    torch.save({"weights": {}}, path)
    with pytest.raises(ValueError, match="not a fastdis checkpoint"):
        load_checkpoint(path)
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for changes in ({"config": {"latent_dim": 5}}, {"model": "GAN"}, {"weights": {}}):
        torch.save({**content, **changes}, path)
        with pytest.raises(ValueError, match="contradicts itself"):
            load_checkpoint(path)


class Trap:
    """Unpickles into a call."""

    def __reduce__(self):
        return (os.mkdir, ("sprung",))


def test_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Trap()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()
