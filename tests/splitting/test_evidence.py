"""Evidence for the distribution of weights, and pruning by it, against scipy and loops by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from shared import seeded
from torch import nn

from captum_classfilters import ClassFiltersError, metrics
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.splitting.splits import split_weights


def head_of(rows):
    """A model whose head has these weights."""
    weights = torch.as_tensor(np.array(rows), dtype=torch.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(weights.shape[1], len(weights)))
    with torch.no_grad():
        model[1].weight.copy_(weights)
    return model


def judged(frame):
    return frame[~frame.control]


@pytest.fixture(scope="module")
def evidence():
    generator = np.random.default_rng(0)
    rows = {
        "ald": stats.laplace_asymmetric.rvs(1.8, scale=0.1, size=1500, random_state=generator),
        "normal": generator.normal(scale=0.1, size=1500),
        "student": stats.t.rvs(2.5, scale=0.1, size=1500, random_state=generator),
        "skew": stats.skewnorm.rvs(6, scale=0.1, size=1500, random_state=generator),
        "laplace": generator.laplace(scale=0.1, size=1500),
    }
    model = head_of(list(rows.values()))
    frame = metrics.ald_evidence(model, bootstrap=60, class_names=list(rows)).set_index("class_name")
    return rows, frame[~frame.control], frame[frame.control]


def test_the_distribution_that_made_the_weights_is_found(evidence):
    _, frame, control = evidence
    assert frame.best.to_dict() | {"laplace": None} == {
        "ald": "ald", "normal": "normal", "student": "student_t", "skew": "skew_normal", "laplace": None,
    }  # fmt: skip
    assert frame.best["laplace"] in ("laplace", "ald")
    assert frame.p["ald"] > 0.05
    assert frame.p["laplace"] > 0.05
    assert frame.p["normal"] == frame.p["skew"] == 1 / 61
    # R2 is high for all of them, the normal control too: it says little
    assert frame.r2_positive.min() > 0.75
    assert control.r2_positive.between(0.75, 0.95).all()
    assert control.index.equals(frame.index)
    assert control[["r2_negative", "ks", "p", "aic_ald", "best"]].isna().all(axis=None)


def test_distance_and_criteria_agree_with_scipy(evidence):
    rows, frame, _ = evidence
    row = np.asarray(rows["student"], np.float32).astype(np.float64)
    kappa, location, scale = stats.laplace_asymmetric.fit(row)
    best = stats.laplace_asymmetric.logpdf(row, kappa, location, scale).sum()
    assert frame.aic_ald["student"] == pytest.approx(6 - 2 * best, abs=0.5)
    assert frame.aic_ald["student"] <= 6 - 2 * best + 1e-6
    assert frame.ks["student"] == pytest.approx(
        stats.kstest(row, stats.laplace_asymmetric(kappa, location, scale).cdf).statistic, abs=0.005
    )
    assert frame.aic_normal["student"] == pytest.approx(4 - 2 * stats.norm.logpdf(row, row.mean(), row.std()).sum())
    spread = np.abs(row - np.median(row)).mean()
    assert frame.aic_laplace["student"] == pytest.approx(
        4 - 2 * stats.laplace.logpdf(row, np.median(row), spread).sum()
    )
    fitted = stats.t.fit(row)
    assert frame.aic_student_t["student"] == pytest.approx(6 - 2 * stats.t.logpdf(row, *fitted).sum(), abs=0.5)


def test_criteria_move_with_the_unit_of_weights_alike():
    generator = np.random.default_rng(1)
    rows = generator.standard_t(4, size=(2, 300))
    one, other = (judged(metrics.ald_evidence(head_of(rows * unit), bootstrap=0)) for unit in (1.0, 1e-3))
    shift = 2 * 300 * np.log(1e-3)
    for column in ("ald", "laplace", "normal", "student_t", "skew_normal"):
        np.testing.assert_allclose(other[f"aic_{column}"] - one[f"aic_{column}"], shift, atol=1e-2)
    assert one.p.isna().all()


def test_p_values_of_true_samples_are_spread_evenly():
    rows = stats.laplace_asymmetric.rvs(0.7, size=(60, 150), random_state=np.random.default_rng(2))
    found = judged(metrics.ald_evidence(head_of(rows), bootstrap=40)).p
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_zeros_are_dropped_and_a_class_without_two_different_weights_is_empty():
    generator = np.random.default_rng(3)
    row = generator.laplace(size=50)
    rows = [np.append(row, np.zeros(10)), np.full(60, 0.5), np.zeros(60)]
    frame = judged(metrics.ald_evidence(head_of(rows), bootstrap=20))
    alone = metrics.ald_evidence(head_of([row]), bootstrap=0)
    assert frame.zeros.tolist() == [10, 0, 60]
    assert frame.weights.tolist() == [50, 60, 0]
    assert frame.aic_ald[0] == pytest.approx(alone.aic_ald[0])
    assert frame.ks[0] == pytest.approx(alone.ks[0])
    assert frame.loc[1:, ["ks", "p", "aic_ald", "aic_skew_normal"]].isna().all(axis=None)
    assert frame.best[1:].isna().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bootstrap": 5}, "at least 20"),
        ({"targets": [0, 7]}, r"\[0, 2\), got 7"),
        ({"targets": 7}, r"\[0, 2\), got 7"),
        ({"targets": ["cat"]}, "target must be"),
        ({"bootstrap": "200"}, "got '200'"),
        ({"bootstrap": 20.5}, "got 20.5"),
        ({"class_names": ["a", "b", "c"]}, "got 3"),
    ],
)
def test_evidence_refuses_what_cannot_be(options, words):
    with pytest.raises(ClassFiltersError, match=words):
        metrics.ald_evidence(head_of([np.arange(1, 9.0)]), **options)


# -- pruning -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def case():
    # no average over positions: features, and with them predictions, differ much from image to image
    model = seeded(nn.Sequential(nn.Flatten(), nn.Linear(27, 12), nn.ReLU(), nn.Linear(12, 4)), 0).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 3, 3, 3, generator=generator)
    labels = torch.randint(4, (60,), generator=generator)
    return model, [(images[:25], labels[:25]), (images[25:], labels[25:])], images, labels


def by_hand(model, images, labels, keep):
    with torch.no_grad():
        predicted = (model[:3](images) @ (model[3].weight * keep).T + model[3].bias).argmax(1)
        whole = model(images).argmax(1)
    return (predicted == labels).double().mean().item(), (predicted == whole).double().mean().item()


def test_pruning_agrees_with_a_loop(case):
    model, loader, images, labels = case
    before = model[3].weight.clone()
    frame = metrics.pruning_curve(model, loader, [0.25, 0.75])
    assert torch.equal(model[3].weight, before)
    weight = model[3].weight.detach()
    deviations = split_weights(weight, min_size=2).deviations()
    for criterion, key in (("magnitude", -weight.abs()), ("deviation", deviations)):
        for share, count in ((0.0, 0), (0.25, 3), (0.75, 9)):
            keep = torch.ones_like(weight)
            for row in range(4):
                keep[row, key[row].argsort(descending=True)[:count]] = 0
            found = frame[(frame.criterion == criterion) & (frame.share == share)].iloc[0]
            accuracy, agreement = by_hand(model, images, labels, keep)
            assert found.accuracy == pytest.approx(accuracy)
            assert found.agreement == pytest.approx(agreement)
            assert found.weights == 4 * (12 - count)
            assert (found.low, found.high) == pytest.approx(metrics.wilson(round(accuracy * 60), 60))
    random = frame[frame.criterion == "random"].set_index("share")
    assert random.agreement[0.0] == 1
    assert random.low[0.75] < random.accuracy[0.75] < random.high[0.75]
    assert (random.weights == [48, 36, 12]).all()


def test_deviation_is_the_distance_from_the_line():
    generator = np.random.default_rng(4)
    weights = torch.from_numpy(generator.laplace(size=(3, 40)))
    weights[1, 5] = 0
    found = split_weights(weights).deviations()
    for row in range(3):
        for sign in (1, -1):
            side = sign * weights[row].numpy()
            where = np.flatnonzero(side > 0)
            order = where[side[where].argsort()]
            x = np.arange(len(order)) / len(order)
            line = np.polyfit(x, np.log(side[order]), 1)
            np.testing.assert_allclose(found[row, order], np.abs(np.log(side[order]) - np.polyval(line, x)), atol=1e-9)
    assert found[1, 5] == 0


def test_a_head_pass_stands_for_model_and_loader(case):
    model, loader, *_ = case
    frame = metrics.pruning_curve(HeadPass(model, loader).cached(), shares=[0.5])
    pd.testing.assert_frame_equal(frame, metrics.pruning_curve(model, loader, [0.5]))


def test_without_labels_there_is_agreement_alone(case):
    model, loader, *_ = case
    frame = metrics.pruning_curve(model, [images for images, _ in loader], [0.5], criteria=["magnitude"])
    assert frame.accuracy.isna().all()
    assert frame.agreement.notna().all()
    assert list(frame.criterion.unique()) == ["magnitude", "random"]
    assert (frame.control == (frame.criterion == "random")).all()
    whole = metrics.pruning_curve(model, loader, [0.5], criteria="magnitude")
    assert frame.agreement.tolist() == whole.agreement.tolist()


@pytest.mark.parametrize(
    ("shares", "options", "words"),
    [
        ([1.0], {}, r"\[0, 1\), got 1.0"),
        ([-0.1], {}, "got -0.1"),
        (0.5, {}, "shares must be a list"),
        ([float("nan")], {}, "got nan"),
        ([0.5], {"criteria": ["l1"]}, r"some of \['deviation'"),
        ([0.5], {"criteria": []}, "some of"),
    ],
)
def test_pruning_refuses_what_cannot_be(case, shares, options, words):
    with pytest.raises(ClassFiltersError, match=words):
        metrics.pruning_curve(case[0], case[1], shares, **options)
