"""Every public call that reads a loader reads a torchvision `ImageFolder`, whose data set names its classes."""

import inspect
import tempfile

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation
from captum.robust import FGSM
from contract import ROWS, any_filters
from PIL import Image
from shared import SmallCNN, seeded
from test_architecture import public_calls
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from captum_classfilters import (
    Batches,
    HeadMoments,
    HeadPass,
    InfluentialFeatures,
    LabelSensitiveGate,
    LabelSensitiveTraining,
    PathDecoupler,
    adversarial_paths,
    compare,
    concepts,
    metrics,
    recover,
    visualize,
)
from captum_classfilters.comparison import aggregate
from captum_classfilters.report import ReportOptions, report

NAMES = ("all", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """Three images for each of four classes, one of which is called "all"."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for shade, name in enumerate(NAMES):
        (root / name).mkdir()
        for number in range(3):
            pixels = generator.integers(0, 64, (8, 8, 3), dtype=np.uint8) + 64 * np.uint8(shade)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    return DataLoader(ImageFolder(root, to_tensor), batch_size=5)


@pytest.fixture(scope="module")
def model(loader):
    network = seeded(SmallCNN(), 0).eval()
    images, labels = next(iter(DataLoader(loader.dataset, batch_size=12)))
    features = network.penultimate(images).detach()
    with torch.no_grad():  # least squares: a network that classifies most of them right
        network.fc.weight.copy_((torch.linalg.pinv(features) @ (2 * torch.eye(4)[labels] - 1)).T)
        network.fc.bias.zero_()
    return network


def masked(loader):
    """Masks in the place of labels, for the measures of concepts."""
    return Batches(
        loader, lambda batch: (batch[0], {"bright": batch[0][:, 0] > 0.1, "red": batch[0][:, 0] > batch[0][:, 1]})
    )


def decoupler(model):
    return PathDecoupler(model, ["conv1", "conv2"])


def training(model):
    return LabelSensitiveTraining(seeded(SmallCNN(), 0), LabelSensitiveGate(4, 6))


def reported(model, loader):
    with tempfile.TemporaryDirectory() as folder:
        return report(model, loader, loader, f"{folder}/report.html", options=ReportOptions(most=2))


# the calls of tests/contract.py among them
CALLS = {
    "aggregate": lambda m, x: aggregate(LayerGradientXActivation(m, m.conv2), x),
    "compare": lambda m, x: compare(m, x, x, ks=[1]),
    "activation_thresholds": lambda m, x: concepts.activation_thresholds(m, masked(x), ["conv2"]),
    "concept_representation": lambda m, x: concepts.concept_representation(decoupler(m), masked(x), thresholds=0.2),
    "concept_scores": lambda m, x: concepts.concept_scores(m, masked(x), ["conv2"], thresholds=0.2),
    "paths": lambda m, x: decoupler(m).paths(x),
    "adversarial_paths": lambda m, x: adversarial_paths(
        decoupler(m), x, lambda images, labels: FGSM(m).perturb(images, 0.5, labels).clamp(0, 1)
    ),
    "before_epoch": lambda m, x: training(m).before_epoch(0, x),
    "fit": lambda m, x: training(m).fit(x, 1),
    "filter_ambiguity": ROWS,
    "collect": ROWS,
    "recover": lambda m, x: recover(m, x, validation=x),
    "attack_success": lambda m, x: metrics.attack_success(
        {"net": m}, x, {"fgsm": lambda net: lambda images, labels: FGSM(net).perturb(images, 0.5, labels).clamp(0, 1)}
    ),
    "accuracy_curve": lambda m, x: metrics.accuracy_curve(m, table(m, x), x, [1]),
    "channel_deletion": lambda m, x: metrics.channel_deletion(m, table(m, x), x, 2),
    "class_ablation": lambda m, x: metrics.class_ablation(m, table(m, x), x, 2),
    "class_masking": lambda m, x: metrics.class_masking(m, table(m, x), x, k=2),
    "feature_clusters": lambda m, x: metrics.feature_clusters(m, table(m, x), x),
    "filter_correlation": lambda m, x: metrics.filter_correlation(m, x),
    "gate_leakage": lambda m, x: metrics.gate_leakage(m, table(m, x), x),
    "gate_similarity": lambda m, x: metrics.gate_similarity(m, table(m, x), x),
    "inter_class_correlation": lambda m, x: metrics.inter_class_correlation(m, x, kinds=["activations"]),
    "localisation": lambda m, x: metrics.localisation(m, table(m, x), x, 2, silhouette=lambda i: i[:, 0] > i[:, 1]),
    "masked_confusion": lambda m, x: metrics.masked_confusion(m, table(m, x), x, ["all (0)"], k=2),
    "mutual_information": lambda m, x: metrics.mutual_information(m, x, n_neighbors=2),
    "path_accuracy": lambda m, x: metrics.path_accuracy(decoupler(m), x),
    "pruning_curve": lambda m, x: metrics.pruning_curve(m, x, [0.5]),
    "stability": lambda m, x: metrics.stability(m, x, 2),
    "filter_cards": lambda m, x: visualize.filter_cards(m, table(m, x), "all (0)", x),
    "report": reported,
    "HeadPass": lambda m, x: HeadPass(m, x).cached(),
}


def table(model, loader):
    return InfluentialFeatures(model).attribute(loader)


def reads_a_loader(function):
    return {"loader", "test_loader"} & inspect.signature(inspect.unwrap(function)).parameters.keys()


def test_every_call_that_reads_a_loader_is_here():
    readers = {name.rpartition(".")[2] for name, function, _ in public_calls() if reads_a_loader(function)}
    assert readers <= CALLS.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name, run in CALLS.items() if run is not ROWS])
def test_an_image_folder_is_read(name, model, loader):
    assert CALLS[name](model, loader) is not None or name == "before_epoch"


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.reads == "loader" and "ath" not in row.name], ids=lambda row: row.name
)
def test_an_image_folder_is_read_by_what_borrows(row, model, loader):
    assert row.run(model, loader) is not None


def test_names_are_those_of_the_folders(model, loader):
    expected = ("all (0)", *NAMES[1:])
    filters = table(model, loader)
    assert filters.class_names == expected
    assert filters.counts.tolist() == [3] * 4
    named = {"class_name": metrics.accuracy_curve(model, filters, loader, [1])}
    named |= {"class_name ": metrics.pruning_curve(model, loader, [0.5])}
    for frame in named.values():
        if "class_name" in frame:
            assert set(frame.class_name) <= {"all", *expected}
    assert HeadMoments.collect(model, loader).count == 12
    assert any_filters(model).num_classes == 4
