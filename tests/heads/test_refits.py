"""least_squares and omp against numpy's and scikit-learn's answers on the data itself."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.linear_model import OrthogonalMatchingPursuit
from sklearn.preprocessing import StandardScaler

from captum_classfilters.core.errors import OptionError
from captum_classfilters.heads import HeadMoments
from captum_classfilters.heads.refits import least_squares, omp

N, K, C = 200, 10, 4


class Data(NamedTuple):
    """Features, a head, and its logits."""

    features: np.ndarray
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def logits(self):
        return self.features @ self.weight.numpy().T + self.bias.numpy()

    @property
    def moments(self):
        features = torch.from_numpy(self.features)
        return HeadMoments(features.sum(0), features.T @ features, len(features), "fc")


def made(seed=0, *, dead=(), twins=(), count=N):
    """Correlated features of unlike scales and means; ``dead`` ones are constant, of ``twins`` one copies another."""
    generator = np.random.default_rng(seed)
    features = generator.gamma(1.0, size=(count, K)) @ generator.normal(size=(K, K)) * np.logspace(-1, 1, K) + 2.0
    for channel in dead:
        features[:, channel] = 0.3
    for channel, original in twins:
        features[:, channel] = features[:, original]
    return Data(features, torch.from_numpy(generator.normal(size=(C, K))), torch.from_numpy(generator.normal(size=C)))


def chosen(seed, k):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(K, generator=generator)[:k] for _ in range(C)])


def numpys(data, channels, c):
    """Coefficients, intercept and residual of the dense logit on these channels."""
    design = np.column_stack([data.features[:, channels], np.ones(len(data.features))])
    solution = np.linalg.lstsq(design, data.logits[:, c], rcond=None)[0]
    return solution[:-1], solution[-1], data.logits[:, c] - design @ solution


def residual(data, found, c):
    fitted = data.features[:, found.indices[c]] @ found.weight[c].numpy() + float(found.bias[c])
    return data.logits[:, c] - fitted


# -- least squares -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("seed", range(3))
def test_least_squares_are_numpys(seed, k):
    data, indices = made(seed), chosen(seed, k)
    found = least_squares(data.moments, data.weight, data.bias, indices)
    for c in range(C):
        weight, bias, left = numpys(data, indices[c], c)
        np.testing.assert_allclose(found.weight[c], weight, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(found.bias[c], bias, rtol=1e-7, atol=1e-7)
        assert float(found.explained[c]) == pytest.approx(1 - left.var() / data.logits[:, c].var(), abs=1e-9)
    assert torch.equal(found.indices, indices)
    assert not found.ridge.any()
    assert found.weight.dtype == found.bias.dtype == torch.float64


def test_all_features_give_back_the_weights():
    data = made(3)
    indices = chosen(3, K)
    found = least_squares(data.moments, data.weight.float(), data.bias.float(), indices)
    expected = data.weight.float().double()
    torch.testing.assert_close(found.weight, expected.gather(1, indices), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.bias, data.bias.float().double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.explained, torch.ones(C, dtype=torch.float64))


def test_a_constant_feature_gets_no_weight_and_its_part_goes_to_the_bias():
    data = made(1, dead=[2, 7])
    indices = torch.tensor([[2, 0, 5]] * C)
    found = least_squares(data.moments, data.weight, data.bias, indices)
    assert found.weight[:, 0].tolist() == [0.0] * C
    for c in range(C):
        weight, bias, _ = numpys(data, [0, 5], c)
        np.testing.assert_allclose(found.weight[c, 1:], weight, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(found.bias[c], bias, rtol=1e-7, atol=1e-7)
    assert not found.ridge.any()


def test_only_constant_features_leave_the_mean_of_the_logit():
    data = made(1, dead=[2, 7])
    found = least_squares(data.moments, data.weight, data.bias, torch.tensor([[2, 7]] * C))
    assert not found.weight.any()
    np.testing.assert_allclose(found.bias, data.logits.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.explained, np.zeros(C), atol=1e-9)


def test_a_logit_that_never_varies_is_explained():
    data = made(1, dead=[2])
    weight = torch.zeros_like(data.weight)
    weight[1, 2] = 5.0  # reads the constant feature alone
    for found in (
        least_squares(data.moments, weight, data.bias, chosen(0, 3)),
        omp(data.moments, weight, data.bias, 3),
    ):
        np.testing.assert_allclose(found.weight[:2], np.zeros((2, 3)), atol=1e-9)
        torch.testing.assert_close(found.bias, data.bias + torch.tensor([0, 1.5, 0, 0]), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.explained, torch.ones(C, dtype=torch.float64))


def test_features_that_copy_one_another_share_their_weight_and_are_reported():
    data = made(2, twins=[(4, 1)])
    indices = torch.tensor([[1, 4, 6], [1, 0, 6], [4, 5, 1], [2, 3, 4]])
    found = least_squares(data.moments, data.weight, data.bias, indices)
    assert (found.ridge > 0).tolist() == [True, False, True, False]
    torch.testing.assert_close(found.weight[0, 0], found.weight[0, 1], rtol=1e-5, atol=0)
    for c in range(C):
        _, _, best = numpys(data, indices[c], c)
        assert np.linalg.norm(residual(data, found, c)) <= np.linalg.norm(best) * (1 + 1e-6)


@pytest.mark.parametrize(("noise", "ridge"), [(1e-6, True), (1e-3, False)])
def test_features_that_nearly_copy_one_another_count_as_copies(noise, ridge):
    data = made(2, twins=[(4, 1)])
    data.features[:, 4] += noise * data.features[:, 1].std() * np.random.default_rng(0).normal(size=N)
    found = least_squares(data.moments, data.weight, data.bias, torch.tensor([[1, 4, 6]] * C))
    assert (found.ridge > 0).tolist() == [ridge] * C
    for c in range(C):
        _, _, best = numpys(data, [1, 6], c)
        assert np.linalg.norm(residual(data, found, c)) <= np.linalg.norm(best) * (1 + 1e-6)


def test_many_classes_are_solved_in_parts(monkeypatch):
    data, indices = made(4), chosen(4, 3)
    together = least_squares(data.moments, data.weight, data.bias, indices)
    monkeypatch.setattr("captum_classfilters.heads.refits._CELLS", 2 * 3**2)
    for found, expected in zip(least_squares(data.moments, data.weight, data.bias, indices), together, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_samples_are_refused(count):
    data = made(0, count=count)
    for refit in (
        lambda: least_squares(data.moments, data.weight, data.bias, chosen(0, 3)),
        lambda: omp(data.moments, data.weight, data.bias, 3),
    ):
        with pytest.raises(OptionError, match=rf"refit of 3 weights and a bias .* at least 4 samples.* hold {count}:"):
            refit()


# -- orthogonal matching pursuit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_omp_is_scikit_learns_on_standardised_features(seed, k):
    data = made(seed)
    found = omp(data.moments, data.weight, data.bias, k)
    scaler = StandardScaler().fit(data.features)
    for c in range(C):
        reference = OrthogonalMatchingPursuit(n_nonzero_coefs=k).fit(scaler.transform(data.features), data.logits[:, c])
        coefficients = np.zeros(K)
        coefficients[found.indices[c]] = found.weight[c]
        assert set(found.indices[c].tolist()) == set(np.flatnonzero(reference.coef_))
        np.testing.assert_allclose(coefficients * scaler.scale_, reference.coef_, rtol=1e-6, atol=1e-7)


def test_omp_goes_on_where_fewer_features_ended():
    data = made(5)
    found = [omp(data.moments, data.weight, data.bias, k) for k in range(1, K + 1)]
    for few, more in itertools.pairwise(found):
        assert torch.equal(more.indices[:, :-1], few.indices)
        assert bool((more.explained >= few.explained - 1e-12).all())
    assert sorted(found[-1].indices[0].tolist()) == list(range(K))
    torch.testing.assert_close(found[-1].explained, torch.ones(C, dtype=torch.float64))


def test_omp_takes_what_is_needed_first_and_gives_the_rest_nothing():
    data = made(6, dead=[3])
    weight = torch.zeros_like(data.weight)
    weight[:, [2, 8]] = torch.tensor([[1.0, -2.0], [3.0, 1.0], [0.5, 0.2], [-1.0, -1.0]], dtype=torch.float64)
    data = data._replace(weight=weight)
    found = omp(data.moments, data.weight, data.bias, 5)
    for c in range(C):
        row = dict(zip(found.indices[c].tolist(), found.weight[c].tolist(), strict=True))
        # what is not needed comes by index, not by rounding
        assert found.indices[c, 2:].tolist() == [0, 1, 3]
        expected = {channel: float(weight[c, channel]) for channel in row}
        assert row == pytest.approx(expected, abs=1e-6)
        assert {2, 8} <= set(row)
    torch.testing.assert_close(found.explained, torch.ones(C, dtype=torch.float64))


def test_omp_takes_constant_features_and_copies_last():
    data = made(7, dead=[3], twins=[(4, 1)])
    found = omp(data.moments, data.weight, data.bias, K)
    assert {frozenset(row[-2:]) for row in found.indices.tolist()} <= {frozenset([3, 1]), frozenset([3, 4])}
    assert bool((found.explained > 1 - 1e-6).all())


@pytest.mark.parametrize("k", [0, K + 1, 2.5, True])
def test_omp_refuses_a_k_that_cannot_be(k):
    data = made()
    with pytest.raises(OptionError, match=r"k must be an integer in \[1, 10\]"):
        omp(data.moments, data.weight, data.bias, k)
