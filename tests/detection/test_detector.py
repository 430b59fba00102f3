"""`PathDetector`: a classifier like any other, on what is read off paths."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from examples import CHANNELS, planted
from sklearn.base import clone
from sklearn.ensemble import AdaBoostClassifier, GradientBoostingClassifier, RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from captum_classfilters.core import errors
from captum_classfilters.detection import ClassProfiles, PathDetector
from captum_classfilters.detection.pairs import stack_pairs


def small_forest(**options):
    return RandomForestClassifier(15, random_state=0, **options)


@pytest.fixture
def pairs():
    """``(X, y, groups)`` of 40 clean and 40 attacked."""
    return stack_pairs(*planted(40, logits=True))


@pytest.fixture
def profiles():
    return ClassProfiles(planted(90, seed=7)[0])


@parametrize_with_checks([PathDetector(random_state=0), PathDetector(LogisticRegression())])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


# -- the classifier inside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [
    small_forest(), AdaBoostClassifier(n_estimators=10, random_state=0),
    GradientBoostingClassifier(n_estimators=10, random_state=0), LogisticRegression(), SVC(), KNeighborsClassifier(3),
], ids=lambda each: type(each).__name__)  # fmt: skip
def test_it_says_what_the_bare_classifier_says_of_the_same_bits(inside, pairs):
    X, y, _ = pairs
    later = stack_pairs(*planted(30, seed=1, flips=0.25))[0]
    bare = clone(inside).fit(X.bits().numpy(), y)
    detector = PathDetector(inside).fit(X, y)
    assert np.array_equal(detector.predict(later), bare.predict(later.bits().numpy()))
    assert set(detector.predict(later)) == {0, 1}
    for method in ("predict_proba", "decision_function"):
        assert hasattr(detector, method) == hasattr(bare, method)
        assert hasattr(PathDetector(inside), method) == hasattr(inside, method)
        if hasattr(bare, method):
            found = getattr(detector, method)(later)
            assert np.array_equal(found, getattr(bare, method)(later.bits().numpy()))
    expected = bare.predict_proba(later)[:, 1] if hasattr(bare, "predict_proba") else bare.decision_function(later)
    assert np.array_equal(detector.strangeness(later), expected)
    assert not hasattr(inside, "classes_")  # a clone was fitted
    assert detector.score(later, stack_pairs(*planted(30))[1]) == np.mean(
        detector.predict(later) == [0] * 30 + [1] * 30
    )


def test_without_a_classifier_it_is_a_forest_that_random_state_seeds(pairs):
    X, y, _ = pairs
    bare = RandomForestClassifier(random_state=3).fit(X.bits().numpy(), y)
    detector = PathDetector(random_state=3).fit(X, y)
    assert isinstance(detector.estimator_, RandomForestClassifier)
    assert len(detector.estimator_) == 100
    assert np.array_equal(detector.predict_proba(X), bare.predict_proba(X.bits().numpy()))
    assert detector.classes_.tolist() == [0, 1]


def test_the_greater_label_is_adversarial(pairs):
    X, y, _ = pairs
    names = np.array(["clean", "attack"])  # in the alphabet the other way round
    assert PathDetector(small_forest()).fit(X, y).strangeness(X)[40:].mean() > 0.9
    detector = PathDetector(small_forest()).fit(X, names[y])
    assert detector.classes_.tolist() == ["attack", "clean"]
    assert detector.strangeness(X)[40:].mean() < 0.1
    assert np.array_equal(detector.predict(X), names[y])


def test_arrays_tensors_and_paths_give_the_same_answers(pairs):
    X, y, _ = pairs
    kinds = (X, X.bits(), X.bits().float().requires_grad_(), np.asarray(X), X.bits().int().tolist())
    expected = PathDetector(small_forest()).fit(X, y).predict_proba(X)
    for learnt in kinds:
        detector = PathDetector(small_forest()).fit(learnt, y)
        assert detector.n_features_in_ == sum(CHANNELS)
        for asked in kinds:
            assert np.array_equal(detector.predict_proba(asked), expected)
    assert np.array_equal(PathDetector(small_forest()).fit(X, torch.as_tensor(y)).predict_proba(X), expected)


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["bits", "logits", "profiles", ("profiles", "bits"), ["bits", "logits"]], ids=str)
def test_features_are_what_is_read_off_paths(pairs, profiles, features):
    X, y, _ = pairs
    later = stack_pairs(*planted(30, seed=1, logits=True))[0]

    def table(paths):
        known = {"bits": paths.bits().numpy(), "logits": paths.logits.numpy(), "profiles": profiles.features(paths)}
        return np.hstack([known[name] for name in ([features] if isinstance(features, str) else features)])

    detector = PathDetector(small_forest(), features=features, profiles=profiles).fit(X, y)
    bare = small_forest().fit(table(X), y)
    assert detector.n_features_in_ == table(X).shape[1]
    assert np.array_equal(detector.predict_proba(later), bare.predict_proba(table(later)))
    assert detector.features == features


def test_profiles_find_what_bits_alone_do_not_say(profiles):
    """Half of the answers are changed, and no bit: to know, one must ask what the network says."""
    clean, _ = planted(200, seed=1)
    moved = replace(clean, predictions=(clean.predictions + 1) % 3)
    X, y, groups = stack_pairs(clean, moved)
    scores = {
        features: cross_val_score(
            PathDetector(small_forest(), features=features, profiles=profiles), X, y, groups=groups, cv=GroupKFold(3)
        ).mean()
        for features in ("bits", "profiles")
    }
    assert scores["bits"] < 0.6
    assert scores["profiles"] > 0.99


# -- in scikit-learn ---------------------------------------------------------------------------------------------------


def test_in_pipelines(pairs):
    X, y, _ = pairs
    bits = FunctionTransformer(lambda paths: paths.bits().numpy().astype(float))
    outer = make_pipeline(bits, StandardScaler(), PathDetector(LogisticRegression())).fit(X, y)
    inner = PathDetector(make_pipeline(StandardScaler(), LogisticRegression())).fit(X, y)
    bare = make_pipeline(StandardScaler(), LogisticRegression()).fit(X.bits().numpy().astype(float), y)
    expected = bare.predict_proba(X.bits().numpy().astype(float))
    np.testing.assert_allclose(outer.predict_proba(X), expected, rtol=1e-9)
    np.testing.assert_allclose(inner.predict_proba(X), expected, rtol=1e-9)
    assert outer[-1].n_features_in_ == 30


def test_grids_over_features_and_the_classifier(pairs, profiles):
    X, y, groups = pairs
    X = X[np.arange(80)[::-1].copy()]  # rows are asked for by arrays
    y, groups = y[::-1], groups[::-1]
    grid = {"features": ["bits", "profiles", ("bits", "logits")], "estimator__max_depth": [1, 3]}
    detector = PathDetector(DecisionTreeClassifier(random_state=0), profiles=profiles)
    search = GridSearchCV(detector, grid, cv=GroupKFold(4), error_score="raise").fit(X, y, groups=groups)
    assert len(search.cv_results_["params"]) == 6
    found = search.best_estimator_
    assert found.estimator_.get_depth() <= search.best_params_["estimator__max_depth"]
    assert found.table_.features == (("profiles",) if found.features == "profiles" else tuple(found.table_.features))
    for params, mean in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        by_hand = []
        for train, test in GroupKFold(4).split(y, y, groups):
            fitted = clone(detector).set_params(**params).fit(X[train], y[train])
            by_hand.append((fitted.predict(X[test]) == y[test]).mean())
        assert mean == pytest.approx(np.mean(by_hand))
    assert search.best_score_ > 0.9


def test_no_twin_of_what_is_tested_is_learnt_from():
    """Rows are told by their bits, which are all different."""
    clean, attacked = planted(40, flips=0.3)
    noise, _ = planted(40, seed=3, flips=0.3)
    X, y, groups = stack_pairs(clean, attacked, noise, groups=torch.randperm(40) + 1000)
    index = {row.tobytes(): number for number, row in enumerate(X.bits().numpy())}
    assert len(index) == 120
    seen = []

    class Watched(PathDetector):
        def fit(self, X, y):  # noqa: N803
            seen.append({index[row.tobytes()] % 40 for row in X.bits().numpy()})
            return super().fit(X, y)

    tested = []

    def score(y_true, y_pred):
        return float(np.mean(y_true == y_pred))

    class Scored(Watched):
        def predict(self, X):  # noqa: N803
            tested.append({index[row.tobytes()] % 40 for row in X.bits().numpy()})
            return super().predict(X)

    scores = cross_val_score(
        Scored(small_forest()), X, y, groups=groups, cv=GroupKFold(4), scoring=make_scorer(score), error_score="raise"
    )
    assert len(scores) == len(seen) == len(tested) == 4
    assert all(not learnt & asked for learnt, asked in zip(seen, tested, strict=True))
    assert all(learnt | asked == set(range(40)) for learnt, asked in zip(seen, tested, strict=True))


def test_a_clone_is_not_fitted_and_learns_the_same(pairs, profiles):
    X, y, _ = pairs
    detector = PathDetector(small_forest(), features=("profiles", "bits"), profiles=profiles).fit(X, y).calibrate(X)
    again = clone(detector)
    for name in ("estimator_", "table_", "calibration_scores_"):
        assert not hasattr(again, name)
    with pytest.raises(NotFittedError):
        again.predict(X)
    assert np.array_equal(again.fit(X, y).predict_proba(X), detector.predict_proba(X))


# -- calibration -------------------------------------------------------------------------------------------------------


def test_alarms_come_at_the_rate_that_was_asked_for(pairs):
    X, y, _ = pairs
    clean, attacked = planted(300, seed=5)
    detector = PathDetector(LogisticRegression()).fit(X, y).calibrate(clean[:199], alpha=0.1)
    scores = np.sort(LogisticRegression().fit(X.bits().numpy(), y).predict_proba(clean[:199].bits().numpy())[:, 1])
    np.testing.assert_allclose(detector.calibration_scores_, scores, rtol=1e-12)
    assert detector.alarms(clean[:199]).sum() <= 20
    assert detector.alarms(attacked).mean() > 0.9
    assert detector.alarms(clean[199:]).mean() < 0.25
    assert (detector.alarms(clean) == (detector.p_value(clean) <= 0.1)).all()


def test_another_fit_forgets_the_calibration(pairs):
    X, y, _ = pairs
    detector = PathDetector(small_forest())
    with pytest.raises(NotFittedError):
        detector.calibrate(X)
    detector.fit(X, y)
    with pytest.raises(errors.NotCalibratedError, match=r"PathDetector is not calibrated: .* call calibrate\("):
        detector.alarms(X)
    assert detector.calibrate(X[:40]).alarms(X).any()
    detector.fit(X, 1 - y)
    for ask in (detector.alarms, detector.p_value):
        with pytest.raises(errors.NotCalibratedError):
            ask(X)
    assert not hasattr(detector, "alpha_")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["bits", "profiles"])
@pytest.mark.parametrize(("others", "message"), [
    ({"fingerprint": "0" * 16}, r"of another network .*\(fingerprints 0{16} and f{16}\)"),
    ({"layers": ("a", "b", "c")}, "of other layers than those the detector was fitted on"),
], ids=["network", "layers"])  # fmt: skip
def test_paths_of_another_network_are_refused(pairs, profiles, features, others, message):
    X, y, _ = pairs
    strange, _ = planted(30, **others)
    detector = PathDetector(small_forest(), features=features, profiles=profiles).fit(X, y)
    for ask in (detector.predict, detector.predict_proba, detector.strangeness, detector.calibrate):
        with pytest.raises(errors.MergeError, match=message):
            ask(strange)
    with pytest.raises(errors.MergeError, match=message.replace("0{16} and f{16}", "f{16} and 0{16}")):
        PathDetector(small_forest(), features=features, profiles=ClassProfiles(strange)).fit(X, y)


@pytest.mark.parametrize(("X", "y", "error", "message"), [
    (lambda p: p[0], lambda y: 0 * y, ValueError, "two classes, clean and adversarial, got only 1 class: .*Outlier"),
    (lambda p: p[0], lambda y: np.arange(80) % 3, ValueError, "Only binary classification is supported"),
    (lambda p: p[0], lambda y: y + 0.5, ValueError, "Unknown label type"),
    (lambda p: p[0], lambda y: y[:7], ValueError, "inconsistent numbers of samples"),
    (lambda p: p[0], lambda y: None, ValueError, "requires y to be passed, but the target y is None"),
    (lambda p: p[0][:0], lambda y: y[:0], ValueError, "0 sample"),
    (lambda p: p[0].bits().float() / 0, lambda y: y, ValueError, "contains NaN|contains infinity"),
    (lambda p: p[0].bits()[:, 0], lambda y: y, ValueError, "Expected 2D array"),
], ids=["one class", "three", "real", "short", "none", "empty", "nan", "1d"])  # fmt: skip
def test_what_scikit_learn_refuses(pairs, X, y, error, message):  # noqa: N803
    with pytest.raises(error, match=message):
        PathDetector(small_forest()).fit(X(pairs), y(pairs[1]))


@pytest.mark.parametrize("features", ["gates", (), ("bits", "gates"), "bit"])
def test_unknown_features_are_refused(pairs, features):
    X, y, _ = pairs
    for given in (X, X.bits()):
        with pytest.raises(errors.OptionError, match=r"features must be some of \['bits', 'logits', 'profiles'\]"):
            PathDetector(features=features).fit(given, y)


def test_features_that_are_not_there_are_refused(pairs, profiles):
    X, y, _ = pairs
    for features in ("logits", "profiles", ("bits", "logits")):
        detector = PathDetector(small_forest(), features=features, profiles=profiles)
        with pytest.raises(errors.OptionError, match=r"features=.* are read off Paths, got .*; pass Paths"):
            detector.fit(X.bits(), y)
        with pytest.raises(errors.OptionError, match=r"this detector reads \(.*\) off Paths, got ndarray"):
            detector.fit(X, y).predict(np.asarray(X))
    plain = replace(X, logits=None)
    with pytest.raises(errors.OptionError, match="needs the gates' logits; collect paths with logits=True"):
        PathDetector(features="logits").fit(plain, y)
    with pytest.raises(errors.OptionError, match="needs the gates' logits"):
        PathDetector(small_forest(), features="logits").fit(X, y).predict(plain)
    for given in (None, plain):
        with pytest.raises(errors.OptionError, match="needs the profiles of clean images, best of many others"):
            PathDetector(features="profiles", profiles=given).fit(X, y)


def test_arrays_of_another_width_are_refused(pairs):
    X, y, _ = pairs
    for learnt in (X, X.bits()):
        detector = PathDetector(small_forest()).fit(learnt, y)
        with pytest.raises(ValueError, match="X has 3 features, but PathDetector is expecting 30"):
            detector.predict(np.zeros((2, 3)))
        with pytest.raises(ValueError, match="contains NaN"):
            detector.predict(np.full((2, 30), np.nan))


def test_methods_that_the_classifier_has_not_are_not_there(pairs):
    X, y, _ = pairs
    detector = PathDetector(LinearSVC()).fit(X, y)
    with pytest.raises(AttributeError, match="predict_proba"):
        detector.predict_proba(X)
    with pytest.raises(AttributeError, match="decision_function"):
        PathDetector().decision_function(X)
