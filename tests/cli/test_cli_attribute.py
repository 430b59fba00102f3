"""``attribute``: a checkpoint and a folder in; a table, its files and its pictures out."""

import gzip
import importlib
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cli_examples import CLASSES, append, draw_images, small_resnet
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from captum_classfilters import ClassFilters, InfluentialFeatures, visualize
from captum_classfilters.cli.data import open_source
from captum_classfilters.cli.parser import SELECTORS
from captum_classfilters.cli.writing import as_json
from captum_classfilters.influential import selectors

SMALL = ("--image-size", "32")


def by_hand(model, folder, selector="histogram"):
    """The same table without any line of the command's: torchvision's folder and its older transforms."""
    steps = [
        transforms.Resize(36),
        transforms.CenterCrop(32),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    loader = DataLoader(ImageFolder(folder, transforms.Compose(steps)), batch_size=4)
    return InfluentialFeatures(model).attribute(loader, selector=selector)


def assert_same_table(found, expected):
    assert found.class_names == expected.class_names
    torch.testing.assert_close(found.counts, expected.counts)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)


def assert_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_a_checkpoint_and_a_folder_become_filters_a_table_and_pictures(run, shared_images, checkpoint, tmp_path):
    out = tmp_path / "new" / "folder"
    found = run("attribute", "resnet18", shared_images / "train", "--weights", checkpoint, "--out", out, *SMALL)
    assert found.status == 0, found.err
    table = ClassFilters.load(out / "filters.safetensors")
    assert_same_table(table, by_hand(small_resnet(), shared_images / "train"))
    assert sorted(path.name for path in out.iterdir()) == [
        "class_filters.png", "filters.safetensors", "overlap.png", "top.csv",
    ]  # fmt: skip
    assert_picture(out / "class_filters.png")
    assert_picture(out / "overlap.png")
    for name, channels in zip(CLASSES, table.top(5).tolist(), strict=True):
        assert [name, *map(str, channels)] in [line.split() for line in found.out.splitlines()]
    assert "shorter side to 36, centre 32 x 32, pixels in [0, 1] minus (0.485, 0.456, 0.406)" in found.out
    assert str(out) in found.out
    assert "100%" not in found.err  # no progress bar into a pipe

    top = pd.read_csv(out / "top.csv")
    assert top.channel.tolist() == table.top(5).flatten().tolist()
    assert top["rank"].tolist() == [1, 2, 3, 4, 5] * 3
    first = table.scores[0, int(table.top(1)[0])]
    assert top.loc[0, ["score", "per_image", "share"]].tolist() == pytest.approx(
        [float(first), float(first / 6), float(first / table.scores[0].sum())]
    )


def test_several_selectors_judged_on_other_images_as_json(run, shared_images, checkpoint, tmp_path):
    found = run(
        "attribute", "torchvision:resnet18", shared_images, "--split", "train", "--weights", checkpoint,
        "--out", tmp_path, "--selector", "contribution,weight", "--judge", shared_images / "val", "--k", "4", "--json",
        *SMALL,
    )  # fmt: skip
    assert found.status == 0, found.err
    told = json.loads(found.out)
    for name in ("contribution", "weight"):
        table = ClassFilters.load(tmp_path / f"filters_{name}.safetensors")
        expected = by_hand(small_resnet(), shared_images / "train", name)
        assert_same_table(table, expected)
        assert told["filters"][name]["top"] == dict(zip(CLASSES, expected.top(4).tolist(), strict=True))
        assert_picture(tmp_path / f"class_filters_{name}.png")
        assert_picture(tmp_path / f"overlap_{name}.png")
    assert_picture(tmp_path / "accuracy_curve.png")
    curve = pd.read_csv(tmp_path / "accuracy_curve.csv")
    assert set(curve.filters) == {"dense", "contribution", "weight", "random"}
    assert set(curve.samples[curve.class_name == "all"]) == {18}
    judged = pd.DataFrame(told["judged"])
    assert sorted(set(judged.k)) == [1, 2, 3, 4, 5, 10, 20, 50, 512]
    overall = curve[curve.class_name == "all"].drop(columns="class_name").reset_index(drop=True)
    pd.testing.assert_frame_equal(judged, overall, check_dtype=False)
    assert told["preprocessing"]["crop"] == 32
    assert sorted(told["files"]) == sorted(str(path) for path in tmp_path.iterdir())
    assert told["skipped"] == []


