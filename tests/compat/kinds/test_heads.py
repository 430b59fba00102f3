"""Heads that are no single plain linear layer: served with their effective weights, or refused with the reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_classfilters import (
    ALDSplitter,
    HeadMoments,
    HeadPass,
    InfluentialFeatures,
    LabelSensitiveGate,
    LabelSensitiveTraining,
    decompose,
    explain_confusion,
    metrics,
)
from captum_classfilters.core.errors import HeadError


def trunk(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(2)]


IMAGES = batches()[0][0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.fc, self.second = trunk(), nn.Linear(8, 4), nn.Linear(8, 4)

    def head(self, features):
        return self.fc(features)

    def forward(self, images):
        return self.head(self.trunk(images))


class Temperature(Net):
    def head(self, features):
        return self.fc(features) / 2.5


class Averaged(Net):
    def head(self, features):
        return (self.fc(features) + self.second(features)) / 2


class Summed(Net):
    def head(self, features):
        return self.fc(features) + self.second(features)


class Weighted(Net):
    def head(self, features):
        return 0.7 * self.fc(features) + 0.3 * self.second(features)


class Adjusted(Net):
    """Logits less the logarithms of the classes' frequencies."""

    def head(self, features):
        return self.fc(features) - torch.tensor([0.1, 0.2, 0.3, 0.4]).log()


class Dropouts(Net):
    """The mean over several dropouts, which are one in evaluation."""

    def head(self, features):
        return torch.stack([self.fc(F.dropout(features, 0.5, self.training)) for _ in range(3)]).mean(0)


