"""Density, similarity and clusters against plain loops and scikit-learn, and where the answer is known by hand."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import nn

from captum_classfilters import ClassFilters, InfluentialFeatures, metrics
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.gating.gate import LabelSensitiveGate
from captum_classfilters.gating.measures import GroupMoments, as_gate, match

NAMES = ("coat", "bag", "boot", "dress")


def table(scores, method="gate"):
    scores = torch.as_tensor(scores, dtype=torch.float64)
    names = NAMES[: len(scores)]
    return ClassFilters(scores, scores.clone(), torch.ones(len(scores), dtype=torch.int64), method, "1", names)


def in_batches(data, size):
    return list(zip(*(torch.split(part, size) for part in data), strict=True))


def of(frame, **wanted):
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


# -- density -----------------------------------------------------------------------------------------------------------


def test_density_of_a_gate_is_its_own():
    gate = LabelSensitiveGate(4, 9, generator=torch.Generator().manual_seed(0))
    frame = metrics.density(gate.class_filters(NAMES))
    weight = gate.weight.detach().double().numpy()
    found = of(frame, filters="gate", class_name="all")
    assert found.density == pytest.approx(gate.density)
    columns = weight.mean(0)
    assert found.high == pytest.approx(found.density + 2.306004135 * columns.std(ddof=1) / 3)
    for c, name in enumerate(NAMES):
        row = of(frame, filters="gate", class_name=name)
        assert row.density == pytest.approx(weight[c].mean())
        alone = [k for k in range(9) if weight[c, k] > 0.5 and (weight[:, k] > 0.5).sum() == 1]
        together = [k for k in range(9) if weight[c, k] > 0.5 and (weight[:, k] > 0.5).sum() > 1]
        assert (row.exclusive, row.shared, row.channels) == (len(alone), len(together), 9)
        assert row.low < row.density < row.high


def test_density_of_a_fixed_gate_and_of_any_table():
    fixed = LabelSensitiveGate.fixed(4, 11, exclusive=2).class_filters(NAMES)
    scaled = replace(fixed, scores=fixed.scores * torch.arange(1, 12) - (fixed.scores == 0).double(), method="other")
    frame = metrics.density({"fixed": fixed, "scaled": scaled})
    for name in ("fixed", "scaled"):
        found = of(frame, filters=name, class_name="all")
        assert found.density == pytest.approx((8 * 1 + 3 * 4) / 44)
        assert (found.exclusive, found.shared) == (8, 3)
        bag = of(frame, filters=name, class_name="bag")
        assert (bag.exclusive, bag.shared, bag.density) == (2, 3, pytest.approx(5 / 11))


def test_the_control_of_density_is_noise_over_its_largest():
    gate = LabelSensitiveGate(4, 9).class_filters(NAMES)
    frame = metrics.density(gate, control=Control(400))
    found = of(frame, filters="random", class_name="all")
    # of uniform noise over the largest of C: one is 1, the others are uniform
    assert found.density == pytest.approx((1 + 3 / 2) / 4, abs=0.01)
    assert found.low < 0.625 < found.high
    # above .5 are the largest and, each with probability 1/2, the others
    assert found.exclusive == pytest.approx(9 / 8, abs=0.2)
    assert found.exclusive + found.shared == 9
    classes = frame[(frame.filters == "random") & (frame.class_name != "all")]
    assert classes.density.mean() == pytest.approx(found.density)
    assert classes.exclusive.sum() == pytest.approx(found.exclusive)


def test_tables_with_nothing_above_zero():
    assert as_gate(torch.tensor([[-1.0, 2.0], [0.0, -4.0]])).tolist() == [[0, 1], [0, 0]]
    dead = metrics.density(table([[-1.0, 2.0, 1.0], [0.0, -4.0, 1.0]]))
    found = of(dead, filters="gate", class_name="all")
    assert (found.density, found.exclusive, found.shared) == (0.5, 1, 1)


def test_density_refuses_what_it_cannot_use():
    gate = LabelSensitiveGate(4, 9).class_filters(NAMES)
    with pytest.raises(OptionError, match=r"threshold must lie in \[0, 1\)"):
        metrics.density(gate, threshold=1.0)
    other = LabelSensitiveGate(4, 8).class_filters(NAMES)
    with pytest.raises(ShapeError, match=r"'a': \(4, 9\), 'b': \(4, 8\)"):
        metrics.density({"a": gate, "b": other})


# -- similarity --------------------------------------------------------------------------------------------------------


@pytest.fixture
def task():
    """A network whose features are its inputs, a gate's table, and 60 samples of which some are taken for others."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(7, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.rand(60, 7, generator=generator)
    with torch.no_grad():
        y = torch.where(torch.arange(60) % 3 > 0, model(x).argmax(1), torch.arange(60) % 4)
    gate = LabelSensitiveGate(4, 7, generator=generator)
    gate.layer = "1"
    return model, gate.class_filters(NAMES), (x, y)