def test_json_is_strict():
    found = as_json({"nan": float("nan"), "half": 0.5, "path": Path("a"), "pair": (1, True, None)})
    assert json.loads(found) == {"nan": None, "half": 0.5, "path": "a", "pair": [1, True, None]}


def test_quiet_says_nothing(run, shared_images, checkpoint, tmp_path):
    found = run(
        "attribute", "resnet18", shared_images / "train", "--weights", checkpoint, "--out", tmp_path, "--quiet", *SMALL
    )
    assert found == (0, "", "")


@pytest.mark.usefixtures("no_pictures")
def test_options_of_the_images_and_of_the_pass_arrive(run, shared_images, checkpoint, tmp_path):
    found = run(
        "attribute", "resnet18", shared_images / "train", "--weights", checkpoint, "--out", tmp_path, "--json",
        "--image-size", "24", "--resize", "30", "--mean", "0.5", "--std", "0.1", "0.2", "0.3", "--limit", "2",
        "--layer", "fc", "--k1", "7", "--batch-size", "5", "--workers", "1", "--device", "cpu",
    )  # fmt: skip
    assert found.status == 0, found.err
    told = json.loads(found.out)
    assert told["preprocessing"] == {
        "channels": 3, "resize": 30, "crop": 24, "mean": [0.5] * 3, "std": [0.1, 0.2, 0.3], "interpolation": "bilinear",
        "exif": False,
    }  # fmt: skip
    table = ClassFilters.load(tmp_path / "filters.safetensors")
    assert table.counts.tolist() == [2, 2, 2]
    assert table.meta["k1"] == 7


@pytest.mark.usefixtures("no_pictures")
def test_folders_of_some_classes_find_their_places(run, shared_images, module, tmp_path):
    append(tmp_path / f"{module}.py", "\ndef five():\n    return Net(3, 5)\n")
    (tmp_path / "classes.txt").write_text("dog\nbird\n\nfish\ncat\nsnake\n")
    out = tmp_path / "out"
    found = run(
        "attribute", f"{module}:five", shared_images / "train", "--classes", "classes.txt", "--out", out, *SMALL
    )
    assert found.status == 0, found.err
    table = ClassFilters.load(out / "filters.safetensors")
    assert table.class_names == ("dog", "bird", "fish", "cat", "snake")
    assert table.counts.tolist() == [6, 0, 6, 6, 0]
    assert "note: no sample of class bird, snake" in found.err
    assert "(no images)" in found.out
    assert "bird" not in set(pd.read_csv(out / "top.csv")["class"])
    (tmp_path / "classes.txt").write_text("dog\nbird\nfish\n")
    found = run(
        "attribute", f"{module}:five", shared_images / "train", "--classes", "classes.txt", "--out", out, *SMALL
    )
    assert found.status == 1
    assert "lists 3 classes, but not 'cat'" in found.err


def test_of_many_empty_channels_none_is_drawn(run, shared_images, checkpoint, tmp_path, monkeypatch):
    asked = []
    draw = visualize.class_filters
    monkeypatch.setattr(visualize, "class_filters", lambda *args, **how: asked.append(how) or draw(*args, **how))
    words = ("--weights", checkpoint, "--out", tmp_path, *SMALL)
    assert run("attribute", "resnet18", shared_images / "train", *words).status == 0
    voted = int((ClassFilters.load(tmp_path / "filters.safetensors").scores > 0).any(0).sum())
    assert voted < 256
    assert asked == [{"k": 5, "max_channels": voted}]


