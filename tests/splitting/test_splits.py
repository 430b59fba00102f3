"""The lines and the recursion against polyfit and a plain recursion."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from captum_classfilters.core.errors import NonFiniteError, OptionError, ShapeError
from captum_classfilters.splitting import splits as splits_module
from captum_classfilters.splitting.splits import split_weights

BRANCHES = ("positive", "negative")


def recursion(distances, min_size, threshold=0.0):
    """Nodes of one side from the outside in: ``(threshold, neurons)``."""
    chosen = [j for j, away in distances.items() if away > threshold]
    if not chosen:
        return []
    nodes = [(threshold, chosen)]
    if len(chosen) >= min_size and len({distances[j] for j in chosen}) > 1:
        nodes += recursion(distances, min_size, math.fsum(distances[j] for j in chosen) / len(chosen))
    return nodes


def sides(row, first_threshold):
    """Distances of each side by neuron; exact zeros belong to neither."""
    kept = {j: w for j, w in enumerate(row) if w != 0}
    first = math.fsum(kept.values()) / max(len(kept), 1) if first_threshold == "mean" else 0.0
    return first, {j: w - first for j, w in kept.items()}, {j: first - w for j, w in kept.items()}


def assert_is_the_recursion(rows, first_threshold, min_size):
    splits = split_weights(torch.tensor(rows, dtype=torch.float64), first_threshold=first_threshold, min_size=min_size)
    for number, row in enumerate(rows):
        first, *both = sides(row, first_threshold)
        assert splits.first[number] == pytest.approx(first, rel=1e-12, abs=1e-12)
        assert splits.zeros[number] == row.count(0.0)
        for branch, distances in zip(BRANCHES, both, strict=True):
            expected = recursion(distances, min_size)
            side = splits.side(branch)
            assert splits.depths(branch)[number] == len(expected)
            assert side.size[number].tolist() == [len(n) for _, n in expected] + [0] * (
                len(side.size[0]) - len(expected)
            )
            assert np.isnan(side.threshold[number, len(expected) :]).all()
            deepest = [sum(j in neurons for _, neurons in expected) for j in range(len(row))]
            assert splits.stages(branch)[number].tolist() == deepest
            for stage, (threshold, neurons) in enumerate(expected):
                assert side.threshold[number, stage] == pytest.approx(threshold, rel=1e-12)
                mean = math.fsum(distances[j] for j in neurons) / len(neurons)
                assert side.mean[number, stage] == pytest.approx(mean, rel=1e-12)


# Quarters add up exactly, so that a mean that meets a number meets it here and there
QUARTERS = st.integers(-40, 40).map(lambda number: number / 4)
WIDTHS = st.integers(30, 40)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data(), width=WIDTHS, min_size=st.integers(2, 30), signs=st.sampled_from([0, 1, -1]))
def test_split_at_zero_is_the_recursion(data, width, min_size, signs):
    numbers = QUARTERS if signs == 0 else QUARTERS.map(lambda number: signs * abs(number))
    rows = data.draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=4))
    rows.append([0.75] * width)
    rows.append([0.0] * width)
    assert_is_the_recursion(rows, "zero", min_size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), width=WIDTHS, min_size=st.integers(2, 30), copies=st.integers(1, 3))
def test_split_at_the_mean_is_the_recursion(seed, width, min_size, copies):
    generator = np.random.default_rng(seed)
    rows = generator.standard_t(3, (3, width)) + generator.normal(0, 1, (3, 1))
    rows[:, : copies * 5 : copies] = rows[:, -1:]  # ties
    rows[1, 3:9] = 0
    rows[2] = np.abs(rows[2])
    for row in rows.tolist():
        _, *both = sides(row, "mean")
        for distances in both:
            for threshold, neurons in recursion(distances, min_size):
                assume(all(abs(distances[j] - threshold) > 1e-9 for j in neurons))
    assert_is_the_recursion(rows.tolist(), "mean", min_size)


def test_a_constant_row_is_not_split():
    """0.1 + 0.1 + ... over their number is not 0.1 in floating point."""
    for value in (0.1, 0.3, -0.7):
        splits = split_weights(torch.full((1, 37), value, dtype=torch.float64), min_size=2)
        branch = "positive" if value > 0 else "negative"
        assert splits.side(branch).size.tolist() == [[37]]
        assert np.isnan(splits.side(branch).r2).all()
        assert splits.side(branch).slope.tolist() == [[0.0]]


# -- the line ----------------------------------------------------------------------------------------------------------


def assert_lines(weights, rtol=1e-9, **options):
    splits = split_weights(torch.from_numpy(weights), **options)
    checked = 0
    for branch in BRANCHES:
        side, away = splits.side(branch), splits.distances(branch).numpy()
        for row, stage in np.argwhere(side.size > 0):
            size = side.size[row, stage]
            values = np.log(np.sort(away[row][away[row] > side.threshold[row, stage]]))
            assert len(values) == size
            if size < 2:
                assert np.isnan([side.slope[row, stage], side.intercept[row, stage], side.r2[row, stage]]).all()
                continue
            x = np.arange(size) / size
            slope, intercept = np.polyfit(x, values, 1)
            np.testing.assert_allclose(side.slope[row, stage], slope, rtol=rtol)
            np.testing.assert_allclose(side.intercept[row, stage], intercept, rtol=rtol, atol=1e-12)
            r2 = 1 - ((values - slope * x - intercept) ** 2).sum() / ((values - values.mean()) ** 2).sum()
            np.testing.assert_allclose(side.r2[row, stage], r2, rtol=rtol)
            checked += 1
    return checked


@pytest.mark.parametrize("min_size", [2, 20])
def test_slope_intercept_and_r2_are_polyfit_s(min_size):
    generator = np.random.default_rng(0)
    weights = generator.standard_t(3, (6, 300)) * 0.03
    weights[1] = np.abs(weights[1])
    weights[2, :50] = 0
    weights[3] *= 1e6
    assert assert_lines(weights, min_size=min_size) > 30
    assert assert_lines(weights, min_size=min_size, first_threshold="mean") > 30


def test_nearly_alike_numbers_keep_their_digits():
    """The sum of squares of their logarithms has none of the digits in which they differ."""
    weights = 0.03 * (1 + 1e-8 * np.random.default_rng(1).random((2, 60)))
    assert assert_lines(weights, min_size=20, rtol=1e-5) > 2


def test_a_class_does_not_depend_on_the_others():
    """One of 1e17 times the size would swallow their running sums."""
    weights = torch.randn(5, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[1] *= 1e17
    together = split_weights(weights, min_size=3)
    for row in range(5):
        alone = split_weights(weights[row : row + 1], min_size=3)
        for branch in BRANCHES:
            for found, expected in zip(together.side(branch), alone.side(branch), strict=True):
                np.testing.assert_allclose(found[row, : expected.shape[1]], expected[0], rtol=1e-12)


def test_blocks_are_one_table(monkeypatch):
    weights = torch.randn(11, 40, generator=torch.Generator().manual_seed(2))
    weights[4] = weights[4].abs()
    weights[7] = 1.0
    whole = split_weights(weights, min_size=3)
    monkeypatch.setattr(splits_module, "_NUMBERS", 80)
    blocks = split_weights(weights, min_size=3)
    for branch in BRANCHES:
        for found, expected in zip(blocks.side(branch), whole.side(branch), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_deviations_are_the_residuals_of_each_side():
    weights = np.random.default_rng(3).normal(size=(2, 50))
    weights[0, 5] = 0
    splits = split_weights(torch.from_numpy(weights), min_size=20)
    found = splits.deviations().numpy()
    for row in range(2):
        for sign in (1, -1):
            inside = np.flatnonzero(sign * weights[row] > 0)
            inside = inside[np.argsort(sign * weights[row, inside])]
            logs, x = np.log(np.abs(weights[row, inside])), np.arange(len(inside)) / len(inside)
            residuals = np.abs(logs - np.polyval(np.polyfit(x, logs, 1), x))
            np.testing.assert_allclose(found[row, inside], residuals, rtol=1e-9, atol=1e-12)
    assert found[0, 5] == 0


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        (torch.ones(2, 3), {"min_size": 4}, OptionError, "the head has 3 features, fewer than min_size=4"),
        (torch.ones(2, 30), {"min_size": 1}, OptionError, "min_size must be an integer of at least 2; got 1"),
        (torch.ones(2, 30), {"min_size": 2.5}, OptionError, "min_size must be an integer of at least 2; got 2.5"),
        (torch.ones(2, 30), {"min_size": True}, OptionError, "min_size must be an integer"),
        (torch.ones(2, 30), {"fit": "ols"}, OptionError, r"fit must be one of \['loglinear', 'mle'\], got 'ols'"),
        (torch.ones(2, 30), {"first_threshold": 0}, OptionError, r"first_threshold must be one of \['zero', 'mean'\]"),
        (torch.ones(30), {}, ShapeError, r"weights must have shape \(C, K\), one row for each class; got \(30,\)"),
        (torch.ones(0, 30), {}, ShapeError, r"got \(0, 30\)"),
        (torch.tensor([[1.0, torch.nan, 2.0]]), {"min_size": 2}, NonFiniteError, "weights must be finite, got NaN"),
        (torch.tensor([[1.0, -torch.inf, 2.0]]), {"min_size": 2}, NonFiniteError, "weights must be finite"),
    ],
)
def test_wrong_weights_and_options_are_refused(weights, options, error, message):
    with pytest.raises(error, match=message):
        split_weights(weights, **options)


def test_a_parameter_is_split_as_it_is():
    head = torch.nn.Linear(30, 2)
    before = head.weight.detach().clone()
    assert split_weights(head.weight).positive.size.shape[0] == 2
    assert torch.equal(head.weight, before)
