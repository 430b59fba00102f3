"""Class names as data sets of others have them: kinds, orders and letters; with real `ImageFolder` loaders."""

import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from captum_classfilters import ClassFilters, InfluentialFeatures, metrics, visualize
from captum_classfilters.class_filters import check_names, names_of
from captum_classfilters.comparison import compare
from captum_classfilters.core.errors import OptionError


def network(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def folder_loader(root, names):
    """A loader of an `ImageFolder`, two images for each class."""
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(2):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    return DataLoader(ImageFolder(root, to_tensor), batch_size=4)


def loader_of(classes, count=3):
    """A loader whose data set has ``.classes`` as given."""
    data = TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4) % count)
    data.classes = classes
    return DataLoader(data, batch_size=2)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ([7, 8, 9], ("7", "8", "9")),
        (np.array([7, 8, 9]), ("7", "8", "9")),
        (torch.tensor([7, 8, 9]), ("7", "8", "9")),
        ([b"cat", "dog", np.str_("eel")], ("cat", "dog", "eel")),
        (3, ("0", "1", "2")),
        ({"dog": 1, "eel": 2, "cat": 0}, ("cat", "dog", "eel")),
        ({1: "dog", 2: "eel", 0: "cat"}, ("cat", "dog", "eel")),
        ({"dog": "x", "eel": "y", "cat": "z"}, ("0", "1", "2")),
        (lambda: ["cat", "dog", "eel"], ("cat", "dog", "eel")),
        (lambda index: index, ("0", "1", "2")),
        ("cat", ("0", "1", "2")),
        ({"cat", "dog", "eel"}, ("0", "1", "2")),
        (["all", "dog", "eel"], ("all (0)", "dog", "eel")),
        ([("crane", "bird"), "crane", "crane"], ("crane, bird", "crane (1)", "crane (2)")),
        (["a", "a", "a (0)"], ("a (0)'", "a (1)", "a (0)")),
    ],
)
def test_classes_of_every_kind(classes, names):
    loader = loader_of(classes)
    assert names_of(None, 3, loader) == names
    table = InfluentialFeatures(network(3)).attribute(loader)
    assert table.class_names == names


def test_a_count_that_is_not_the_heads_is_told():
    with pytest.warns(UserWarning, match="names 5 classes, the head has 3"):
        assert names_of(None, 3, loader_of(5)) == ("0", "1", "2")


def test_requested_names_go_by_index_too():
    assert names_of({"dog": 1, "cat": 0}, 2) == ("cat", "dog")
    for requested in ("ab", 2, {"dog": 3, "cat": 0}):
        with pytest.raises(OptionError, match="class_names must be 2 names in the order of the class indices"):
            names_of(requested, 2)


def test_a_real_folder_with_a_class_called_all(tmp_path):
    loader = folder_loader(tmp_path, ["all", "cat", "dog"])
    model = network(3)
    table = InfluentialFeatures(model).attribute(loader)
    assert table.class_names == ("all (0)", "cat", "dog")
    curve = metrics.accuracy_curve(model, table, loader, ks=[1])
    assert set(curve.class_name) == {"all", "all (0)", "cat", "dog"}
    frame = compare(model, loader, loader, ks=[1])
    assert frame is not None
    part = DataLoader(Subset(loader.dataset, [0, 2, 4]), batch_size=3)
    assert InfluentialFeatures(model).attribute(part).class_names == table.class_names


def test_many_classes_take_little_time():
    names = [f"class {index}" for index in range(100_000)]
    started = time.perf_counter()
    assert len(names_of(None, len(names), loader_of(names))) == len(names)
    with pytest.raises(OptionError, match="more than once"):
        check_names([*names, *names])
    assert time.perf_counter() - started < 5  # the square of the number of classes took minutes


@pytest.mark.parametrize("name", ["price_$10_$20", r"\frac$_{$", "$x^$", "red\x1b[31m", "\udcff", "x" * 1_000_000])
def test_every_picture_draws_every_name(name):
    names = (name, "dog $", "eel")
    scores = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)).double()
    table = ClassFilters(scores, scores, torch.tensor([2, 2, 2]), "histogram", "4", names)
    model, images = network(3), [(torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 2]))]
    curve = metrics.accuracy_curve(model, {"$a_$": table}, images, ks=[1, 2])
    for draw in (
        lambda: visualize.class_filters(table, k=2),
        lambda: visualize.overlap(table, 2),
        lambda: visualize.accuracy_curve(curve),
        lambda: visualize.filter_cards(model, table, 0, images),
    ):
        draw()
        plt.gcf().canvas.draw()
        for text in plt.gcf().findobj(plt.Text):
            assert "\x1b" not in text.get_text()
        plt.close("all")
