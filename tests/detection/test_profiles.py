"""`ClassProfiles`: shares, distances and margins against loops over images, channels and classes."""

import math

import numpy as np
import pytest
import torch
from examples import CHANNELS, CLASSES, LAYERS, paths_of, planted

from captum_classfilters.core import errors
from captum_classfilters.detection import ClassProfiles

K = sum(CHANNELS)


def share(seen, everything, channel, smoothing):
    """Of the rows ``seen`` that open a channel, drawn towards that of all rows."""
    prior = (sum(row[channel] for row in everything) + 0.5) / (len(everything) + 1)
    return (sum(row[channel] for row in seen) + smoothing * prior) / (len(seen) + smoothing)


def rows_of(paths, label):
    pairs = zip(paths.bits().tolist(), paths.predictions.tolist(), strict=True)
    return [row for row, said in pairs if said == label]


def distances_by_loops(bits, seen, everything, smoothing):
    """Of one path to a class, layer by layer."""
    found, first = [], 0
    for channels in CHANNELS:
        total = 0.0
        for channel in range(first, first + channels):
            p = share(seen, everything, channel, smoothing)
            total -= math.log(p) if bits[channel] else math.log(1 - p)
        found.append(total / channels)
        first += channels
    return found


@pytest.mark.parametrize("smoothing", [0.3, 2.0, 50.0])
def test_distances_are_the_mean_surprise_of_each_layer(smoothing):
    known, judged = planted(25)[0], planted(7, seed=4)[1]
    profiles = ClassProfiles(known, smoothing)
    everything = known.bits().tolist()
    expected = [
        distances_by_loops(bits, rows_of(known, said), everything, smoothing)
        for bits, said in zip(judged.bits().tolist(), judged.predictions.tolist(), strict=True)
    ]
    found = profiles.distances(judged)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    whole = [sum(d * k for d, k in zip(row, CHANNELS, strict=True)) / K for row in expected]
    np.testing.assert_allclose(profiles.whole(found), whole, rtol=1e-12)


def test_among_judges_each_by_the_others_of_its_class():
    known, _ = planted(20)
    profiles = ClassProfiles(known, 1.5)
    rows, said = known.bits().tolist(), known.predictions.tolist()
    expected = []
    for number, (bits, label) in enumerate(zip(rows, said, strict=True)):
        others = [row for n, row in enumerate(rows) if said[n] == label and n != number]
        # the prior stays that of all
        expected.append(distances_by_loops(bits, others, rows, 1.5))
    found = profiles.distances(known, among=True)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # it is farther from the others than from a mean that it is in itself
    assert (profiles.whole(found) > profiles.whole(profiles.distances(known))).all()


def test_a_path_alone_in_its_class_is_judged_by_all():
    known, _ = planted(20)
    label = CLASSES - 1
    one = [number for number, said in enumerate(known.predictions.tolist()) if said != label]
    known = known[[*one, 2]]
    found = ClassProfiles(known).distances(known, among=True)[-1]
    expected = distances_by_loops(known.bits()[-1].tolist(), [], known.bits().tolist(), 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_features_are_distances_and_how_much_nearer_another_class_is():
    known, (judged, attacked) = planted(30)[0], planted(9, seed=6)
    profiles = ClassProfiles(known)
    everything = known.bits().tolist()
    for paths, sign in ((judged, -1), (attacked, 1)):
        found = profiles.features(paths)
        assert found.shape == (9, len(CHANNELS) + 2)
        np.testing.assert_allclose(found[:, :3], profiles.distances(paths), rtol=0)
        np.testing.assert_allclose(found[:, 3], profiles.whole(profiles.distances(paths)), rtol=0)
        margins = []
        for bits, said in zip(paths.bits().tolist(), paths.predictions.tolist(), strict=True):
            to = [
                np.average(distances_by_loops(bits, rows_of(known, label), everything, 2.0), weights=CHANNELS)
                for label in range(CLASSES)
            ]
            margins.append(to[said] - min(to[label] for label in range(CLASSES) if label != said))
        np.testing.assert_allclose(found[:, 4], margins, rtol=1e-9)
        # clean ones are nearest to their own class, attacked ones to another than the network says
        assert (np.sign(margins) == sign).all()


def test_a_class_that_was_never_seen_is_like_all_and_nothing_is_infinite():
    open_all = paths_of(torch.ones(6, K, dtype=torch.bool), torch.tensor([0, 0, 0, 1, 1, 1]))
    shut = paths_of(torch.zeros(2, K, dtype=torch.bool), torch.tensor([0, 2]))
    profiles = ClassProfiles(open_all, 1e-3)
    assert np.isfinite(profiles.features(shut)).all()
    prior = 6.5 / 7
    np.testing.assert_allclose(profiles.distances(shut)[1], [-math.log(1 - prior)] * 3, rtol=1e-9)
    # the more of a class were seen open, the stranger is one that is shut
    assert (profiles.distances(shut)[0] > profiles.distances(shut)[1]).all()


def test_no_paths_have_no_distances():
    known, _ = planted(20)
    assert ClassProfiles(known).distances(known[:0]).shape == (0, 3)
    assert ClassProfiles(known).features(known[:0]).shape == (0, 5)
    assert repr(ClassProfiles(known)) == "ClassProfiles(20 paths, 3 classes, 3 layers)"


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda p: ClassProfiles(p[:0]), errors.OptionError, "expected Paths of clean images, got none"),
    (lambda p: ClassProfiles(p.bits()[:1, :2]), errors.OptionError, "expected Paths of clean images, got Tensor"),
    (lambda p: ClassProfiles(p, 0), errors.OptionError, "smoothing must be a finite number above 0; got 0"),
    (lambda p: ClassProfiles(p, math.nan), errors.OptionError, "smoothing must be a finite number above 0; got nan"),
])  # fmt: skip
def test_bad_profiles_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(planted(6)[0])


@pytest.mark.parametrize(("others", "message"), [
    ({"fingerprint": "0" * 16}, r"of another network .*\(fingerprints 0{16} and f{16}\)"),
    ({"layers": (*LAYERS[:2], "fc")}, "of other layers than those the detector was fitted on"),
])  # fmt: skip
@pytest.mark.parametrize("among", [False, True])
def test_paths_of_others_are_refused(others, message, among):
    profiles, (strange, _) = ClassProfiles(planted(6)[0]), planted(6, **others)
    for call in (lambda: profiles.distances(strange, among=among), lambda: profiles.features(strange)):
        with pytest.raises(errors.MergeError, match=message):
            call()
