"""Refits that learn from labels: against scikit-learn and float64 loops; what they choose, and what they refuse."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import nn

from captum_classfilters import ClassFilters, Control, HeadMoments, HeadPass, RefitOptions, decompose, metrics
from captum_classfilters.core.errors import LabelError, MergeError, OptionError, ShapeError
from captum_classfilters.heads.binary import BinaryRefitter, exact_assignment, greedy_pool, shared_value
from captum_classfilters.heads.logistic import STRENGTHS, LogisticRefitter
from captum_classfilters.heads.refits import DiscriminantRefitter

N, C, K = 300, 4, 6


def made(seed=0, count=N, classes=C, channels=K):
    """Features of overlapping classes, and labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    means = 2 * random.random((classes, channels))
    features = np.abs(means[labels] + random.normal(size=(count, channels))) * random.uniform(0.5, 3, channels)
    return torch.from_numpy(features), torch.from_numpy(labels)


def moments_of(features, labels, classes=C, layer="0"):
    own = nn.functional.one_hot(labels, classes).double()
    return HeadMoments(
        features.sum(0), features.T @ features, len(features), layer, {}, own.sum(0).long(), own.T @ features
    )


def standardised(features):
    return ((features - features.mean(0)) / features.std(0, correction=0)).numpy()


def network(channels=K, classes=C, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(channels, classes, bias=bias, dtype=torch.float64)).eval()


def table(classes=C, channels=K):
    scores = torch.rand(classes, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = tuple(map(str, range(classes)))
    return ClassFilters(scores, scores, torch.ones(classes, dtype=torch.int64), "random_table", "0", names)


# -- logistic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_logistic_on_all_features_is_scikit_learns(l2):
    features, labels = made()
    every = torch.arange(K).expand(C, K)
    weight, bias, used = LogisticRefitter.of(features, labels, C, l2).fit_with(every)
    theirs = LogisticRegression(C=1 / (l2 * N), tol=1e-8, max_iter=1000).fit(standardised(features), labels)
    assert used == l2
    np.testing.assert_allclose(weight, theirs.coef_, atol=2e-5)
    np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-5)


def test_logistic_on_few_features_is_a_slow_loops():
    features, labels = made(1)
    indices, l2 = torch.tensor([[0, 3], [1, 2], [5, 0], [3, 4]]), 1e-2
    scaled = standardised(features)

    def loss(parameters):
        weight, bias = parameters[: 2 * C].reshape(C, 2), parameters[2 * C :]
        total = 0.0
        for row, label in zip(scaled, labels.tolist(), strict=True):
            logits = [bias[c] + sum(weight[c, i] * row[indices[c, i]] for i in range(2)) for c in range(C)]
            total += np.log(np.sum(np.exp(logits))) - logits[label]
        return total / N + l2 / 2 * (weight**2).sum()

    weight, bias, _ = LogisticRefitter.of(features, labels, C, l2).fit_with(indices)
    start = np.concatenate([weight.numpy().ravel(), bias.numpy()])
    best, random = loss(start), np.random.default_rng(0)
    # convex: where no small step in any direction helps is the minimum
    steps = [*np.eye(3 * C), *random.normal(size=(10, 3 * C))]
    assert min(loss(start + size * step) for step in steps for size in (1e-2, -1e-2)) > best
    slope = max(abs(loss(start + 1e-5 * step) - loss(start - 1e-5 * step)) / 2e-5 for step in np.eye(3 * C))
    assert slope < 1e-5


def test_logistic_of_raw_features_gives_the_same_logits():
    features, labels = made(2)
    indices = torch.tensor([[0, 1]] * C)
    refitter = LogisticRefitter.of(features, labels, C, 1e-3)
    weight, bias, _ = refitter.fit_with(indices)
    raw, shifted, ridge = refitter.fit(indices)
    expected = standardised(features)[:, :2] @ weight.numpy().T + bias.numpy()
    np.testing.assert_allclose(features[:, :2] @ raw.T + shifted, expected, atol=1e-9)
    assert not ridge.any()


