"""`compare`: its columns against the metrics they come from, and against loops."""

import copy
import warnings

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from shared import seeded
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import (
    ALDSplitter,
    ClassFilters,
    ClassFiltersError,
    HeadPass,
    InfluentialFeatures,
    LabelSensitiveGate,
    metrics,
)
from captum_classfilters.comparison import aggregate, compare, method_overlap
from captum_classfilters.comparison.compare import _hoyer
from captum_classfilters.comparison.methods import Half, run_attribution, run_selectors
from captum_classfilters.core.control import Control
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
    head_pass = HeadPass(network, loader, class_names=NAMES)
    frame = compare(
        head_pass, test_loader=judge, ks=[1, 4], gate=gate, attributions=attributions, control=Control(6)
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
        "random",
    ]
    assert list(frame.method.unique()) == expected
    assert (frame.groupby("method").k.unique().map(list) == [[1, 4]] * 9).all()
    assert (frame.control == (frame.method == "random")).all()
    assert not frame.drop(columns=["stability", "sparsity", "passes"]).isna().any(axis=None)
    # chance reads no samples and has no scores; its sets are as stable as two random ones
    chance, others = frame[frame.control], frame[~frame.control]
    assert chance[["sparsity", "passes"]].isna().all(axis=None)
    assert not others[["sparsity", "passes"]].isna().any(axis=None)
    assert (chance.stability == chance.class_overlap).all()
    assert (chance.agreement == chance.class_overlap).all()


def test_keep_is_the_accuracy_curve_s(case, network):
    frame, loader, judge, *_ = case
    tables = {
        "InfluentialFeatures, margin": InfluentialFeatures(network).attribute(loader, selector="margin"),
        "ALDSplitter": ALDSplitter(network).class_filters(min_size=12),
    }
    curve = metrics.accuracy_curve(network, tables, judge, [1, 4], control=Control(6))
    curve = curve[curve.class_name == "all"].set_index(["filters", "k"])
    for name in (*tables, "random"):
        for k in (1, 4):
            row = frame[(frame.method == name) & (frame.k == k)].iloc[0]
            assert row.keep == curve.accuracy[name, k]
            assert (row.keep_low, row.keep_high) == (curve.low[name, k], curve.high[name, k])
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
    chance = frame[frame.control & (frame.k == 4)].iloc[0]
    row = frame[(frame.method == "LabelSensitiveGate") & (frame.k == 4)].iloc[0]
    pairs = metrics.overlap(gate.class_filters(), 4)
    assert row.class_overlap == pytest.approx(pairs.jaccard[~pairs.control].mean())
    assert chance.class_overlap == pytest.approx(pairs.jaccard[pairs.control].item())
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
    assert list(frame.control) == [False, False, False, True]
    first = frame[(frame.method_a == "histogram") & (frame.method_b == "margin")].iloc[0]
    a, b = tables["histogram"].mask(3), tables["margin"].mask(3)
    each = [
        len({*i.nonzero().flatten().tolist()} & {*j.nonzero().flatten().tolist()}) for i, j in zip(a, b, strict=True)
    ]
    assert first.jaccard == pytest.approx(np.mean([n / (6 - n) for n in each]))
    pairs = metrics.overlap(tables["margin"], 3)
    columns = ["jaccard", "low", "high"]
    assert frame[frame.control][columns].to_numpy().tolist() == pairs[pairs.control][columns].to_numpy().tolist()


def test_sparsity_is_hoyer_s(network):
    loader, *_ = batches_of(40, 2)
    table = InfluentialFeatures(network).attribute(loader)
    each = []
    for row in table.scores.numpy():
        each.append((np.sqrt(12) - np.abs(row).sum() / np.sqrt((row**2).sum())) / (np.sqrt(12) - 1))
    assert _hoyer(table) == pytest.approx(np.mean(each))


def answers_of(network, loader):
    """What every method that reads samples answers: the selectors, and an attribution."""
    answers, _ = run_selectors(HeadPass(network, loader), NAMES)
    attribution = LayerGradientXActivation(network, network[1])
    answers["attribution"] = run_attribution(attribution, find_head(network, "4"), loader, NAMES)
    return {name.removeprefix("InfluentialFeatures, "): answer for name, answer in answers.items()}


def test_all_selectors_in_one_pass_are_each_in_its_own(network):
    loader, *_ = batches_of(60, 0)
    answers = answers_of(network, loader)
    attribution = answers.pop("attribution").filters
    alone = InfluentialFeatures(network).attribute(loader, selector=list(answers), class_names=NAMES)
    for name, answer in answers.items():
        assert torch.equal(answer.filters.scores, alone[name].scores), name
        assert (answer.filters.method, answer.filters.layer) == (name, "4")
    of_layer = aggregate(LayerGradientXActivation(network, network[1]), loader, classes=NAMES)
    assert torch.equal(attribution.scores, of_layer.scores)
    assert attribution.layer == "4"  # the layer that the head's tables are of


