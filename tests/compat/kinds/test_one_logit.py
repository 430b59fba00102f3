"""Networks with one logit: two classes, of which the first has the negative of the weight row."""

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import nn
from torch.nn import functional as F

from captum_classfilters import (
    ALDSplitter,
    GateSchedule,
    HeadMoments,
    HeadPass,
    InfluentialFeatures,
    LabelSensitiveGate,
    LabelSensitiveTraining,
    LayerGradCamPlusPlus,
    PathDecoupler,
    aggregate,
    attacks,
    decompose,
    explain_confusion,
    metrics,
    recover,
)
from captum_classfilters.heads import export_onnx


def network(tail=None):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*trunk, nn.Linear(8, 1))
    with torch.no_grad():
        model[4].bias -= model(batches()[0][0]).median()
    return (nn.Sequential(*model, tail) if tail else model).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 2) for _ in range(3)]


IMAGES = batches()[0][0]
LABELS = torch.cat([labels for _, labels in batches()])


def by_hand(model):
    with torch.no_grad():
        features = torch.cat([model[:4](images) for images, _ in batches()])
    return features, model[4].weight.detach()[0], model[4].bias.detach()[0]


@pytest.mark.parametrize("tail", [None, nn.Sigmoid()], ids=["logit", "sigmoid"])
def test_tables_of_two_classes(tail):
    model = network(tail)
    features, weight, bias = by_hand(model)
    head = HeadPass(model, batches()).head
    assert (head.num_classes, head.num_features) == (2, 8)
    filters = InfluentialFeatures(model).attribute(batches(), selector="contribution", class_names=["no", "yes"])
    sums = torch.stack([features[label == LABELS].sum(0) for label in range(2)])
    expected = torch.stack([-weight * sums[0], weight * sums[1]])
    torch.testing.assert_close(filters.scores.float(), expected, rtol=1e-4, atol=1e-5)
    assert filters.class_names == ("no", "yes")
    by_prediction = InfluentialFeatures(model).attribute(batches(), label_source="prediction")
    positive = int((features @ weight + bias > 0).sum())
    assert by_prediction.counts.tolist() == [24 - positive, positive]


def test_curves_count_the_sign():
    model = network()
    features, weight, bias = by_hand(model)
    filters = InfluentialFeatures(model).attribute(batches(), selector="contribution")
    curve = metrics.accuracy_curve(model, filters, batches(), ks=[3])
    masks = filters.mask(3).float()
    logit = features @ (weight * masks.sum(0) / 2) + bias
    dense, kept = (
        curve.query("filters == @name and class_name == 'all'").accuracy.item() for name in ("dense", "contribution")
    )
    assert dense == pytest.approx(float(((features @ weight + bias > 0) == LABELS.bool()).float().mean()))
    assert kept == pytest.approx(float(((logit > 0) == LABELS.bool()).float().mean()))