def test_the_strength_is_that_of_least_held_out_loss():
    random = np.random.default_rng(0)
    noise, labels = torch.from_numpy(random.normal(size=(60, 20))), torch.arange(60) % 3
    strong = LogisticRefitter.of(noise, labels, 3).fit_with(torch.arange(20).expand(3, 20))[2]
    features, labels = made(3, 1200)
    features[:, :C] += 4 * nn.functional.one_hot(labels, C)
    weak = LogisticRefitter.of(features, labels, C).fit_with(torch.arange(K).expand(C, K))[2]
    assert strong == STRENGTHS[0]
    assert weak < strong


def test_weights_of_separable_classes_stay_finite():
    labels = torch.arange(40) % 2
    features = (labels[:, None] * 2.0 - 1).double()
    weight, bias, _ = LogisticRefitter.of(features, labels, 2).fit(torch.zeros(2, 1, dtype=torch.int64))
    assert bool(weight.isfinite().all() & bias.isfinite().all())
    assert float(weight.abs().max()) < 100


def test_constant_features_get_no_weight():
    features, labels = made(4)
    features[:, 2] = 7.0
    weight, _, _ = LogisticRefitter.of(features, labels, C).fit(torch.tensor([[2, 0]] * C))
    assert not weight[:, 0].any()
    assert weight[:, 1].any()


def test_forward_selection_takes_each_classs_own_channel_first_and_goes_on_where_fewer_ended():
    labels = torch.arange(400) % C
    random = np.random.default_rng(5)
    features = torch.from_numpy(random.normal(size=(400, K)))
    features[:, :C] += 4 * nn.functional.one_hot(labels, C)
    refitter = LogisticRefitter.of(features, labels, C)
    assert refitter.pursue(1).flatten().tolist() == list(range(C))
    for few, more in itertools.pairwise(refitter.pursue(k) for k in (1, 2, 3)):
        assert torch.equal(more[:, :-1], few)
    assert sorted(refitter.pursue(K)[0].tolist()) == list(range(K))


# -- discriminant ------------------------------------------------------------------------------------------------------


def test_discriminant_is_least_squares_of_membership_and_fishers_direction():
    features, labels = made(6)
    moments = moments_of(features, labels)
    indices = torch.tensor([[0, 3, 2], [1, 2, 5], [5, 0, 1], [3, 4, 2]])
    weight, bias, ridge = DiscriminantRefitter(moments, torch.device("cpu")).fit(indices)
    for c, row in enumerate(indices):
        theirs = LinearRegression().fit(features[:, row], labels == c)
        np.testing.assert_allclose(weight[c], theirs.coef_, rtol=1e-8)
        np.testing.assert_allclose(bias[c], theirs.intercept_, rtol=1e-8)
        fisher = LinearDiscriminantAnalysis(solver="lsqr").fit(features[:, row], labels == c).coef_[0]
        np.testing.assert_allclose(weight[c] / weight[c].norm(), fisher / np.linalg.norm(fisher), rtol=1e-6)
    assert not ridge.any()


def test_moments_by_class_are_means_and_covariances_by_the_definition():
    features, labels = made(7)
    moments = moments_of(features, labels)
    groups = [features[labels == c].numpy() for c in range(C)]
    np.testing.assert_allclose(moments.class_means, [group.mean(0) for group in groups], rtol=1e-12)
    within = sum(len(group) * np.cov(group.T, ddof=0) for group in groups) / N
    np.testing.assert_allclose(moments.pooled, within, rtol=1e-9, atol=1e-12)
    both = np.corrcoef(np.c_[nn.functional.one_hot(labels, C), features].T)[:C, C:]
    np.testing.assert_allclose(moments.class_correlation, both, rtol=1e-9)