def test_too_many_classes_for_a_picture_are_noted(run, module, tmp_path):
    names = [f"c{index:03}" for index in range(201)]
    draw_images(tmp_path / "many", 0, count=1, classes=names[:2])
    (tmp_path / "classes.txt").write_text("\n".join(names))
    append(tmp_path / f"{module}.py", "\ndef many():\n    return Net(3, 201)\n")
    found = run("attribute", f"{module}:many", "many", "--classes", "classes.txt", "--out", "out", "--image-size", "16")
    assert found.status == 0, found.err
    assert "no picture of what 201 classes share" in found.err
    assert_picture(tmp_path / "out" / "class_filters.png")
    assert not (tmp_path / "out" / "overlap.png").exists()
    assert "... and 181 more classes" in found.out


# -- data sets with a name ---------------------------------------------------------------------------------------------


def write_fashion(folder, packed):
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, content in ((f"{prefix}-labels-idx1", bytes(8) + labels.tobytes()),
                              (f"{prefix}-images-idx3", bytes(16) + images.tobytes())):  # fmt: skip
            path = folder / f"{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
        if prefix == "train":
            train = torch.from_numpy(images).unsqueeze(1) / 255, torch.from_numpy(labels).long()
    return train


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("packed", [True, False], ids=["plain gz files", "torchvision's folder"])
def test_fashion_mnist_is_grey_and_not_normalised(run, module, tmp_path, packed):
    root = tmp_path / "data"
    train = write_fashion(root if packed else root / "FashionMNIST" / "raw", packed)
    append(tmp_path / f"{module}.py", "\nimport torch\ntorch.manual_seed(0)\nonly = grey()\n"
                                                "def the_one():\n    return only\n")  # fmt: skip
    data = f"fashion_mnist:{root}"
    found = run(
        "attribute", f"{module}:the_one", data, "--out", tmp_path, "--judge", data, "--json", "--selector",
        "mean_activation",
    )  # fmt: skip
    assert found.status == 0, found.err
    told = json.loads(found.out)
    assert told["preprocessing"]["mean"] == [0.0]
    assert told["data"] == "Fashion-MNIST, train"
    assert told["judged"][0]["samples"] == 10  # the test images
    expected = InfluentialFeatures(importlib.import_module(module).only).attribute([train], selector="mean_activation")
    table = ClassFilters.load(tmp_path / "filters.safetensors")
    torch.testing.assert_close(table.scores, expected.scores, rtol=1e-5, atol=1e-5)
    assert table.class_names[9] == "ankle boot"


def test_cifar10_as_torchvision_keeps_it(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [n % 10 for n in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # the real files' checksums
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", [f"class {n}" for n in range(10)]))
    found = open_source(f"cifar10:{tmp_path}", None, judging=True)
    assert (found.about, found.size, found.channels, found.labels[:3]) == ("CIFAR-10, test", 32, 3, [0, 1, 2])
    np.testing.assert_array_equal(found.images[3].transpose(2, 0, 1).ravel(), pixels[3])


@pytest.mark.usefixtures("no_pictures")
def test_imagenet_as_torchvision_keeps_it(run, module, tmp_path):
    root = tmp_path / "imagenet"
    draw_images(root / "val", 0, count=2, classes=("n01", "n02", "n03"))
    names = {"n01": ("crane", "lift"), "n02": ("crane", "lift"), "n03": ("tench",)}
    torch.save((names, []), root / "meta.bin")
    found = run(
        "attribute", f"{module}:Net", f"imagenet:{root}", "--split", "val", "--out", "out", "--image-size", "16"
    )
    assert found.status == 0, found.err
    table = ClassFilters.load(tmp_path / "out" / "filters.safetensors")
    assert table.class_names == ("crane, lift (0)", "crane, lift (1)", "tench")
    assert table.counts.tolist() == [2, 2, 2]


def test_the_parser_knows_all_selectors():
    assert tuple(SELECTORS) == tuple(selectors.SELECTORS)
