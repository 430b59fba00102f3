"""`compare`: its columns against the metrics they come from, and against loops."""

import copy

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from shared import seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import ALDSplitter, ClassFiltersError, InfluentialFeatures, LabelSensitiveGate, metrics
from captum_classfilters.comparison import compare, method_overlap
from captum_classfilters.comparison.compare import _chosen, _hoyer, _run, _size
from captum_classfilters.core.errors import UnseenClassWarning
from captum_classfilters.core.head import find_head

NAMES = ("ant", "bee", "cat", "dog")


def batches_of(count, seed, size=10):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 3, 8, 8, generator=generator), torch.randint(4, (count,), generator=generator)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, count, size)], x, y


@pytest.fixture(scope="module")
def network():
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    )  # fmt: skip
    model = seeded(model, 3).eval()
    with torch.no_grad():
        # features of an average are much alike: what differs must count
        model[4].weight *= 20
        model[4].bias.zero_()
    return model


@pytest.fixture(scope="module")
def case(network):
    loader, *_ = batches_of(60, 0)
    judge, x, y = batches_of(50, 1)
    gate = LabelSensitiveGate(4, 12, generator=torch.Generator().manual_seed(0))
    gate.counts.fill_(15)
    attributions = {"gradient x activation": LayerGradientXActivation(network, network[1])}
    frame = compare(
        network, loader, judge, [1, 4], gate=gate, attributions=attributions, class_names=NAMES, draws=6
    )  # fmt: skip
    return frame, loader, judge, x, y, gate


def test_there_is_a_row_for_each_method_and_k(case):
    frame, *_ = case
    expected = ["ALDSplitter", *(f"InfluentialFeatures, {s}" for s in ("histogram", "mean_activation", "contribution"))]
    expected += [
        "InfluentialFeatures, margin",
        "InfluentialFeatures, weight",
        "LabelSensitiveGate",
        "gradient x activation",
    ]
    assert list(frame.method.unique()) == expected
    assert (frame.groupby("method").k.unique().map(list) == [[1, 4]] * 8).all()
    assert not frame.drop(columns="stability").isna().any(axis=None)


def test_keep_is_the_accuracy_curve_s(case, network):
    frame, loader, judge, *_ = case
    tables = {
        "InfluentialFeatures, margin": InfluentialFeatures(network).attribute(loader, selector="margin"),
        "ALDSplitter": ALDSplitter(network).class_filters(min_size=12),
    }
    curve = metrics.accuracy_curve(network, tables, judge, [1, 4], draws=6)
    curve = curve[curve.class_name == "all"].set_index(["filters", "k"])
    for name in tables:
        for k in (1, 4):
            row = frame[(frame.method == name) & (frame.k == k)].iloc[0]
            assert row.keep == curve.accuracy[name, k]
            assert (row.keep_low, row.keep_high) == (curve.low[name, k], curve.high[name, k])
            assert row.keep_random == curve.accuracy["random", k]
            assert row.dense == curve.accuracy["dense", 12]


def test_drop_agrees_with_a_loop(case, network):
    frame, loader, _, x, y, _ = case
    table = InfluentialFeatures(network).attribute(loader, selector="contribution")
    with torch.no_grad():
        features = network[:4](x)
        for k in (1, 4):
            mask = table.mask(k)
            own = network[4](features * ~mask[y]).argmax(1) == y
            row = frame[(frame.method == "InfluentialFeatures, contribution") & (frame.k == k)].iloc[0]
            assert row.drop_own == pytest.approx(own.double().mean().item())
            others = [(network[4](features * ~mask[(y + step) % 4]).argmax(1) == y).double() for step in (1, 2, 3)]
            low, high = torch.stack(others).min(0).values.mean(), torch.stack(others).max(0).values.mean()
            assert low <= row.drop_other <= high
            assert (row.drop_own_low, row.drop_own_high) == pytest.approx(metrics.wilson(own.sum(), 50))
            assert row.samples == 50


def test_sets_are_compared_as_their_own_metrics_do(case, network):
    frame, loader, *_, gate = case
    row = frame[(frame.method == "LabelSensitiveGate") & (frame.k == 4)].iloc[0]
    pairs = metrics.overlap(gate.class_filters(), 4)
    assert row.class_overlap == pytest.approx(pairs.jaccard.mean())
    assert row.overlap_random == pytest.approx(pairs.random[0])
    assert np.isnan(row.stability)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(len(y), generator=generator) < 0.5 for _, y in loader]
    parts = [[(x[m ^ i], y[m ^ i]) for (x, y), m in zip(loader, drawn, strict=True)] for i in (False, True)]
    halves = [InfluentialFeatures(network).attribute(part).mask(4) for part in parts]
    shared = (halves[0] & halves[1]).sum(1).double()
    histogram = frame[(frame.method == "InfluentialFeatures, histogram") & (frame.k == 4)].iloc[0]
    assert histogram.stability == pytest.approx((shared / (8 - shared)).mean().item())