class NormedRows(nn.Module):
    """A head with a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(4, 8))

    def forward(self, features):
        return 2 * F.linear(features, F.normalize(self.rows))


class OwnMatrix(Net):
    def __init__(self):
        super().__init__()
        self.fc = NormedRows()


class ScaledWeights(nn.Linear):
    """A subclass with its own forward that is linear all the same."""

    def forward(self, features):
        return F.linear(features, 3 * self.weight, self.bias) + 0.5


class Subclass(Net):
    def __init__(self):
        super().__init__()
        self.fc = ScaledWeights(8, 4)


class WeightNorm(Net):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.fc)


class Softmax(Net):
    def forward(self, images):
        return super().forward(images).softmax(1)


class LogSoftmax(Net):
    def forward(self, images):
        return super().forward(images).log_softmax(1)


def lora():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["fc"], r=2, init_lora_weights=False))
    model.head_of = model.base_model.model.fc
    return model


# each with its weights and bias by hand
KINDS = {
    "temperature": (Temperature, lambda m: (m.fc.weight / 2.5, m.fc.bias / 2.5)),
    "averaged": (Averaged, lambda m: ((m.fc.weight + m.second.weight) / 2, (m.fc.bias + m.second.bias) / 2)),
    "weighted": (
        Weighted,
        lambda m: (0.7 * m.fc.weight + 0.3 * m.second.weight, 0.7 * m.fc.bias + 0.3 * m.second.bias),
    ),
    "adjusted": (Adjusted, lambda m: (m.fc.weight, m.fc.bias - torch.tensor([0.1, 0.2, 0.3, 0.4]).log())),
    "dropouts": (Dropouts, lambda m: (m.fc.weight, m.fc.bias)),
    "own matrix": (OwnMatrix, lambda m: (2 * F.normalize(m.fc.rows), torch.zeros(4))),
    "summed": (Summed, lambda m: (m.fc.weight + m.second.weight, m.fc.bias + m.second.bias)),
    "subclass": (Subclass, lambda m: (3 * m.fc.weight, m.fc.bias + 0.5)),
    "weight norm": (WeightNorm, lambda m: (m.fc.weight, m.fc.bias)),
    "softmax": (Softmax, lambda m: (m.fc.weight, m.fc.bias)),
    "log-softmax": (LogSoftmax, lambda m: (m.fc.weight, m.fc.bias)),
    "LoRA": (
        lora,
        lambda m: (
            m.head_of.base_layer.weight
            + m.head_of.scaling["default"] * m.head_of.lora_B["default"].weight @ m.head_of.lora_A["default"].weight,
            m.head_of.base_layer.bias,
        ),
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    make, by_hand = KINDS[request.param]
    model = make().eval()
    with torch.no_grad():
        weight, bias = (value.detach().clone() for value in by_hand(model))
        net = model.base_model.model if request.param == "LoRA" else model
        features = torch.cat([net.trunk(images) for images, _ in batches()])
    return model, features, weight, bias


def labels():
    return torch.cat([labels for _, labels in batches()])


def test_the_head_is_the_effective_one(kind):
    model, features, weight, bias = kind
    head_pass = HeadPass(model, batches())
    torch.testing.assert_close(head_pass.head.weight, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head_pass.head.bias, bias, rtol=1e-4, atol=1e-5)
    with head_pass.batches() as stream:
        parts = [(batch.features, batch.logits) for batch in stream]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), features)
    torch.testing.assert_close(
        torch.cat([part[1] for part in parts]), F.linear(features, weight, bias), rtol=1e-4, atol=1e-5
    )


def test_tables_and_curves(kind):
    model, features, weight, bias = kind
    filters = InfluentialFeatures(model).attribute(batches(), selector="contribution")
    sums = torch.stack([features[labels() == label].sum(0) for label in range(4)])
    torch.testing.assert_close(filters.scores.float(), sums * weight, rtol=1e-4, atol=1e-5)
    curve = metrics.accuracy_curve(model, filters, batches(), ks=[2])
    kept = F.linear(features, weight * filters.mask(2), bias).argmax(1)
    row = curve.query("filters == 'contribution' and class_name == 'all'")
    assert row.accuracy.item() == pytest.approx(float((kept == labels()).float().mean()))


@pytest.mark.parametrize("refit", [None, "least_squares", "omp"])
def test_the_smaller_network_answers_as_the_formula_does(kind, refit):
    model, features, weight, bias = kind
    filters = InfluentialFeatures(model).attribute(batches(), selector="contribution")
    moments = HeadMoments.collect(model, batches()) if refit else None
    small = decompose(model, None if refit == "omp" else filters, 8, refit=refit, moments=moments)
    torch.testing.assert_close(small(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-4)
    if refit is None:
        few = decompose(model, filters, 2)
        expected = F.linear(features[:8], weight * filters.mask(2), bias)
        if isinstance(model, Softmax | LogSoftmax):
            expected = expected.softmax(1) if isinstance(model, Softmax) else expected.log_softmax(1)
        torch.testing.assert_close(few(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_confusion_splitter_and_maps(kind):
    model, features, weight, bias = kind
    logits = F.linear(features[:8], weight, bias)
    won, lost = logits.argmax(1), logits.argmin(1)
    confusion = explain_confusion(model, IMAGES, lost)
    expected = (logits.gather(1, won[:, None]) - logits.gather(1, lost[:, None]))[:, 0]
    torch.testing.assert_close(confusion.difference.float(), expected, rtol=1e-4, atol=1e-5)
    total = confusion.table.groupby("sample").contribution.sum().to_numpy(copy=True)
    torch.testing.assert_close(torch.from_numpy(total), confusion.difference)
    name = HeadPass(model, batches()).head.name
    splits = ALDSplitter(model, name).splits(min_size=2)
    assert splits.weights.shape == (4, 8)
    seen = InfluentialFeatures(model).explain(IMAGES, 1, InfluentialFeatures(model).attribute(batches()), k=8)
    torch.testing.assert_close(seen.mean((1, 2, 3)), features[:8] @ weight[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["alternating", "joint"])
@pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.IdleChannelWarning")
def test_a_gate_before_averaged_heads_gates_both(scheme):
    from captum_classfilters import GateSchedule

    model = Averaged().eval()
    gate = LabelSensitiveGate(4, 8, generator=torch.Generator().manual_seed(0))
    gate.is_noise = False
    training = LabelSensitiveTraining(model, gate, schedule=GateSchedule(scheme=scheme))
    images, targets = batches()[0]
    # epoch 1, step 0: the other class is two further
    gated, alone, other = (
        model.head(model.trunk(images) * rows)
        for rows in (gate.weight[targets], 1 - gate.weight[targets], 1 - gate.weight[(targets + 1 + 1_000_003 % 3) % 4])
    )
    lost = -(1 - alone.softmax(1).gather(1, targets[:, None])).log().mean()
    ablated = lost + F.cross_entropy(other, targets)
    expected = F.cross_entropy(gated, targets) + ablated + training._penalty()
    if scheme == "joint":
        expected = expected + F.cross_entropy(model(images), targets)
    torch.testing.assert_close(training.loss(images, targets, 1), expected)


def test_effective_weights_follow_the_active_adapter():
    model = lora().eval()
    before = HeadPass(model, batches()).head.weight.clone()
    with model.disable_adapter():
        head = HeadPass(model, batches()).head
        torch.testing.assert_close(head.weight, model.head_of.base_layer.weight.detach())
    assert not torch.allclose(before, head.weight, atol=1e-3)


def test_heads_that_read_different_features_are_refused_by_name():
    class Flipped(Net):
        def forward(self, images):
            return (self.fc(self.trunk(images)) + self.second(self.trunk(images.flip(1)))) / 2

    for call in (lambda m: HeadPass(m, batches()).head, ALDSplitter):
        with pytest.raises(HeadError, match=r"averages .*fc.*, which read different features"):
            call(Flipped().eval())
