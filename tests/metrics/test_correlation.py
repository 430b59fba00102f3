"""Correlation of filters against numpy and plain loops, and the filters that classes share."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from captum_classfilters import HeadPass, metrics
from captum_classfilters.assets import load_demo_network, load_images
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import HeadError, LabelError, OptionError
from captum_classfilters.core.intervals import draws_interval
from captum_classfilters.metrics.correlation import CoMoments, normalised_products, pair_interval


def given_features(weight):
    """A network whose head's input is its input, times a matrix that is 1; the head's weights are as given."""
    classes, channels = weight.shape
    model = nn.Sequential(nn.Linear(channels, channels, bias=False), nn.Linear(channels, classes, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(channels))
        model[1].weight.copy_(weight)
    return model


def in_batches(data, size):
    return list(zip(*(torch.split(part, size) for part in data), strict=True))


@pytest.fixture
def task(small_cnn, images):
    """A network, its data, its features in float64, and the correlation of its filters by plain loops."""
    model, x, y = small_cnn(), images(60), torch.arange(60) % 4
    with torch.no_grad():
        features = model.penultimate(x).double().numpy()
    weight = model.conv2.weight.detach().double().numpy()
    by_weights = np.zeros((6, 6))
    for k, j in product(range(6), repeat=2):
        by_weights[k, j] = (weight[k] * weight[j]).sum() / np.sqrt((weight[k] ** 2).sum() * (weight[j] ** 2).sum())
    with np.errstate(invalid="ignore"):
        by_activations = np.nan_to_num(np.corrcoef(features.T))
    assert (features.std(0) == 0).sum() == 1  # one channel is dead: numpy has NaN there
    np.fill_diagonal(by_activations, 1)
    return model, (x, y), features, {"weights": by_weights, "activations": by_activations}


# -- the matrix --------------------------------------------------------------------------------------------------------


def test_of_weights_is_the_cosine_and_reads_one_batch(task):
    model, data, _, expected = task

    def one_only():
        yield data[0][:2]
        raise AssertionError("a second batch was read")

    frame = metrics.filter_correlation(model, one_only())
    np.testing.assert_allclose(frame, expected["weights"], atol=1e-12)
    assert frame.index.name == frame.columns.name == "channel"
    assert frame.attrs == {"kind": "weights", "layer": "conv2", "dimension": 5 * 9}


@pytest.mark.parametrize("size", [7, 60])
def test_of_activations_is_numpys(task, size):
    model, data, _, expected = task
    frame = metrics.filter_correlation(model, in_batches(data, size), kind="activations")
    np.testing.assert_allclose(frame, expected["activations"], atol=1e-6)
    assert frame.attrs == {"kind": "activations", "layer": "fc", "dimension": 59}


@pytest.mark.parametrize("shift", [0.0, 1e9])
def test_large_means_do_not_destroy_it(shift):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(500, 4)) @ generator.normal(size=(4, 4)) + np.arange(4) * shift
    features[:, 2] = 0.1 + shift  # never varies; no float32, and its mean over 7 is not itself
    moments = CoMoments()
    for part in torch.from_numpy(features).split(7):
        moments.add(part)
    expected = np.eye(4)
    varying = np.ix_([0, 1, 3], [0, 1, 3])
    centred = features - features.mean(0)
    expected[varying] = np.corrcoef(centred[:, [0, 1, 3]].T)
    np.testing.assert_allclose(moments.correlation().numpy(), expected, atol=1e-6)
    assert (moments.correlation()[2] == torch.tensor([0.0, 0, 1, 0])).all()


def test_filters_of_zeros_and_tiny_ones():
    weight = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [3.0, 4.0]])
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0.6], [0, 0.6, 1]], dtype=torch.float64)
    torch.testing.assert_close(normalised_products(weight), expected, rtol=0, atol=1e-7)


def test_tensor_parts_stay_on_the_device(device, assert_close):
    with device.mode:
        values = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(device.name)
        moments = CoMoments()
        moments.add(values[:4])
        moments.add(values[4:])
        centred = nn.functional.normalize(values.double() - values.double().mean(0), dim=0)
        assert_close(moments.correlation(), centred.T @ centred)
        unit = nn.functional.normalize(values.double(), dim=1)
        assert_close(normalised_products(values.view(9, 3, 1, 1)), unit @ unit.T)


def test_the_filters_are_those_that_run_last_before_the_head(images):
    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.after = nn.Conv2d(3, 6, 3)
            self.never = nn.Conv2d(3, 6, 3)
            self.first = nn.Conv2d(3, 6, 3)
            self.between = nn.Conv2d(6, 6, 1)
            self.other = nn.Conv2d(3, 5, 3)
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            maps = self.between(self.first(x))
            self.other(x)
            logits = self.fc(maps.mean((2, 3)))
            self.after(x)
            return logits

    model, loader = Branched(), [images(3)]
    assert metrics.filter_correlation(model, loader).attrs["layer"] == "between"
    for conv in ("first", model.first):
        frame = metrics.filter_correlation(model, loader, conv=conv)
        assert (frame.attrs["layer"], frame.attrs["dimension"]) == ("first", 27)
    for conv in ("never", "after", "other"):
        with pytest.raises(
            HeadError, match=r"these ran before it: first \(6 outputs\), between .*, other \(5 outputs\)"
        ):
            metrics.filter_correlation(model, loader, conv=conv)
    with pytest.raises(OptionError, match=r"got 'frist'; pass one of \["):
        metrics.filter_correlation(model, loader, conv="frist")
    with pytest.raises(OptionError, match="got ReLU"):
        metrics.filter_correlation(model, loader, conv=nn.ReLU())
    assert not any(module._forward_hooks for module in model.modules())
    dense = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 4))
    assert metrics.filter_correlation(dense, loader).attrs["layer"] == "1"
    resnet = metrics.filter_correlation(load_demo_network()[0], load_images("test").batches(2))
    assert resnet.attrs["layer"] == "layer3.2.conv2"


def test_a_matrix_is_refused_where_there_is_none(task):
    model, (x, _), _, _ = task
    with pytest.raises(OptionError, match=r"kind must be one of \['weights', 'activations'\], got 'gradients'"):
        metrics.filter_correlation(model, [x], kind="gradients")
    with pytest.raises(OptionError, match="conv= says whose weights"):
        metrics.filter_correlation(model, [x], kind="activations", conv="conv1")
    with pytest.raises(OptionError, match="at least two samples, the loader gave one"):
        metrics.filter_correlation(model, [x[:1]], kind="activations")
    with pytest.raises(HeadError, match="with 192 outputs"):
        metrics.filter_correlation(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), [x])


# -- the share above a threshold ---------------------------------------------------------------------------------------


def test_share_counts_pairs_and_leaves_the_diagonal_out(task):
    model, data, _, matrices = task
    both = {kind: metrics.filter_correlation(model, [data], kind=kind) for kind in matrices}
    frame = metrics.correlated_share(both, [-1, 0.0, 0.3])
    assert frame.control.tolist() == [False] * 6 + [True] * 6
    assert frame[frame.control].correlation.tolist() == frame[~frame.control].correlation.tolist()
    assert (frame[frame.control & (frame.threshold == -1)].share == 1).all()
    frame = frame[~frame.control]
    for kind, matrix in matrices.items():
        for threshold in (-1, 0.0, 0.3):
            pairs = [matrix[k, j] > threshold for k in range(6) for j in range(k)]
            found = frame[(frame.correlation == kind) & (frame.threshold == threshold)].iloc[0]
            assert found.share == pytest.approx(np.mean(pairs))
            without = [np.mean([matrix[k, j] > threshold for k in range(6) for j in range(k) if i not in (k, j)])
                       for i in range(6)]  # fmt: skip
            error = np.sqrt(5 / 6 * ((np.array(without) - np.mean(without)) ** 2).sum())
            assert found.high == pytest.approx(min(1, found.share + 2.570581836 * error))
            assert found.pairs == 15
    alone = metrics.correlated_share(both["weights"], [0.3])
    assert list(alone.correlation) == ["weights"] * 2


@pytest.mark.parametrize("dimension", [1, 2, 5, 40])
def test_the_control_is_what_random_directions_do(dimension):
    generator = np.random.default_rng(dimension)
    vectors = generator.normal(size=(20, 30, dimension))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    matrices = vectors @ vectors.transpose(0, 2, 1)
    for threshold in (0.0, 0.3):
        named = {str(n): _frame(matrix) for n, matrix in enumerate(matrices)}
        both = metrics.correlated_share(named, [threshold], dimension=dimension)
        shares, control = both[~both.control].share.to_numpy(), both[both.control]
        assert shares.mean() == pytest.approx(control.share.iloc[0], abs=0.03)
        assert ((control.low <= shares) & (shares <= control.high)).mean() > 0.7


def _frame(matrix):
    return pd.DataFrame(matrix)


def test_shares_refuse_what_is_no_matrix():
    with pytest.raises(OptionError, match=r"must be a K x K matrix .* got shape \(2, 3\)"):
        metrics.correlated_share(_frame(np.ones((2, 3))), [0.3], dimension=4)
    with pytest.raises(OptionError, match="needs the length of the vectors behind correlation 'given', got None"):
        metrics.correlated_share(_frame(np.eye(3)), [0.3])
    with pytest.raises(OptionError, match=r"numbers in \[-1, 1\), got \[1.0\]"):
        metrics.correlated_share(_frame(np.eye(3)), [1.0], dimension=3)
    with pytest.raises(OptionError, match="no correlation was given"):
        metrics.correlated_share({}, [0.3])


# -- between classes ---------------------------------------------------------------------------------------------------


def by_loops(matrix, groups):
    pairs = [(a, b) for a in groups for b in groups if a is not b]
    return np.mean([[matrix[k, j] for k, j in product(a, b)] for a, b in pairs])


@pytest.mark.parametrize("m", [1, 2, 6])
@pytest.mark.parametrize("size", [7, 60])
def test_inter_class_correlation_is_the_formula(m, size):
    generator = torch.Generator().manual_seed(0)
    weight, means = torch.randn(6, 6, generator=generator), 2 * torch.randn(4, 6, generator=generator)
    model, y = given_features(means), torch.arange(60) % 4
    with torch.no_grad():
        model[0].weight.copy_(weight)
    x = means[y] + torch.randn(60, 6, generator=generator)
    features, unit = (x.double() @ weight.double().T).numpy(), nn.functional.normalize(weight.double(), dim=1)
    matrices = {"weights": (unit @ unit.T).numpy(), "activations": np.corrcoef(features.T)}
    frame = metrics.inter_class_correlation(model, in_batches((x, y), size), m)
    assert frame.control.tolist() == [False, False, True, True]
    frame = frame[~frame.control].set_index("kind")
    groups = [list(np.argsort(-features[y == c].mean(0), kind="stable")[:m]) for c in range(4)]
    for kind, matrix in matrices.items():
        found = frame.loc[kind]
        assert found.c_ic == pytest.approx(by_loops(matrix, groups), abs=1e-6)
        without = np.array([by_loops(matrix, [g for g in groups if g is not out]) for out in groups])
        error = np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
        assert error > 0.01 or m == 6
        assert found.high - found.c_ic == pytest.approx(3.182446305 * error, abs=1e-6)
        assert found.c_ic - found.low == pytest.approx(3.182446305 * error, abs=1e-6)
        assert found.shared == pytest.approx(by_loops(np.eye(6), groups))
        assert (found.classes, found.samples, found.m) == (4, 60, m)


def test_the_control_draws_sets_at_random(task):
    model, data, _, matrices = task
    frame = metrics.inter_class_correlation(model, [data], 2, control=Control(draws=400))
    for kind, matrix in matrices.items():
        chance = frame[frame.control].set_index("kind").loc[kind]
        # any filter of one class with any of the other
        half = (chance.high - chance.low) / 2
        assert 0 < half < 0.05
        assert abs(chance.c_ic - matrix.mean()) < 2 * half
        assert abs(chance.shared - 1 / 6) < 0.03
    other = metrics.inter_class_correlation(model, [data], 2, control=Control(draws=400, seed=1))
    assert ((other.c_ic == frame.c_ic) == ~frame.control).all()


def test_classes_apart_have_none_and_classes_alike_have_all():
    model = given_features(torch.eye(3))
    y = torch.arange(3).repeat(4)
    apart = metrics.inter_class_correlation(model, [(torch.eye(3).repeat(4, 1), y)], 1, kinds="weights").iloc[0]
    assert (apart.c_ic, apart.shared) == (0, 0)
    same = torch.tensor([3.0, 1.0, 0.0]) + 0.1 * torch.eye(3).repeat(4, 1)
    alike = metrics.inter_class_correlation(model, [(same, y)], 1, kinds=["weights"]).iloc[0]
    assert (alike.c_ic, alike.shared) == (1, 1)
    # a class without samples has no filters
    some = y < 2
    partial = metrics.inter_class_correlation(model, [(torch.eye(3).repeat(4, 1)[some], y[some])], 1)
    assert list(partial.classes) == [2] * 4
    assert (partial.low.isna() == ~partial.control).all()
    with pytest.raises(OptionError, match="samples of 1; pass a loader with more"):
        metrics.inter_class_correlation(model, [(torch.eye(3), torch.zeros(3, dtype=int))], 1)


def test_inter_class_correlation_refuses_what_it_cannot_use(task):
    model, data, _, _ = task
    with pytest.raises(OptionError, match=r"m must be an integer in \[1, 6\], the number of channels; got 7"):
        metrics.inter_class_correlation(model, [data], 7)
    with pytest.raises(OptionError, match="kinds must be some of"):
        metrics.inter_class_correlation(model, [data], 2, kinds=[])
    with pytest.raises(LabelError, match="has no labels"):
        metrics.inter_class_correlation(model, [data[0]], 2)


def test_a_head_pass_stands_for_model_and_loader(task):
    model, data, _, _ = task
    head_pass = HeadPass(model, in_batches(data, 7))
    expected = metrics.inter_class_correlation(model, [data], 2)
    pd.testing.assert_frame_equal(metrics.inter_class_correlation(head_pass, m=2), expected)
    cached = head_pass.cached()
    found = metrics.inter_class_correlation(cached, m=2, kinds="activations")
    pd.testing.assert_frame_equal(found, expected[expected.kind == "activations"].reset_index(drop=True))
    assert metrics.filter_correlation(head_pass).equals(metrics.filter_correlation(model, [data]))
    assert metrics.filter_correlation(cached, kind="activations").attrs["dimension"] == 59
    with pytest.raises(HeadError, match='a HeadPass that is not cached, or the kind "activations"'):
        metrics.filter_correlation(cached)


def test_intervals_of_values_that_may_be_negative():
    mean, low, high = draws_interval([-0.3, -0.1, -0.2, 0.0, -0.4])
    assert mean == pytest.approx(-0.2)
    assert low < -0.2 < high < 0
    mean, low, high = pair_interval(np.array([[0, -2.0], [-2.0, 0]]))
    assert mean == -2
    assert np.isnan([low, high]).all()