def test_weights_count_every_sample_and_have_no_stability(case, network):
    frame, loader, *_ = case
    rows = frame[frame.method == "InfluentialFeatures, weight"]
    assert rows.stability.isna().all()
    answer = answers_of(network, loader)["weight"]
    assert int(answer.filters.counts.sum()) == 60
    assert answer.halves is None


def test_both_halves_make_the_whole_whatever_the_order(network):
    """A loader that shuffles, or that is sorted by class, has the stability of any other."""
    _, x, y = batches_of(80, 4)
    order = y.argsort()
    by_class = [(x[order][y[order] == c], y[order][y[order] == c]) for c in range(4)]
    shuffled = DataLoader(
        TensorDataset(x, y), batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(0)
    )  # fmt: skip
    for loader in (by_class, shuffled):
        answers = answers_of(network, loader)
        assert torch.equal(answers["histogram"].filters.counts, y.bincount(minlength=4))
        halves = {name: answer.halves for name, answer in answers.items() if answer.halves is not None}
        assert set(answers) - set(halves) == {"weight"}
        for name, (first, second) in halves.items():
            merged = ClassFilters.merge(first, second)
            for what in ("scores", "mass", "counts"):
                torch.testing.assert_close(getattr(merged, what), getattr(answers[name].filters, what), rtol=0, atol=0)
            assert first.seen.all()
            assert second.seen.all()
        assert (halves["histogram"][1].scores >= 0).all()


def test_the_second_half_is_the_table_of_the_samples_that_are_not_in_the_first(network):
    loader, *_ = batches_of(80, 4)
    half = Half()
    drawn = [half.draw(len(y), torch.device("cpu")) for _, y in loader]
    parts = [[(x[m == inside], y[m == inside]) for (x, y), m in zip(loader, drawn, strict=True)] for inside in (1, 0)]
    answers, alone = answers_of(network, loader), [answers_of(network, part) for part in parts]
    for name, answer in answers.items():
        for half_table, other in zip(answer.halves or (), alone, strict=False):
            torch.testing.assert_close(half_table.scores, other[name].filters.scores, rtol=0, atol=1e-5)
            assert torch.equal(half_table.counts, other[name].filters.counts)


def test_a_half_is_drawn_by_place_in_the_loader_and_is_about_a_half():
    draws = [Half().draw(1000, torch.device("cpu")) for _ in range(2)]
    assert torch.equal(*draws)
    assert 450 < int(draws[0].sum()) < 550
    half = Half()
    in_batches = torch.cat([half.draw(size, torch.device("cpu")) for size in (3, 500, 497)])
    assert 450 < int(in_batches.sum()) < 550
    assert not torch.equal(in_batches[:500], in_batches[500:])  # each batch is drawn anew


def test_classes_in_turn_are_in_both_halves(network):
    _, x, _ = batches_of(80, 6)
    turns = [(x[i : i + 8], torch.arange(8) % 4) for i in range(0, 80, 8)]
    for half in answers_of(network, turns)["histogram"].halves:
        assert (half.counts > 4).all()


class Counted(list):
    """Batches that know how often they were read, and how far."""

    passes = 0
    batches = 0

    def __iter__(self):
        self.passes += 1
        for batch in super().__iter__():
            self.batches += 1
            yield batch


@pytest.mark.parametrize("attributions", [0, 1, 2])
def test_loaders_are_read_as_seldom_as_can_be(network, attributions):
    found, judged = Counted(batches_of(40, 2)[0]), Counted(batches_of(40, 3)[0])
    methods = {str(n): LayerGradientXActivation(network, network[1]) for n in range(attributions)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnseenClassWarning)
        compare(network, found, judged, [2], attributions=methods)
    # the first pass, which finds the head, stops after a batch
    assert (found.passes, judged.passes) == (2 + attributions, 1)
    assert (found.batches, judged.batches) == (1 + 4 * (1 + attributions), 4)
    known = HeadPass(network, found)
    assert known.head.num_features == 12
    found.passes = 0
    compare(known, test_loader=judged, ks=[2], attributions=methods)
    assert found.passes == 1 + attributions


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
        ({"ks": []}, "at least one integer"),
        ({"test_loader": None}, "test_loader is missing"),
        ({"loader": iter([])}, "can be read only once"),
    ],
)
def test_what_cannot_be_is_refused(network, change, words):
    loader, *_ = batches_of(20, 5)
    with pytest.raises(ClassFiltersError, match=words):
        compare(network, **{"loader": loader, "test_loader": loader, "ks": [1], **change})


def test_names_and_layers_that_do_not_fit_are_refused(network):
    loader, *_ = batches_of(20, 5)
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
