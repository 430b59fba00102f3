"""The training recipe and its data sets, up to what would be downloaded."""

import argparse
import contextlib
import gzip
import io
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from captum_classfilters import LabelSensitiveGate, PathDecoupler
from captum_classfilters.assets import load_images, load_network
from captum_classfilters.core.files import read

RECIPES = Path(__file__).parents[2] / "tutorials" / "recipes"


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory):
    """The shipped images as the four files of an MNIST-like set."""
    folder = tmp_path_factory.mktemp("idx")
    for prefix, split in (("train", "train"), ("t10k", "test")):
        sample = load_images(split)
        for what, values, header in (("images-idx3", sample.images, 16), ("labels-idx1", sample.labels.byte(), 8)):
            with gzip.open(folder / f"{prefix}-{what}-ubyte.gz", "wb") as stream:
                stream.write(bytes(header) + values.numpy().tobytes())
    return folder


@pytest.fixture
def recipe_data(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    import data

    return data


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(script, *arguments):
    """Run a recipe as ``python script arguments`` does, in this process: a new one would import torch again."""
    out, errors, before = io.StringIO(), io.StringIO(), (sys.argv, sys.path[:])
    sys.argv = [script, *map(str, arguments)]
    sys.path.insert(0, str(RECIPES))
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), warnings.catch_warnings():
            warnings.simplefilter("default")  # a recipe's warnings are no errors, here as there
            runpy.run_path(str(RECIPES / script), run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        errors.write(error.code if isinstance(error.code, str) else "")
    finally:
        sys.argv, sys.path[:] = before
    return Done(status, out.getvalue(), errors.getvalue())


SMALL = ("--threads", 1, "--device", "cpu", "--precision", "float32", "--batch-size", 64)


def train(folder, out, *arguments):
    return run("train_fashion_mnist.py", "--data", folder, "--out", out, *SMALL, *arguments)


def test_idx_files_are_read_as_they_are(idx_folder, recipe_data):
    found, sample = recipe_data.load(str(idx_folder)), load_images("test")
    assert torch.equal(found.test.images, sample.images)
    assert torch.equal(found.test.labels, sample.labels)


def test_folders_of_pictures_are_read_and_resized(tmp_path, recipe_data):
    for split in ("train", "test"):
        for name, grey in (("cat", 10), ("dog", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((50, 40, 3), grey, np.uint8)).save(tmp_path / split / name / "a.png")
    found = recipe_data.load(str(tmp_path))
    assert found.class_names == ("cat", "dog")
    assert found.train.images.shape == (2, 3, 32, 32)
    assert [int(image.max()) for image in found.test.images] == [10, 200]


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_goes_through_torchvision(name, kind, recipe_data, monkeypatch, tmp_path):
    import torchvision

    with pytest.raises(RuntimeError, match="Dataset not found"):
        recipe_data.load(name, root=tmp_path, download=False)

    class Downloaded:
        data, targets, classes = np.zeros((4, 32, 32, 3), np.uint8), [0, 1, 0, 1], ["cat", "dog"]

        def __init__(self, root, train, download):
            assert download

    monkeypatch.setattr(torchvision.datasets, kind, Downloaded)
    found = recipe_data.load(name, root=tmp_path)
    assert found.train.images.shape == (4, 3, 32, 32)
    assert found.class_names == ("cat", "dog")


def test_a_wrong_data_set_is_refused_in_words(tmp_path):
    done = train(tmp_path, tmp_path / "run")
    assert done.returncode == 1
    assert "expected fashion_mnist, cifar10, cifar100, or a folder" in done.stderr


@pytest.mark.parametrize("method", ["std", "lsg"])
def test_training_learns_and_a_stopped_run_resumes_to_the_same_weights(method, idx_folder, tmp_path):
    common = ["--depth", 8, "--limit", 256, "--lr", 0.1, "--method", method, "--epochs", 3]
    whole = train(idx_folder, tmp_path / "whole", *common)
    assert whole.returncode == 0, whole.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", whole.stdout)]
    assert losses[-1] < losses[0]
    stopped = train(idx_folder, tmp_path / "parts", *common, "--stop-after", 1)
    assert stopped.returncode == 0, stopped.stderr
    assert not (tmp_path / "parts" / "network.safetensors").exists()
    resumed = train(idx_folder, tmp_path / "parts", *common)
    assert "epoch 1/3" not in resumed.stdout
    first, second = (load_network(tmp_path / name / "network.safetensors")[0] for name in ("whole", "parts"))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    gates = [tmp_path / name / "gate.safetensors" for name in ("whole", "parts")]
    assert [path.exists() for path in gates] == [method == "lsg"] * 2
    if method == "lsg":
        first, second = map(LabelSensitiveGate.load, gates)
        assert torch.equal(first.weight, second.weight)
        assert first.counts.sum() == 3 * 256
        noise = LabelSensitiveGate(10, 64, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(first.weight, noise.weight)


@pytest.fixture(scope="session")
def trained(idx_folder, tmp_path_factory):
    """A network to begin with, hardly trained."""
    folder = tmp_path_factory.mktemp("std")
    assert train(idx_folder, folder, "--depth", 8, "--limit", 128, "--epochs", 1).returncode == 0
    return folder / "network.safetensors"


@pytest.mark.parametrize(("recipe", "information"), [("depth", 0.5), ("paper", 1.0)])
def test_decoupling_starts_from_a_network_and_a_stopped_run_resumes_to_the_same_gates(
    recipe, information, trained, idx_folder, tmp_path
):
    common = ["--limit", 128, "--lr", 0.05, "--epochs", 2]
    common += ["--method", "decoupled", "--from", trained, "--sparsity-weight", 0.02, "--target-rate", 0.25]
    common += ["--recipe", recipe]
    whole = train(idx_folder, tmp_path / "whole", *common)
    assert whole.returncode == 0, whole.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", whole.stdout)]
    # gates that harden on the way may cost more than a few steps gain
    assert losses[1] < losses[0] or recipe == "depth"
    assert train(idx_folder, tmp_path / "parts", *common, "--stop-after", 1).returncode == 0
    assert "epoch 1/2" not in train(idx_folder, tmp_path / "parts", *common).stdout
    found = []
    for name in ("whole", "parts"):
        model, meta = load_network(tmp_path / name / "network.safetensors")
        found.append(PathDecoupler(model).load(tmp_path / name / "paths.safetensors").eval())
    for key, value in found[0].state_dict().items():
        assert torch.equal(value, found[1].state_dict()[key]), key
    assert (meta["recipe"], meta["target_rate"], meta["information"], meta["sparsity"]) == (
        recipe, 0.25, information, 0.02,
    )  # fmt: skip
    # what the recipe tells is the gated network's accuracy
    sample = load_images("test")
    predicted = found[0].paths([sample.images[:128].float() / 255]).predictions
    assert meta["test_accuracy"] == pytest.approx(float((predicted == sample.labels[:128]).double().mean()), abs=0.01)


def test_settling_trains_the_network_and_leaves_its_controllers_as_they_are(trained, idx_folder, tmp_path):
    common = ["--limit", 128, "--epochs", 1]
    first = [*common, "--method", "decoupled", "--target-rate", 0.4, "--from", trained]
    assert train(idx_folder, tmp_path / "first", *first).returncode == 0
    start = tmp_path / "first" / "network.safetensors"
    done = train(idx_folder, tmp_path / "then", *common, "--method", "settled", "--from", start)
    assert done.returncode == 0, done.stderr
    before, after = (
        PathDecoupler(load_network(tmp_path / name / "network.safetensors")[0]).load(
            tmp_path / name / "paths.safetensors"
        )
        for name in ("first", "then")
    )
    for key, value in before.controllers_state_dict().items():
        assert torch.equal(value, after.controllers_state_dict()[key]), key
    assert not torch.equal(before.model.conv1.weight, after.model.conv1.weight)
    meta = load_network(tmp_path / "then" / "network.safetensors")[1]
    assert (meta["method"], meta["target_rate"], meta["epochs_before"]) == ("decoupled", 0.4, 1)


def test_l1_pruning_closes_filters_for_good_down_to_the_macs_asked_for(trained, idx_folder, tmp_path):
    small = ["--limit", 64, "--epochs", 1]
    done = train(idx_folder, tmp_path, "--method", "l1", "--from", trained, "--macs", 0.6, *small)
    assert done.returncode == 0, done.stderr
    model, meta = load_network(tmp_path / "network.safetensors")
    gates = [gate.bool() for gate in torch.load(tmp_path / "gates.pt", weights_only=True)]
    costs = PathDecoupler(model).costs(torch.zeros(1, 1, 28, 28))
    assert 0.5 < float(costs.of(gates, controllers=False)) / costs.dense <= 0.6
    assert meta["macs"] == 0.6


def test_decoupling_without_a_network_to_begin_with_is_refused(idx_folder, tmp_path):
    done = train(idx_folder, tmp_path / "run", "--method", "decoupled")
    assert done.returncode == 1
    assert "give its file with --from" in done.stderr


@pytest.mark.parametrize(("name", "kind"), [("vgg", "SmallVGG"), ("inception", "SmallInception")])
def test_the_other_families_train(name, kind, idx_folder, tmp_path):
    done = train(idx_folder, tmp_path, "--network", name, "--limit", 64, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert type(load_network(tmp_path / "network.safetensors")[0]).__name__ == kind


def test_the_other_network_and_a_gate_set_by_hand(idx_folder, tmp_path):
    gated = ["--method", "fixed-gate", "--exclusive", 25]
    done = train(idx_folder, tmp_path, "--network", "alexnet", *gated, "--limit", 64, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    model, meta = load_network(tmp_path / "network.safetensors")
    assert (type(model).__name__, meta["method"]) == ("SmallAlexNet", "fixed-gate")
    gate = LabelSensitiveGate.load(tmp_path / "gate.safetensors")
    assert torch.equal(gate.weight, LabelSensitiveGate.fixed(10, 256, exclusive=25).weight)


@pytest.fixture
def make_networks(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    import make_networks

    return make_networks


def called_in_process(command):
    """In the place of ``subprocess.run``: what `make_networks` calls."""
    _, script, *arguments = command
    return run(Path(script).name, *arguments)


@pytest.mark.parametrize(
    ("name", "files", "told"),
    [
        (
            "resnet20_lsg_s1",
            {"gate_lsg_s1"},
            {"method": "lsg", "gate_start": "contribution", "scheme": "joint", "ablation": 1.0, "lr": 0.02},
        ),
        (
            "resnet20_lsg_noise_s1",
            {"gate_lsg_noise_s1"},
            {"method": "lsg", "gate_start": "noise", "scheme": "alternating", "ablation": 0.0, "lr": 0.1},
        ),
        ("resnet20_fixed_gate_s3", {"gate_fixed_gate_s3"}, {"method": "fixed-gate"}),
        ("resnet20_tuned_s1", set(), {"method": "std", "lr": 0.02}),
        (
            "resnet20_decoupled_r0_s0",
            {"paths_resnet20_decoupled_r0_s0"},
            {"method": "decoupled", "settled": True, "recipe": "paper", "target_rate": 0.0},
        ),
        (
            "resnet20_decoupled_s1",
            {"paths_resnet20_decoupled_s1"},
            {"method": "decoupled", "recipe": "depth", "target_rate": 0.51, "information": 0.5},
        ),
        (
            "vgg_decoupled_s0",
            {"paths_vgg_decoupled_s0"},
            {"method": "decoupled", "recipe": "depth", "target_rate": 0.51},
        ),
    ],
)
def test_networks_are_made_by_name(name, files, told, idx_folder, tmp_path, make_networks, monkeypatch):
    monkeypatch.setattr(make_networks.subprocess, "run", called_in_process)
    trial = [*map(str, SMALL), "--data", str(idx_folder), "--limit", "64", "--epochs", "1"]
    made = make_networks.make(name, tmp_path / "networks", tmp_path / "runs", trial, check=False)
    assert {path.stem for path in (tmp_path / "networks").iterdir()} == {name, *files}
    model, meta = load_network(made)
    assert {name: meta[name] for name in told} | {"seed": meta["seed"]} == {**told, "seed": int(name[-1])}
    if told["method"] == "decoupled":
        PathDecoupler(model).load(tmp_path / "networks" / f"paths_{name}.safetensors")
    elif files:
        LabelSensitiveGate.load(tmp_path / "networks" / f"{next(iter(files))}.safetensors")
    # a second call trains nothing
    monkeypatch.setattr(make_networks.subprocess, "run", None)
    assert make_networks.make(name, tmp_path / "networks", tmp_path / "runs", trial, check=False) == made


def test_a_failed_decoupling_is_refused(trained, idx_folder, tmp_path, make_networks):
    small = ["--method", "decoupled", "--from", trained, "--limit", 64, "--epochs", 1]
    assert train(idx_folder, tmp_path, *small).returncode == 0
    with pytest.raises(SystemExit, match="the training failed: expected a cross-entropy"):
        make_networks.check_paths(tmp_path)


@pytest.mark.parametrize("name", ["resnet50_s0", "resnet20_lsg", "kanji"])
def test_an_unknown_name_is_refused_before_any_training(name, make_networks, tmp_path):
    with pytest.raises(SystemExit, match=f"no recipe for '{name}'; expected kanji_resnet14 or"):
        make_networks.trainings(name, tmp_path)


def test_the_kanji_network_is_made_by_its_recipe(make_networks, tmp_path):
    (training,) = make_networks.trainings("kanji_resnet14", tmp_path)
    assert training == ("kanji.py", (), "kanji-s0")


def test_the_sample_that_ships_is_stratified(idx_folder, tmp_path):
    done = run("make_assets.py", "--data", idx_folder, "--each", 3, "--images-only", "--to", tmp_path)
    assert done.returncode == 0, done.stderr
    tensors, meta = read(tmp_path / "fashion_mnist_sample.safetensors", kind="ImageSample", version=2)
    assert tensors["train_labels"].bincount().tolist() == tensors["test_labels"].bincount().tolist() == [3] * 10
    assert meta["image_shape"] == [1, 28, 28]


def test_the_faster_precision_is_found_kept_and_can_be_set(trained, idx_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    import training

    model, images = load_network(trained)[0].train(), load_images("test").images[:8]
    options = argparse.Namespace(precision="auto", out=tmp_path)
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    for fast, slow in (("float32", "bfloat16"), ("bfloat16", "float32")):
        seconds = {training.PRECISIONS[fast]: 1.0, training.PRECISIONS[slow]: 2.0}
        monkeypatch.setattr(training, "_seconds_of_a_step", lambda model, images, dtype, s=seconds: s[dtype])
        assert training.precision_of(options, model, images) == fast
        # a resumed run keeps it, whatever is faster now
        monkeypatch.setattr(training, "_seconds_of_a_step", None)
        assert training.precision_of(options, model, images) == fast
        (tmp_path / "precision.txt").unlink()
    options.precision = "bfloat16"
    assert training.precision_of(options, model, images) == "bfloat16"
    monkeypatch.undo()
    assert training._seconds_of_a_step(model, images, torch.bfloat16) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_command_line_works_as_it_is_written(tmp_path):
    done = subprocess.run(
        [sys.executable, str(RECIPES / "train_fashion_mnist.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--precision" in done.stdout


def test_imagenet_recipe_runs_up_to_the_download(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = generator.integers(0, 255, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.JPEG")
    small = ["--random-weights", "--k", 5, "--limit", 3, "--workers", 0, "--device", "cpu"]
    done = run("imagenet.py", tmp_path, "resnet18", *small)
    assert done.returncode == 0, done.stderr
    assert re.search(r"histogram\s+5\s+0\.\d+", done.stdout)
    assert re.search(r"random\s+5", done.stdout)