@pytest.mark.parametrize("backend", ["dense", "gather", "bag"])
def test_the_smaller_network_has_one_logit(backend):
    model = network()
    features, weight, bias = by_hand(model)
    filters = InfluentialFeatures(model).attribute(batches(), selector="contribution")
    small = decompose(model, filters, 3, backend=backend)
    expected = features[:8] @ (weight * filters.mask(3).float().sum(0) / 2) + bias
    torch.testing.assert_close(small(IMAGES), expected[:, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        decompose(model, filters, 8, backend=backend)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("refit", ["least_squares", "omp"])
def test_refits(refit):
    model = network()
    moments = HeadMoments.collect(model, batches())
    filters = None if refit == "omp" else InfluentialFeatures(model).attribute(batches(), selector="contribution")
    whole = decompose(model, filters, 8, refit=refit, moments=moments)
    torch.testing.assert_close(whole(IMAGES), model(IMAGES), rtol=1e-2, atol=1e-3)
    assert decompose(model, filters, 2, refit=refit, moments=moments)(IMAGES).shape == (8, 1)


def test_why_the_wrong_class_won():
    model = network()
    features, weight, bias = by_hand(model)
    predicted = (features[:8] @ weight + bias > 0).long()
    confusion = explain_confusion(model, IMAGES, 1 - predicted)
    assert torch.equal(confusion.predicted, predicted)
    logit = features[:8] @ weight + bias
    torch.testing.assert_close(confusion.difference.float(), 2 * logit.abs(), rtol=1e-4, atol=1e-5)
    total = confusion.table.groupby("sample").contribution.sum().to_numpy(copy=True)
    torch.testing.assert_close(torch.from_numpy(total), confusion.difference)


def test_the_splitter_has_two_trees_that_mirror_each_other():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    trees = ALDSplitter(model).split()
    assert set(trees) == {0, 1}
    assert torch.equal(trees[0].weights, -trees[1].weights)
    assert trees[1].terminal("positive").tolist() == trees[0].terminal("negative").tolist()


class Both(nn.Module):
    """The same network with its two logits written out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        logit = self.model(images)
        return torch.cat([-logit, logit], 1)


@pytest.mark.parametrize("target", [0, 1])
def test_grad_cam_of_either_class(target):
    model = network()
    found = LayerGradCamPlusPlus(model, model[0]).attribute(IMAGES, target=target)
    expected = LayerGradCamPlusPlus(Both(model), model[0]).attribute(IMAGES, target=target)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, LayerGradCamPlusPlus(model, model[0]).attribute(IMAGES, target=1 - target))


@pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.IdleChannelWarning")
def test_gates_and_retraining_minimise_the_binary_cross_entropy():
    model = network()
    gate = LabelSensitiveGate(2, 8, generator=torch.Generator().manual_seed(0))
    gate.is_noise = False
    training = LabelSensitiveTraining(model, gate, schedule=GateSchedule(scheme="alternating"))
    images, labels = batches()[0]
    plain = F.binary_cross_entropy_with_logits(model(images)[:, 0], labels.float())
    torch.testing.assert_close(training.loss(images, labels, 0), plain)
    gated, alone, other = (
        model[4](model[:4](images) * rows)[:, 0]
        for rows in (gate.weight[labels], 1 - gate.weight[labels], 1 - gate.weight[1 - labels])
    )
    entropy = F.binary_cross_entropy_with_logits
    # to lose its label is to get the other one, of two
    ablated = entropy(alone, 1 - labels.float()) + entropy(other, labels.float())
    expected = entropy(gated, labels.float()) + ablated + training._penalty()
    torch.testing.assert_close(training.loss(images, labels, 1), expected)
    before = F.binary_cross_entropy_with_logits(model(IMAGES)[:, 0], labels.float())
    trained = recover(model, batches(), 20, lr=0.02)
    assert F.binary_cross_entropy_with_logits(trained(IMAGES)[:, 0], labels.float()) < before


@pytest.mark.parametrize("form", ["floats", "column", "column of floats"])
def test_labels_in_the_forms_of_binary_loaders(form):
    model = network()
    change = {
        "floats": lambda y: y.float(),
        "column": lambda y: y[:, None],
        "column of floats": lambda y: y[:, None].float(),
    }[form]
    loader = [(images, change(labels)) for images, labels in batches()]
    found = InfluentialFeatures(model).attribute(loader)
    assert torch.equal(found.scores, InfluentialFeatures(model).attribute(batches()).scores)


def test_the_exported_network_has_one_logit(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    small = decompose(network(), InfluentialFeatures(network()).attribute(batches()), 3, backend="gather")
    export_onnx(small, IMAGES, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (answer,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), small(IMAGES), rtol=1e-4, atol=1e-5)


TAILS = {
    "logit": lambda z: z,
    "(N,)": lambda z: z[:, 0],
    "sigmoid": torch.sigmoid,
    "(N,) sigmoid": lambda z: z[:, 0].sigmoid(),
}


class Ends(nn.Module):
    def __init__(self, tail):
        super().__init__()
        self.net, self.tail = network(), TAILS[tail]

    def forward(self, images):
        return self.tail(self.net(images))


@pytest.mark.parametrize("tail", TAILS)
def test_losses_and_decisions_are_of_the_logit_whatever_ends_the_network(tail):
    model, plain = Ends(tail).eval(), network()
    positive = int(sum((plain(images) > 0).sum() for images, _ in batches()))
    counts = [len(LABELS) - positive, positive]
    filters = InfluentialFeatures(model).attribute(batches(), label_source="prediction")
    assert filters.counts.tolist() == counts
    images_alone = [images for images, _ in batches()]
    table = aggregate(LayerGradientXActivation(model, model.net[3]), images_alone, label_source="prediction")
    assert table.counts.tolist() == counts
    paths = PathDecoupler(model, ["net.0"], num_classes=2).paths(batches())
    assert paths.predictions.bincount(minlength=2).tolist() == counts
    attack = attacks.LocalSearch(model, rounds=3).perturb(IMAGES[:2], (plain(IMAGES[:2])[:, 0] > 0).long())
    assert attack.shape == IMAGES[:2].shape
    for name, value in recover(model, batches(), 1, lr=0.1).net.state_dict().items():
        torch.testing.assert_close(value, recover(plain, batches(), 1, lr=0.1).state_dict()[name])
