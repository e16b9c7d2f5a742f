"""The command line: what it writes, and that every mistake is one sentence and an exit code."""

from __future__ import annotations

import builtins
import json
import sys

import pytest

import fastdis
from fastdis.cli import main
from fastdis.data import load, make_dsprites, make_shapes3d
from fastdis.training import load_checkpoint

SMALL = ["--shots", "1", "--queries", "1", "--latent-dim", "3", "--batch-size", "4"]


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    path = tmp_path_factory.mktemp("sprites") / "small.npz"
    return make_dsprites(path, size=32, shapes=1, scales=2, orientations=1, x=4, y=4)


@pytest.fixture(scope="module")
def trained(sprites, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "protovae", str(sprites), "--out", str(out), "--steps", "3", *SMALL]) == 0
    return out


def fails(capsys, arguments, code, *words):
    """Run a command that is to fail: nothing on stdout, one sentence on stderr."""
    assert main([str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    *before, sentence = [line for line in err.splitlines() if line]
    assert sentence.startswith("fastdis: ")
    # A progress bar may stand above, where work had begun.
    assert not before or before[0].startswith(("training", "encoding"))
    assert out == ""
    for word in words:
        assert str(word) in sentence
    return sentence


@pytest.mark.parametrize("missing", ["click", "rich", "matplotlib"])
def test_missing_extra_is_one_sentence(capsys, monkeypatch, missing):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"fastdis: the command line needs {missing}; run pip install fastdis[cli]\n"


def test_help_names_every_command(capsys):
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(command in out for command in ("data", "demo", "doctor", "evaluate", "train"))
    assert main(["--version"]) == 0
    assert fastdis.__version__ in capsys.readouterr().out


def test_doctor_prints_whatever_it_is_told(capsys, monkeypatch):
    information = {
        "version": "1.2.3",
        "flags": ["-O3", "[sm_90]"],
        "nothing": [],
        "none": None,
        "compiler": {"name": "gcc", "deep": {"er": 13}},
        "ops": {
            "prototypical_loss": {"cpu": {"backend": "reference", "reason": "no extension [cpu]"}, "cuda": "triton"},
            "odd": "unavailable",
        },
    }
    monkeypatch.setattr(fastdis, "build_info", lambda: information, raising=False)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in (
        "1.2.3",
        "-O3, [sm_90]",
        "gcc",
        "13",
        "prototypical_loss",
        "reference",
        "no extension [cpu]",
        "triton",
        "unavailable",
    ):
        assert text in out


def test_doctor_on_this_build(capsys):
    assert main(["doctor"]) == 0
    assert "prototypical_loss" in capsys.readouterr().out


def test_make_dsprites(capsys, tmp_path):
    path = tmp_path / "new" / "grid.npz"
    counts = ["--shapes", "2", "--scales", "2", "--orientations", "3", "--x", "4", "--y", "5"]
    assert main(["data", "make", "dsprites", str(path), "--size", "32", *counts]) == 0
    assert str(path) in capsys.readouterr().out
    assert load(path).factor_sizes == (2, 2, 3, 4, 5)
    assert load(path).image_shape == (1, 32, 32)
    before = path.read_bytes()
    fails(capsys, ["data", "make", "dsprites", path, "--size", "32", "--x", "1"], 2, path, "--overwrite")
    assert path.read_bytes() == before


def test_make_dsprites_mistakes(capsys, tmp_path):
    path = tmp_path / "grid.npz"
    fails(capsys, ["data", "make", "dsprites", path, "--shapes", "4"], 1, "shapes", "1 to 3", "4")
    fails(capsys, ["data", "make", "dsprites", path, "--size", "28"], 2, "--size", "28")
    fails(capsys, ["data", "make", "dsprites", tmp_path / "grid.png"], 2, ".npz")
    (tmp_path / "file").write_text("")
    fails(capsys, ["data", "make", "dsprites", tmp_path / "file" / "grid.npz", "--x", "1"], 1, "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_make_shapes3d(capsys, tmp_path):
    path = tmp_path / "new" / "grid.h5"
    counts = ["--floor-hues", "2", "--wall-hues", "1", "--object-hues", "3", "--scales", "2", "--shapes", "4"]
    command = ["data", "make", "shapes3d", str(path), "--size", "32", *counts, "--orientations", "5"]
    assert main(command) == 0
    assert f"{path}: 240 images of [3, 32, 32]" in capsys.readouterr().out
    assert load(path).factor_sizes == (2, 1, 3, 2, 4, 5)
    before = path.read_bytes()
    fails(capsys, command, 2, path, "--overwrite")
    assert path.read_bytes() == before
    assert main([*command, "--overwrite", "--compress"]) == 0
    assert len(path.read_bytes()) < len(before) / 3
    assert load(path).factor_sizes == (2, 1, 3, 2, 4, 5)


def test_make_shapes3d_mistakes(capsys, monkeypatch, tmp_path):
    path = tmp_path / "grid.h5"
    fails(capsys, ["data", "make", "shapes3d", path, "--floor-hues", "11"], 1, "floor_hues", "1 to 10", "11")
    fails(capsys, ["data", "make", "shapes3d", path, "--size", "128"], 2, "--size", "128")
    fails(capsys, ["data", "make", "shapes3d", tmp_path / "grid.npz"], 2, ".h5", "grid.npz")
    fails(capsys, ["data", "make", "cubes", path], 2, "cubes")
    monkeypatch.setitem(sys.modules, "h5py", None)
    fails(capsys, ["data", "make", "shapes3d", path, "--scales", "1"], 1, "h5py", "pip install 'fastdis[data]'")
    assert not list(tmp_path.iterdir())


def test_data_info(capsys, monkeypatch, sprites, tmp_path):
    path = make_shapes3d(tmp_path / "grid.h5", size=32, floor_hues=2, wall_hues=1, object_hues=1, scales=2, shapes=1)
    assert main(["data", "info", str(path)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{path}: {load(path)}"
    assert rest[0] == "  floor_hue: 0 to 0.5, 2 values"
    assert rest[1] == "  wall_hue: 0"
    assert rest[5] == "  orientation: -30 to 30, 15 values"
    assert main(["data", "info", str(sprites)]) == 0
    assert f"{sprites}: {load(sprites)}" in capsys.readouterr().out
    fails(capsys, ["data", "info", tmp_path / "gone.h5"], 1, "gone.h5", "no such file")
    (tmp_path / "notes.txt").write_text("mine")
    fails(capsys, ["data", "info", tmp_path / "notes.txt"], 1, "notes.txt")
    monkeypatch.setitem(sys.modules, "h5py", None)
    fails(capsys, ["data", "info", path], 1, "h5py", "pip install 'fastdis[data]'")


def test_train_and_evaluate(capsys, sprites, trained, tmp_path):
    assert sorted(file.name for file in trained.iterdir()) == ["checkpoint.pt", "history.json"]
    assert main(["evaluate", str(trained), str(sprites), "--out", str(tmp_path / "metrics.json")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["step"] == 3
    assert metrics["images"] == 32
    # Factors with one value have no gap and are left out.
    assert metrics["factors"] == ["scale", "posX", "posY"]
    assert len(metrics["mig"]["mutual_information"]) == 3
    assert 0 <= metrics["mig"]["score"] <= 1
    # Every metric is there: a grid lets them all be computed.
    assert metrics["skipped"] == {}
    assert {"beta_vae", "dci", "flatness", "infomec", "sap"} < set(metrics)
    assert metrics["settings"]["left_out"] == ["shape", "orientation"]


def test_evaluate_some_metrics(capsys, sprites, trained):
    command = ["evaluate", str(trained), str(sprites), "--metrics", "mig, factor_vae"]
    outputs = []
    for seed in ("3", "3", "4"):
        assert main([*command, "--seed", seed]) == 0
        out, err = capsys.readouterr()
        assert "32/32" in err
        outputs.append(json.loads(out))
    assert list(outputs[0]) == ["step", "images", "factors", "mig", "factor_vae", "skipped", "settings"]
    assert outputs[0] == outputs[1]
    assert outputs[0]["settings"]["options"]["factor_vae"]["seed"] == 3
    assert outputs[2]["settings"]["seed"] == 4


def test_options_reach_the_model(sprites, tmp_path):
    options = ["--beta", "2.5", "--proto-weight", "7", "--embedding", "difference", "--intervention", "swap"]
    command = ["train", "protovae", str(sprites), "--out", str(tmp_path / "run"), "--steps", "1", "--lr", "0.01"]
    assert main([*command, "--seed", "5", *SMALL, *options]) == 0
    checkpoint = load_checkpoint(tmp_path / "run")
    config = checkpoint.model.config()
    assert (config["beta"], config["proto_weight"], config["latent_dim"]) == (2.5, 7, 3)
    assert (config["embedding"], config["intervention"], config["image_size"]) == ("difference", "swap", 32)
    assert checkpoint.settings == {"steps": 1, "batch_size": 4, "lr": 0.01, "seed": 5, "images": 32}


def test_resume_equals_training_in_one_go(capsys, sprites, trained, tmp_path):
    command = ["train", "protovae", str(sprites), "--out", str(tmp_path / "run")]
    assert main([*command, "--steps", "2", *SMALL]) == 0
    capsys.readouterr()
    fails(capsys, [*command, "--resume", "--steps", "3", "--lr", "0.1"], 2, "--resume", "--lr")
    assert main([*command, "--resume", "--steps", "3"]) == 0
    assert (tmp_path / "run" / "history.json").read_text() == (trained / "history.json").read_text()


def test_train_mistakes(capsys, sprites, trained, tmp_path):
    command = ["train", "protovae", sprites, "--out", tmp_path / "run", "--steps", "1"]
    fails(
        capsys, ["train", "protovae", tmp_path / "gone.npz", "--out", tmp_path / "run"], 1, "gone.npz", "no such file"
    )
    fails(capsys, ["train", "protovae", sprites], 2, "--out")
    fails(capsys, ["train", "protovae", sprites, "--out", trained], 1, trained, "not empty")
    fails(capsys, [*command, "--resume"], 1, "checkpoint")
    fails(capsys, [*command, "--steps", "many"], 2, "--steps", "many")
    fails(capsys, [*command, "--steps", "0"], 1, "steps must be at least 1")
    fails(capsys, [*command, "--lr", "-1"], 1, "lr must be a positive number")
    fails(capsys, [*command, "--latent-dim", "0"], 1, "latent_dim")
    fails(capsys, [*command, "--batch-size", "4"], 1, "shots + queries = 10 images, got 4")
    fails(capsys, [*command, "--device", "toaster"], 2, "--device", "toaster")
    fails(capsys, [*command, "--embedding", "sum"], 2, "sum")
    fails(capsys, [*command, "--no-such-option"], 2, "--no-such-option")
    fails(capsys, ["train", "gan", sprites], 2, "gan")
    fails(capsys, ["trian"], 2, "trian")


def test_divergence_is_one_sentence(capsys, sprites, tmp_path):
    command = ["train", "protovae", sprites, "--out", tmp_path / "run", "--steps", "30", "--lr", "1e6", *SMALL]
    fails(capsys, command, 1, "term became", "at step", "smaller lr")


def test_evaluate_says_what_to_install(capsys, monkeypatch, sprites, trained):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    fails(capsys, ["evaluate", trained, sprites, "--metrics", "explicitness"], 1, "pip install 'fastdis[metrics]'")
    assert main(["evaluate", str(trained), str(sprites)]) == 0
    assert "fastdis[metrics]" in json.loads(capsys.readouterr().out)["skipped"]["explicitness"]


def test_evaluate_mistakes(capsys, sprites, trained, tmp_path):
    fails(capsys, ["evaluate", tmp_path / "gone", sprites], 1, "gone")
    fails(capsys, ["evaluate", tmp_path, sprites], 1, "checkpoint.pt")
    fails(capsys, ["evaluate", trained, tmp_path / "gone.npz"], 1, "gone.npz")
    fails(capsys, ["evaluate", trained, sprites, "--metrics", "mig,migg"], 1, "'migg'", "factor_vae")
    fails(capsys, ["evaluate", trained, sprites, "--metrics", ","], 1, "metrics must name at least one of")
    fails(capsys, ["evaluate", trained, sprites, "--seed", "-1"], 1, "seed")
    fails(capsys, ["evaluate", trained, sprites, "--batch-size", "0"], 1, "batch_size must be at least 1, got 0")
    fails(capsys, ["evaluate", trained, trained / "history.json"], 1, "history.json", "'.json'")
    (tmp_path / "checkpoint.pt").write_bytes(b"rubbish")
    fails(capsys, ["evaluate", tmp_path, sprites], 1, "not a readable checkpoint")
    large = make_dsprites(tmp_path / "large.npz", size=64, shapes=1, scales=1, orientations=1, x=2, y=2)
    fails(capsys, ["evaluate", trained, large], 1, "[B, 1, 32, 32]", "64")
    still = make_dsprites(tmp_path / "still.npz", size=32, shapes=1, scales=1, orientations=1, x=1, y=1)
    fails(capsys, ["evaluate", trained, still], 1, "no factor varies")


def test_interrupt_is_one_sentence(capsys, monkeypatch, sprites, tmp_path):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdis.training.Trainer.fit", interrupt)
    fails(capsys, ["train", "protovae", sprites, "--out", tmp_path / "run"], 1, "interrupted")


def test_demo_writes_its_outputs_and_nothing_else(capsys, monkeypatch, tmp_path):
    from fastdis.cli import demo

    monkeypatch.setattr(demo, "GRID", {"shapes": [0], "scales": 2, "orientations": 1, "x": 4, "y": 3})
    monkeypatch.setattr(demo, "MODEL", {"latent_dim": 3, "shots": 1, "queries": 1})
    monkeypatch.setattr(demo, "BATCH_SIZE", 4)
    monkeypatch.setattr(demo, "VALUES", (-1.0, 1.0))
    out = tmp_path / "runs" / "demo"
    outputs = ["checkpoint.pt", "history.json", "losses.png", "metrics.json", "sprites.npz", "traversal.png"]
    assert main(["demo", "--out", str(out), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == outputs
    # Long paths are printed whole, one a line, so that they can be copied.
    assert all(str(out / name) in shown.splitlines() for name in outputs)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["trained"]["factors"] == ["scale", "posX", "posY"]
    assert metrics["trained"]["mig"]["score"] != metrics["untrained"]["mig"]["score"]
    for name in ("losses.png", "traversal.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    (out / "notes.txt").write_text("mine")
    assert main(["demo", "--out", str(out), "--steps", "3"]) == 0
    assert load_checkpoint(out).step == 3
    assert json.loads((out / "metrics.json").read_text())["step"] == 3
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(file.name for file in out.iterdir()) == sorted([*outputs, "notes.txt"])


def test_demo_mistakes(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    fails(capsys, ["demo", "--out", tmp_path / "file"], 2, "file", "--out")
    fails(capsys, ["demo", "--out", tmp_path / "new", "--steps", "0"], 2, "--steps")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