def test_agreement_is_the_mean_of_the_overlaps_with_others(network):
    loader, *_ = batches_of(40, 2)
    tables = InfluentialFeatures(network).attribute(loader, selector=["histogram", "margin", "weight"])
    frame = method_overlap(tables, 3)
    assert len(frame) == 3
    first = frame[(frame.method_a == "histogram") & (frame.method_b == "margin")].iloc[0]
    a, b = tables["histogram"].mask(3), tables["margin"].mask(3)
    each = [
        len({*i.nonzero().flatten().tolist()} & {*j.nonzero().flatten().tolist()}) for i, j in zip(a, b, strict=True)
    ]
    assert first.jaccard == pytest.approx(np.mean([n / (6 - n) for n in each]))
    assert frame.random.iloc[0] == metrics.overlap(tables["margin"], 3).random[0]


def test_sparsity_is_hoyer_s(network):
    loader, *_ = batches_of(40, 2)
    table = InfluentialFeatures(network).attribute(loader)
    each = []
    for row in table.scores.numpy():
        each.append((np.sqrt(12) - np.abs(row).sum() / np.sqrt((row**2).sum())) / (np.sqrt(12) - 1))
    assert _hoyer(table) == pytest.approx(np.mean(each))


def test_weights_count_every_sample_and_have_no_stability(case, network):
    frame, loader, *_ = case
    rows = frame[frame.method == "InfluentialFeatures, weight"]
    assert rows.stability.isna().all()
    found = _run(
        lambda part: InfluentialFeatures(network).attribute(part, selector="weight"), loader, find_head(network, "4")
    )
    assert int(found.filters.counts.sum()) == 60
    assert found.halves is None


def test_the_halves_are_of_samples_whatever_the_order(network):
    """A loader that shuffles, or that is sorted by class, has the stability of any other."""
    _, x, y = batches_of(80, 4)
    order = y.argsort()
    by_class = [(x[order][y[order] == c], y[order][y[order] == c]) for c in range(4)]
    shuffled = DataLoader(
        TensorDataset(x, y), batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(0)
    )  # fmt: skip
    for loader in (by_class, shuffled):
        method = InfluentialFeatures(network).attribute
        found = _run(method, loader, find_head(network, "4"))
        assert int(found.filters.counts.sum()) == 80
        first, second = found.halves
        assert torch.equal(first.counts + second.counts, y.bincount(minlength=4))
        assert (second.scores >= 0).all()
        assert first.seen.all()
        assert second.seen.all()


def test_half_of_a_batch_of_any_kind():
    x, y, own = torch.arange(5), [0, 1, 2, 3, 4], torch.tensor([True, False, True, False, False])
    images, labels = _chosen([x, y], own, 5)
    assert (images.tolist(), labels) == ([0, 2], [0, 2])
    found = _chosen({"image": (x, x.numpy()), "label": y, "name": "a set", "size": torch.tensor(3)}, own, 5)
    assert [part.tolist() for part in found["image"]] == [[0, 2], [0, 2]]
    assert (found["label"], found["name"], int(found["size"])) == ([0, 2], "a set", 3)
    assert [_size(raw) for raw in (x, [x, y], {"name": "a", "image": (x, x)}, [])] == [5, 5, 5, 0]


def test_classes_in_turn_are_in_both_halves(network):
    _, x, _ = batches_of(80, 6)
    turns = [(x[i : i + 8], torch.arange(8) % 4) for i in range(0, 80, 8)]
    first, second = _run(InfluentialFeatures(network).attribute, turns, find_head(network, "4")).halves
    assert (first.counts > 4).all()
    assert (second.counts > 4).all()


def test_a_class_in_one_half_only_does_not_count(network):
    (images, _), *_ = batches_of(10, 5)[0]
    once = [(images[:7], torch.tensor([0, 0, 0, 1, 1, 1, 2]))]
    with pytest.warns(UnseenClassWarning):
        frame = compare(network, once, once, [12])
    # all channels: the same set in both halves
    assert (frame.stability.dropna() == 1).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ks": [0]}, r"\[1, 12\]"),
        ({"ks": [13]}, r"\[1, 12\]"),
        ({"ks": [2.7]}, r"\[1, 12\]"),
        ({"ks": 5}, "ks must be a list"),
        ({"attributions": []}, "by name"),
        ({"draws": 2}, "at least 5"),
    ],
)
def test_numbers_out_of_range_are_refused(network, change, words):
    loader, *_ = batches_of(20, 5)
    with pytest.raises(ClassFiltersError, match=words):
        compare(network, loader, loader, **{"ks": [1], **change})


def test_iterators_names_and_layers_that_do_not_fit_are_refused(network):
    loader, *_ = batches_of(20, 5)
    with pytest.raises(ClassFiltersError, match="no iterator"):
        compare(network, iter(loader), loader, [1])
    with pytest.raises(ClassFiltersError, match="is taken"):
        compare(
            network, loader, loader, [1], attributions={"ALDSplitter": LayerGradientXActivation(network, network[1])}
        )
    narrow = nn.Sequential(nn.Conv2d(3, 7, 1), nn.Conv2d(7, 3, 1), network).eval()
    with pytest.raises(ClassFiltersError, match="not the 12 that the head"):
        compare(narrow, loader, loader, [1], attributions={"early": LayerIntegratedGradients(narrow, narrow[0])})
    other = seeded(copy.deepcopy(network), 5)
    with pytest.raises(ClassFiltersError, match="another network"):
        compare(network, loader, loader, [1], attributions={"x": LayerGradientXActivation(other, other[1])})
