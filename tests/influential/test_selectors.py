"""Each selector against a float64 loop written from its definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_classfilters.influential.selectors import Sample, ablation, contribution, heaviest, margin, votes

N, K, C = 12, 7, 4


def sample(seed, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(C, K, generator=generator), torch.randn(C, generator=generator)
    features = torch.randn(N, K, generator=generator)
    classes = torch.randint(0, C, (N,), generator=generator)
    return Sample(*(part.to(device) for part in (features, features @ weight.T + bias, classes, weight)), "abs", None)


def votes_by_hand(row, k1):
    """The paper's line 5 with our rules: largest first, equal ones by index, zeros never."""
    order = sorted(range(len(row)), key=lambda j: (-row[j], j))
    if isinstance(k1, float):
        total, covered, chosen = sum(v for v in row if v > 0), 0.0, []
        for j in order:
            if covered >= k1 * total:
                break
            chosen.append(j)
            covered += max(row[j], 0.0)
        order = chosen
    else:
        order = order[:k1]
    return [int(j in order and row[j] > 0) for j in range(len(row))]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=6),
    k1s=st.lists(st.one_of(st.integers(1, 5), st.sampled_from([0.1, 0.5, 0.9])), min_size=1, max_size=4),
)
def test_votes_are_the_papers_with_ties_by_index_and_no_vote_for_zero(rows, k1s):
    tables = votes(torch.tensor(rows, dtype=torch.float32), k1s)
    for k1, found in zip(k1s, tables, strict=True):
        assert found.long().tolist() == [votes_by_hand(row, k1) for row in rows]


def test_signed_importance_lets_negative_features_go_without_a_vote():
    (found,) = votes(torch.tensor([[-3.0, 1.0, -2.0]]), [2])
    assert found.tolist() == [[False, True, False]]


@pytest.mark.parametrize("seed", range(3))
def test_contribution_and_margin_are_their_definitions(seed):
    given_ = sample(seed)
    for n in range(N):
        y, z = int(given_.classes[n]), given_.logits[n].tolist()
        rival = max((c for c in range(C) if c != y), key=lambda c: z[c])
        f, w = given_.features[n].double().numpy(), given_.weight.double().numpy()
        np.testing.assert_allclose(contribution(given_)[n], w[y] * f, rtol=1e-6)
        np.testing.assert_allclose(margin(given_)[n], (w[y] - w[rival]) * f, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cells", [1, 60, 2**24])
def test_ablation_is_the_loss_of_log_probability_of_each_single_feature(cells):
    given_ = sample(4)
    found = ablation(given_, cells=cells)

    def log_probability(z, y):
        return z[y] - math.log(sum(math.exp(v) for v in z))

    for n in range(N):
        y, z = int(given_.classes[n]), given_.logits[n].double().numpy()
        for j in range(K):
            without = z - given_.weight[:, j].double().numpy() * float(given_.features[n, j])
            assert found[n, j] == pytest.approx(log_probability(z, y) - log_probability(without, y), abs=1e-6)


def test_heaviest_takes_the_largest_weights_of_each_class():
    weight = torch.tensor([[1.0, -5.0, 3.0], [0.5, 0.5, 0.1]])
    assert heaviest(weight, 1, "abs").tolist() == [[False, True, False], [True, False, False]]
    assert heaviest(weight, 1, "signed").tolist() == [[False, False, True], [True, False, False]]


def test_selectors_stay_on_the_device_of_the_features(device):
    with device.mode:
        given_ = sample(0, device.name)
        for rows in (contribution(given_), margin(given_), ablation(given_), *votes(given_.features, [2, 0.5])):
            assert rows.shape == (N, K)
            assert rows.device.type == device.name
