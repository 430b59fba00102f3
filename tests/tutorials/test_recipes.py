"""The training recipe and its data sets, up to what would be downloaded."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_classfilters import LabelSensitiveGate, PathDecoupler
from captum_classfilters.assets import load_images, load_network

RECIPES = Path(__file__).parents[2] / "tutorials" / "recipes"


@pytest.fixture(scope="module")
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


def run(script, *arguments):
    command = [sys.executable, str(RECIPES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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
    done = run("train_fashion_mnist.py", "--data", tmp_path, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "expected fashion_mnist, cifar10, cifar100, or a folder" in done.stderr


@pytest.mark.parametrize("method", ["std", "lsg"])
def test_training_learns_and_a_stopped_run_resumes_to_the_same_weights(method, idx_folder, tmp_path):
    common = ["--data", idx_folder, "--depth", 8, "--limit", 512, "--threads", 1, "--lr", 0.2, "--device", "cpu"]
    common += ["--method", method]
    whole = run("train_fashion_mnist.py", *common, "--epochs", 3, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d+)", whole.stdout)]
    # that of a gated epoch, the second, has the penalty in it
    assert losses[-1] < losses[0]
    stopped = run("train_fashion_mnist.py", *common, "--epochs", 3, "--stop-after", 1, "--out", tmp_path / "parts")
    assert stopped.returncode == 0, stopped.stderr
    assert not (tmp_path / "parts" / "network.safetensors").exists()
    resumed = run("train_fashion_mnist.py", *common, "--epochs", 3, "--out", tmp_path / "parts")
    assert "epoch 1/3" not in resumed.stdout
    first, second = (load_network(tmp_path / name / "network.safetensors")[0] for name in ("whole", "parts"))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    gates = [tmp_path / name / "gate.safetensors" for name in ("whole", "parts")]
    assert [path.exists() for path in gates] == [method == "lsg"] * 2
    if method == "lsg":
        first, second = map(LabelSensitiveGate.load, gates)
        assert torch.equal(first.weight, second.weight)
        assert first.counts.sum() == 512
        noise = LabelSensitiveGate(10, 64, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(first.weight, noise.weight)


@pytest.fixture(scope="module")
def trained(idx_folder, tmp_path_factory):
    """A network to begin with, hardly trained."""
    folder = tmp_path_factory.mktemp("std")
    common = ["--data", idx_folder, "--depth", 8, "--limit", 256, "--threads", 1, "--device", "cpu", "--out", folder]
    assert run("train_fashion_mnist.py", *common, "--epochs", 1).returncode == 0
    return folder / "network.safetensors"


def test_decoupling_starts_from_a_network_and_a_stopped_run_resumes_to_the_same_gates(trained, idx_folder, tmp_path):
    common = ["--data", idx_folder, "--limit", 256, "--threads", 1, "--lr", 0.05, "--device", "cpu", "--epochs", 2]
    common += ["--method", "decoupled", "--from", trained, "--sparsity-weight", 0.02, "--target-rate", 0.25]
    whole = run("train_fashion_mnist.py", *common, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    losses = [float(found) for found in re.findall(r"loss (\d+\.\d+)", whole.stdout)]
    assert losses[1] < losses[0]
    assert run("train_fashion_mnist.py", *common, "--stop-after", 1, "--out", tmp_path / "parts").returncode == 0
    assert "epoch 1/2" not in run("train_fashion_mnist.py", *common, "--out", tmp_path / "parts").stdout
    found = []
    for name in ("whole", "parts"):
        model, meta = load_network(tmp_path / name / "network.safetensors")
        found.append(PathDecoupler(model).load(tmp_path / name / "paths.safetensors").eval())
    for key, value in found[0].state_dict().items():
        assert torch.equal(value, found[1].state_dict()[key]), key
    assert (meta["target_rate"], meta["information_weight"]) == (0.25, 1.0)
    # what the recipe tells is the gated network's accuracy
    sample = load_images("test")
    predicted = found[0].paths([sample.images[:256].float() / 255]).predictions
    assert meta["test_accuracy"] == pytest.approx(float((predicted == sample.labels[:256]).double().mean()), abs=0.01)


def test_settling_trains_the_network_and_leaves_its_controllers_as_they_are(trained, idx_folder, tmp_path):
    common = ["--data", idx_folder, "--limit", 128, "--threads", 1, "--device", "cpu", "--epochs", 1]
    first = [*common, "--method", "decoupled", "--target-rate", 0.4, "--from", trained, "--out", tmp_path / "first"]
    assert run("train_fashion_mnist.py", *first).returncode == 0
    start = tmp_path / "first" / "network.safetensors"
    done = run("train_fashion_mnist.py", *common, "--method", "settled", "--from", start, "--out", tmp_path / "then")
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
    done = run(
        "train_fashion_mnist.py", "--data", idx_folder, "--method", "l1", "--from", trained, "--macs", 0.6,
        "--limit", 128, "--epochs", 1, "--threads", 1, "--device", "cpu", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, meta = load_network(tmp_path / "network.safetensors")
    gates = [gate.bool() for gate in torch.load(tmp_path / "gates.pt", weights_only=True)]
    costs = PathDecoupler(model).costs(torch.zeros(1, 1, 28, 28))
    assert 0.5 < float(costs.of(gates, controllers=False)) / costs.dense <= 0.6
    assert meta["macs"] == 0.6


def test_decoupling_without_a_network_to_begin_with_is_refused(idx_folder, tmp_path):
    done = run("train_fashion_mnist.py", "--data", idx_folder, "--method", "decoupled", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "give its file with --from" in done.stderr


@pytest.mark.parametrize(("name", "kind"), [("vgg", "SmallVGG"), ("inception", "SmallInception")])
def test_the_other_families_train(name, kind, idx_folder, tmp_path):
    done = run(
        "train_fashion_mnist.py", "--data", idx_folder, "--network", name, "--limit", 128, "--epochs", 1,
        "--threads", 1, "--device", "cpu", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert type(load_network(tmp_path / "network.safetensors")[0]).__name__ == kind


def test_the_other_network_and_a_gate_set_by_hand(idx_folder, tmp_path):
    done = run(
        "train_fashion_mnist.py", "--data", idx_folder, "--network", "alexnet", "--method", "fixed-gate",
        "--exclusive", 25, "--limit", 128, "--epochs", 2, "--threads", 1, "--device", "cpu", "--out", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, meta = load_network(tmp_path / "network.safetensors")
    assert (type(model).__name__, meta["method"]) == ("SmallAlexNet", "fixed-gate")
    gate = LabelSensitiveGate.load(tmp_path / "gate.safetensors")
    assert torch.equal(gate.weight, LabelSensitiveGate.fixed(10, 256, exclusive=25).weight)


def test_imagenet_recipe_runs_up_to_the_download(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                pixels = generator.integers(0, 255, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.JPEG")
    done = run(
        "imagenet.py",
        tmp_path,
        "resnet18",
        "--random-weights",
        "--k",
        5,
        "--limit",
        3,
        "--workers",
        0,
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"histogram\s+5\s+0\.\d+", done.stdout)
    assert re.search(r"random\s+5", done.stdout)