@pytest.mark.parametrize("size", [60, 7])
def test_similarity_is_the_mean_product_over_images_recognised_and_not(task, size):
    model, filters, (x, y) = task
    frame = metrics.gate_similarity(model, filters, in_batches((x, y), size), control=Control(6))
    assert frame.control.tolist() == [False] * 32 + [True] * 32
    right = model(x).argmax(1) == y
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(7, generator=generator) for _ in range(6)]
    several = 0
    for outcome, chosen in (("TP", right), ("FN", ~right)):
        for a, name in enumerate(NAMES):
            features = x[chosen & (y == a)].double()
            for c, row in enumerate(NAMES):
                found, control = (
                    of(frame, outcome=outcome, class_name=name, gate_row=row, control=is_control)
                    for is_control in (False, True)
                )
                assert found.samples == control.samples == len(features)
                if not len(features):
                    assert np.isnan([found.similarity, found.low, found.high, control.similarity]).all()
                    continue
                products = [float(image @ filters.scores[c]) for image in features]
                assert found.similarity == pytest.approx(np.mean(products))
                chance = [np.mean([float(image @ filters.scores[c][order]) for image in features]) for order in orders]
                mean, low, high = metrics.mean_interval(np.array(chance) / 100)
                assert (control.similarity, control.low, control.high) == pytest.approx(
                    (100 * mean, 100 * low, 100 * high)
                )
                if len(features) > 1:
                    half = 1.96 * np.std(products, ddof=1) / len(products) ** 0.5
                    assert (found.low, found.high) == pytest.approx(
                        (np.mean(products) - half, np.mean(products) + half)
                    )
                    several += 1
    assert several > 16


def test_group_moments_survive_large_means_and_empty_groups():
    generator = np.random.default_rng(0)
    values, groups = generator.normal(size=(50, 3)) + 1e8, generator.integers(3, size=50)
    moments = GroupMoments(4)
    for part, of_part in zip(torch.from_numpy(values).split(7), torch.from_numpy(groups).split(7), strict=True):
        moments.add(part, of_part)
    for group in range(3):
        of_group = values[groups == group]
        np.testing.assert_allclose(moments.mean[group], of_group.mean(0), rtol=1e-15)
        np.testing.assert_allclose(moments.error()[group], of_group.std(0, ddof=1) / len(of_group) ** 0.5, rtol=1e-6)
    assert moments.mean[3].isnan().all()
    assert moments.error()[3].isnan().all()


def test_tensor_parts_stay_on_the_device(device, assert_close):
    moments = GroupMoments(2)
    with device.mode:
        values = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(device.name)
        groups = (torch.arange(9) % 2).to(device.name)
        moments.add(values[:4], groups[:4])
        moments.add(values[4:], groups[4:])
        expected = torch.stack([values[0::2].double().mean(0), values[1::2].double().mean(0)])
        assert_close(moments.mean, expected)
        assert_close(moments.error()[1], values[1::2].double().std(0) / 2)
        assert_close(as_gate(values), values.double().clamp(min=0) / values.double().amax(0))


# -- clusters ----------------------------------------------------------------------------------------------------------


def blobs():
    """Features that lie along the rows of a fixed gate, 15 of each class."""
    gate = LabelSensitiveGate.fixed(4, 9, exclusive=2)
    gate.layer = "1"
    y = torch.arange(4).repeat(15)
    noise = torch.randn(60, 9, generator=torch.Generator().manual_seed(0))
    x = gate.weight.detach()[y] + 0.01 * noise
    return nn.Sequential(nn.Identity(), nn.Linear(9, 4)), gate.class_filters(NAMES), (x, y)