def test_moments_by_class_are_collected_merged_and_saved(tmp_path):
    features, labels = made(8)
    model, halves = network(), [(features[part], labels[part]) for part in (slice(0, 100), slice(100, N))]
    whole = HeadMoments.collect(model, [(features, labels)], by_class=True)
    parts = [HeadMoments.collect(model, [half], by_class=True) for half in halves]
    merged = HeadMoments.merge(*parts)
    merged.save(tmp_path / "moments.safetensors")
    loaded = HeadMoments.load(tmp_path / "moments.safetensors")
    expected = moments_of(features, labels)
    for found in (whole, merged, loaded):
        torch.testing.assert_close(found.class_means, expected.class_means)
        assert found.class_counts.tolist() == [N // C] * C
    assert repr(loaded) == "HeadMoments(6 features of '0', 300 samples, 4 classes)"
    with pytest.raises(MergeError, match="do not have the same classes"):
        HeadMoments.merge(whole, HeadMoments.collect(model, [features]))
    with pytest.raises(ShapeError, match=r"class_counts and class_totals must have shapes \(C,\) and \(C, 6\)"):
        HeadMoments(whole.total, whole.second, N, "0", {}, whole.class_counts)


# -- binary ------------------------------------------------------------------------------------------------------------


def test_binary_weights_are_1_on_standardised_features():
    features, labels = made(9)
    indices = torch.tensor([[0, 3], [1, 2], [5, 0], [3, 4]])
    weight, bias, _ = BinaryRefitter(moments_of(features, labels)).fit(indices)
    for c, row in enumerate(indices):
        expected = standardised(features)[:, row].sum(1)
        np.testing.assert_allclose(features[:, row] @ weight[c] + bias[c], expected, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_choice_is_the_best_of_all_and_the_greedy_one_is_near(seed):
    features, labels = made(seed, 60)
    moments, k, shared = moments_of(features, labels), 2, 3
    correlation = moments.class_correlation
    alike = torch.from_numpy(np.corrcoef(features.T))

    def value(pool):
        pool = torch.tensor(sorted(pool))
        return shared_value(correlation, alike, pool[correlation[:, pool].topk(k).indices], pool)

    best = max(map(value, itertools.combinations(range(K), shared)))
    exact = exact_assignment(correlation, alike, k, shared)
    used = sorted(set(exact.flatten().tolist()))
    exact_value = max(
        value({*used, *rest})
        for rest in itertools.combinations(set(range(K)) - set(used), shared - len(used))
    )  # fmt: skip
    assert exact_value == pytest.approx(best, abs=1e-6)
    greedy = value(greedy_pool(correlation, alike, k, shared).tolist())
    assert best >= greedy > 0.8 * best
    refitted = BinaryRefitter(moments, shared, exact=True).pursue(k)
    assert torch.equal(refitted, exact)


def test_shared_channels_are_as_many_as_asked_for():
    features, labels = made(1)
    small = decompose(
        network(), None, 2, refit=RefitOptions("binary", shared=3), moments=moments_of(features, labels),
        backend="dense",
    )[0]  # fmt: skip
    kept = small.weight != 0
    assert kept.sum(1).tolist() == [2] * C
    assert int(kept.any(0).sum()) <= 3


# -- through the public doors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refit", ["logistic", "discriminant", "binary"])
@pytest.mark.parametrize("chosen", ["table", "own choice"])
def test_a_small_network_and_its_curve_agree(refit, chosen):
    features, labels = made(10)
    model = network(bias=False)
    data, other = HeadPass(model, [(features, labels)]), made(11)
    filters = table() if chosen == "table" else None
    small = decompose(model, filters, 2, refit=refit, moments=data)
    assert small[0].bias is not None
    right = float((small(other[0]).argmax(1) == other[1]).double().mean())
    curve = metrics.accuracy_curve(model, filters, [other], [1, 2], refit=refit, moments=data, control=Control(5))
    name = "random_table" if filters is not None else refit
    row = curve[(curve.filters == name) & (curve.k == 2) & (curve.class_name == "all")]
    assert row.accuracy.item() == pytest.approx(right)
    assert set(curve[curve.control].k) == {1, 2}


def test_a_logistic_refit_beats_the_weights_as_they_were_on_other_images():
    features, labels = made(12, 900)
    train, test, model = (features[:300], labels[:300]), (features[300:], labels[300:]), network()
    curve = {
        refit: metrics.accuracy_curve(
            model, table(), [test], [2], control=Control(5),
            **({} if refit is None else {"refit": refit, "moments": HeadPass(model, [train])}),
        )
        for refit in (None, "logistic")
    }  # fmt: skip
    found = {r: c[(c.filters == "random_table") & (c.class_name == "all")].accuracy.item() for r, c in curve.items()}
    assert found["logistic"] > found[None] + 0.03


def test_the_one_logit_of_a_network_is_the_log_of_the_odds():
    features, labels = made(13, classes=2)
    model = network(classes=1)
    moments = HeadPass(model, [(features, labels)])
    small = decompose(model, None, K, refit=RefitOptions("logistic", l2=1e-3), moments=moments)
    pairs = LogisticRefitter.of(features, labels, 2, 1e-3)
    weight, bias, _ = pairs.fit(torch.arange(K).expand(2, K))
    odds = features @ (weight[1] - weight[0]) + bias[1] - bias[0]
    torch.testing.assert_close(small(features).flatten(), odds, rtol=1e-6, atol=1e-6)


def refusals():
    features, labels = made()
    lacking = (features[labels != 2], labels[labels != 2])
    unlabelled, labelled = HeadMoments.collect(network(), [features]), moments_of(features, labels)
    one = {"filters": None, "k": 2}
    whole = HeadPass(network(), [(features, labels)])
    many = nn.functional.one_hot(labels, C)
    many[:, 0] = 1
    other = network()
    with torch.no_grad():
        other[0].weight.add_(1)
    yield {**one, "refit": "logistic"}, OptionError, r"needs moments=HeadPass\(model, loader\).* got None"
    yield {**one, "refit": "logistic", "moments": labelled}, OptionError, r"HeadPass\(model, loader\).*got HeadMoments"
    yield {**one, "refit": "discriminant"}, OptionError, r"needs moments=.*by_class=True\), got None"
    yield {**one, "refit": "binary", "moments": unlabelled}, OptionError, "collected without labels; use .*by_class"
    yield {**one, "refit": "least_squares", "moments": labelled}, OptionError, "needs a table"
    yield {**one, "refit": "logistic", "moments": whole, "unseen": "dense"}, OptionError, "another scale"
    yield {**one, "refit": "logistic", "moments": HeadPass(network(), [lacking])}, OptionError, "no sample of class 2 "
    yield {**one, "refit": "discriminant", "moments": moments_of(*lacking)}, OptionError, "no sample of class 2 "
    yield {**one, "k": 7, "refit": "logistic", "moments": whole}, OptionError, r"k must be an integer in \[1, 6\]"
    yield {**one, "refit": "logistic", "moments": HeadPass(other, [(features, labels)])}, ShapeError, "another head"
    yield {**one, "refit": "logistic", "moments": HeadPass(network(), [(features, many)])}, LabelError, "label"
    yield {**one, "refit": "discriminant", "moments": HeadPass(network(), [(features, many)])}, LabelError, "label"
    yield {**one, "refit": RefitOptions("binary", shared=1), "moments": labelled}, OptionError, "raise shared"
    yield {**one, "refit": RefitOptions("binary", shared=7), "moments": labelled}, OptionError, r"shared .*\[1, 6\]"
    yield (
        {"filters": table(), "k": 1, "refit": RefitOptions("binary", shared=3), "moments": labelled},
        OptionError, "pass filters=None",
    )  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), list(refusals()))
def test_what_a_refit_from_labels_cannot_use_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        decompose(network(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sgd"}, "name must be one of"),
        ({"name": "omp", "l2": 1e-3}, 'l2 is for "logistic"'),
        ({"name": "logistic", "l2": 0}, "l2 must be"),
        ({"name": "logistic", "shared": 3}, 'are for "binary"'),
        ({"name": "binary", "exact": True}, "pass shared="),
        ({"name": "binary", "shared": 0}, "shared must be"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        RefitOptions(**options)


def test_an_exact_choice_for_a_large_head_is_refused():
    with pytest.raises(OptionError, match=r"more than 4096 unknowns; use exact=False"):
        exact_assignment(torch.rand(100, 50), torch.eye(50), 2, 10)