def test_clusters_of_features_along_the_gate_are_the_classes():
    model, filters, (x, y) = blobs()
    frame = metrics.feature_clusters(model, filters, in_batches((x, y), 7), n_init=2)
    found, control = (of(frame, cluster="all", control=is_control) for is_control in (False, True))
    assert found.cosine > 0.999
    assert (found.purity, found.ami, found.samples) == (1, 1, 60)
    assert control.cosine < 0.9
    assert control.cosine_low < control.cosine < control.cosine_high
    assert 0.25 < control.purity < 0.5
    assert frame[frame.control].filter(like="channel").isna().all(axis=None)
    for c, name in enumerate(NAMES):
        row = of(frame, class_name=name, control=False)
        assert (row.samples, row.purity) == (15, 1)
        assert (row.low, row.high) == pytest.approx(tuple(map(float, metrics.wilson(15, 15))))
        centre = row[[f"channel {k}" for k in range(9)]].to_numpy(float)
        np.testing.assert_allclose(centre, x[y == c].mean(0), atol=1e-5)
        assert row.cosine == pytest.approx(centre @ filters.scores[c].numpy() / np.linalg.norm(centre) / 3**0.5)
    again = metrics.feature_clusters(model, filters, [(x, y)], n_init=2)
    pd.testing.assert_frame_equal(frame, again)


def test_scores_of_clusters_that_are_not_the_classes():
    model, filters, (x, y) = blobs()
    mixed = torch.where(torch.arange(60) < 30, y, y.flip(0))
    frame = metrics.feature_clusters(model, filters, [(x, mixed)], n_init=2)
    # the clusters are y
    counts = np.array([[int(((y == a) & (mixed == b)).sum()) for b in range(4)] for a in range(4)])
    found = of(frame, cluster="all", control=False)
    assert found.purity == pytest.approx(counts.max(1).sum() / 60)
    assert 0.5 <= found.purity < 1
    assert found.ami == pytest.approx(adjusted_mutual_info_score(mixed, y))
    assert found.ami != pytest.approx(normalized_mutual_info_score(mixed, y))
    np.testing.assert_allclose([of(frame, class_name=name, control=False).purity for name in NAMES], counts.max(1) / 15)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_match_is_the_best_of_all(seed):
    generator = np.random.default_rng(seed)
    centres, gate = generator.random((2, 5, 6))
    gate[4] = 0
    cosines = [[(a @ b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30) for b in gate] for a in centres]
    sums = {order: sum(cosines[a][b] for a, b in enumerate(order)) for order in permutations(range(5))}
    rows, found = match(centres, gate)
    assert found.sum() == pytest.approx(max(sums.values()))
    np.testing.assert_allclose(found, [cosines[a][b] for a, b in enumerate(rows)], atol=1e-12)


def test_gates_metrics_refuse_what_they_cannot_use(task):
    model, filters, (x, y) = task
    with pytest.raises(OptionError, match="filters must be a ClassFilters"):
        metrics.gate_similarity(model, {"gate": filters}, [(x, y)])
    with pytest.raises(OptionError, match="n_init must be an integer of at least 1; got 0"):
        metrics.feature_clusters(model, filters, [(x, y)], n_init=0)
    with pytest.raises(OptionError, match="4 clusters need at least as many samples, got 3"):
        metrics.feature_clusters(model, filters, [(x[:3], y[:3])])
    other = replace(filters, layer="fc")
    for metric in (metrics.gate_similarity, metrics.feature_clusters):
        with pytest.raises(ShapeError, match="of layer 'fc', the head '1'"):
            metric(model, other, [(x, y)])


def test_a_head_pass_stands_for_model_and_loader(task):
    model, filters, (x, y) = task
    shared = HeadPass(model, in_batches((x, y), 7)).cached()
    for metric in (metrics.gate_similarity, metrics.feature_clusters, metrics.gate_leakage):
        frame = metric(model, filters, in_batches((x, y), 7))
        pd.testing.assert_frame_equal(metric(shared, filters), frame)
        with pytest.raises(OptionError, match="a HeadPass has its own loader"):
            metric(shared, filters, [(x, y)])


def test_other_tables_are_read_as_gates(task):
    model, _, (x, y) = task
    filters = InfluentialFeatures(model).attribute([(x, y)], selector="weight", class_names=NAMES)
    filters = replace(filters, scores=filters.scores - 0.5)
    gate = replace(filters, scores=as_gate(filters.scores))
    assert (filters.scores < 0).any()
    found, expected = (metrics.gate_similarity(model, one, [(x, y)]) for one in (filters, gate))
    pd.testing.assert_frame_equal(found, expected)
