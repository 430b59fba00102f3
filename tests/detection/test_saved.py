"""Detectors in files: the same after, and nothing but a detector comes out of one."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from examples import planted
from sklearn.ensemble import AdaBoostClassifier, GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from captum_classfilters import HeadPass
from captum_classfilters.core.errors import FileFormatError, NotCalibratedError, OptionError
from captum_classfilters.detection import ClassProfiles, FamiliarityDetector, PathDetector, PathOutlierDetector
from captum_classfilters.detection.detectors import _KIND, _TRUSTED, _VERSION
from captum_classfilters.detection.pairs import stack_pairs

skops = pytest.importorskip("skops.io")
MADE = []
# skops does not trust it: it does not look at the indices that are in it
TREE = "sklearn.tree._tree.Tree"


class Stranger(LogisticRegression):
    """Says when it is made from a file."""

    def __setstate__(self, state):
        MADE.append(type(self).__name__)
        self.__dict__.update(state)


class Pickled:
    """Runs when it is read."""

    def __reduce__(self):
        return MADE.append, ("pickle",)


@pytest.fixture
def judged():
    return stack_pairs(*planted(30, seed=1, logits=True))[0]


@pytest.fixture
def file(tmp_path):
    """Of a small calibrated detector."""
    X, y, _ = stack_pairs(*planted(30))
    path = tmp_path / "detector.skops"
    PathDetector(LogisticRegression()).fit(X, y).calibrate(X[:30]).save(path)
    return path


def rewritten(path, change):
    """The file with another schema."""
    other = path.with_name("other.skops")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "schema.json":
                schema = json.loads(content)
                change(schema)
                content = json.dumps(schema)
            new.writestr(name, content)
    return other


def same(first, second, judged):
    assert np.array_equal(first.predict(judged), second.predict(judged))
    assert np.array_equal(first.strangeness(judged), second.strangeness(judged))
    assert np.array_equal(first.p_value(judged), second.p_value(judged))
    assert np.array_equal(first.alarms(judged), second.alarms(judged))
    assert (first.alpha_, first.n_features_in_) == (second.alpha_, second.n_features_in_)


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inside", "features"), [
    (RandomForestClassifier(10, random_state=0), "bits"), (None, ("bits", "profiles")),
    (AdaBoostClassifier(n_estimators=5, random_state=0), "logits"),
    (GradientBoostingClassifier(n_estimators=5, random_state=0), "profiles"),
    (make_pipeline(StandardScaler(), LogisticRegression()), ["profiles", "logits"]),
], ids=["forest", "default", "ada", "boosting", "pipeline"])  # fmt: skip
def test_a_detector_comes_back_with_its_calibration(tmp_path, judged, inside, features):
    X, y, _ = stack_pairs(*planted(40, logits=True))
    profiles = ClassProfiles(planted(60, seed=4)[0], 1.5)
    detector = PathDetector(inside, features=features, profiles=profiles, random_state=np.random.RandomState(0))
    detector.fit(X, y).calibrate(planted(40, seed=5, logits=True)[0], alpha=0.1)
    detector.save(tmp_path / "detector")
    again = PathDetector.load(tmp_path / "detector", trusted=[TREE])
    same(again, detector, judged)
    assert again.features == features
    assert again.classes_.tolist() == [0, 1]
    with pytest.raises(ValueError, match="of another network"):
        again.predict(planted(5, fingerprint="0" * 16)[0])
    assert np.array_equal(again.profiles.distances(judged), profiles.distances(judged))
    again.fit(X, y)  # it is whole: it can learn again
    with pytest.raises(NotCalibratedError):
        again.p_value(judged)


@pytest.mark.parametrize("kind", ["paths", "array"])
def test_an_outlier_detector_comes_back_with_its_calibration(tmp_path, judged, kind):
    clean, later = planted(60)[0], planted(60, seed=5)[0]
    if kind == "array":
        clean, later, judged = clean.bits(), later.bits(), judged.bits()
    detector = PathOutlierDetector(contamination=0.2, smoothing=3.0).fit(clean).calibrate(later, alpha=0.1)
    detector.save(tmp_path / "detector")
    again = PathOutlierDetector.load(tmp_path / "detector")
    same(again, detector, judged)
    assert again.get_params() == detector.get_params()
    assert again.offset_ == detector.offset_


def test_what_is_not_fitted_or_not_calibrated_stays_so(tmp_path, judged):
    PathDetector(features=("bits",)).save(tmp_path / "one")
    assert not hasattr(PathDetector.load(tmp_path / "one"), "estimator_")
    PathOutlierDetector().fit(planted(30)[0]).save(tmp_path / "two")
    with pytest.raises(NotCalibratedError):
        PathOutlierDetector.load(tmp_path / "two").alarms(judged)


# -- files that are something else -------------------------------------------------------------------------------------


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("readme.txt", "nothing")


def foreign_schema(path):
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("schema.json", "[1, 2")


@pytest.mark.parametrize(("write", "message"), [
    (foreign_zip, "is broken, or no file of a detector"),
    (foreign_schema, "is broken, or no file of a detector"),
    (lambda path: path.write_text("no zip at all"), "is broken, or no file of a detector"),
    (lambda path: path.write_bytes(b""), "is broken, or no file of a detector"),
    (lambda path: path.write_bytes(pickle.dumps(Pickled())), "is broken, or no file of a detector"),
    (lambda path: path.mkdir(), "is a folder, not a file; give the name of a file that"),
    (lambda path: skops.dump([1, 2], path), "holds no detector; expected what PathDetector.save wrote"),
    (lambda path: skops.dump({"kind": "tree"}, path), "holds no detector"),
    (lambda path: skops.dump(LogisticRegression(), path), "holds no detector"),
    (lambda path: skops.dump({"kind": _KIND, "version": _VERSION}, path), "holds a NoneType, expected a PathDetector"),
    (lambda path: skops.dump({"kind": _KIND, "version": _VERSION, "detector": LogisticRegression()}, path),
     "holds a Logist"),
    (lambda path: skops.dump({"kind": _KIND, "version": 0, "package": "0.0.9"}, path),
     r"has schema version 0, this package reads 2; use the package that wrote it \(0\.0\.9\)"),
    (lambda path: PathOutlierDetector().fit(planted(9)[0]).save(path), "PathOutlierDetector, expected a PathDetector"),
    (lambda path: planted(9)[0].save(path), "is broken, or no file of a detector"),
], ids=["zip", "schema", "text", "empty", "pickle", "folder", "list", "dict", "estimator", "nothing in it", "inside",
        "old", "outlier", "paths"])  # fmt: skip
def test_other_files_are_refused(tmp_path, write, message):
    MADE.clear()
    write(tmp_path / "file")
    with pytest.raises(FileFormatError, match=message):
        PathDetector.load(tmp_path / "file")
    assert not MADE


def test_no_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        PathOutlierDetector.load(tmp_path / "nothing")


def test_a_detector_is_no_outlier_detector(file):
    with pytest.raises(FileFormatError, match="holds a PathDetector, expected a PathOutlierDetector"):
        PathOutlierDetector.load(file)


def test_truncated_files_are_refused(file):
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="is broken, or no file of a detector"):
            PathDetector.load(file)


def test_one_flipped_byte_is_refused_or_does_not_matter(file, judged):
    """Dates and the like are not looked at; anything else is noticed, and never by another error."""
    whole, known = file.read_bytes(), PathDetector.load(file)
    places = np.random.default_rng(0).choice(len(whole), 250, replace=False)
    refused = 0
    for place in [*places, *range(len(whole) - 250, len(whole))]:  # the end has the list of what is in the file
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            same(PathDetector.load(file), known, judged)
        except FileFormatError:
            refused += 1
    assert refused > 250


# -- types -------------------------------------------------------------------------------------------------------------


def test_types_that_are_not_trusted_are_not_made(tmp_path, judged):
    X, y, _ = stack_pairs(*planted(30))
    detector = PathDetector(Stranger()).fit(X, y).calibrate(X)
    detector.save(tmp_path / "strange")
    MADE.clear()
    with pytest.raises(
        FileFormatError, match=r"holds types that are not trusted: .*Stranger; .* pass trusted=\["
    ) as told:
        PathDetector.load(tmp_path / "strange")
    with pytest.raises(FileFormatError, match="not trusted"):
        PathDetector.load(tmp_path / "strange", trusted=["collections.Counter"])
    assert not MADE
    name = f"{Stranger.__module__}.Stranger"
    assert name in str(told.value)
    same(PathDetector.load(tmp_path / "strange", trusted=[name]), detector, judged)
    assert MADE
    for wrong in (name, True):
        with pytest.raises(OptionError, match=rf"full names of types, got {wrong!r}. Call load\(path\) without"):
            PathDetector.load(tmp_path / "strange", trusted=wrong)


@pytest.mark.parametrize("inside", [None, AdaBoostClassifier(n_estimators=2)], ids=["forest of the README", "AdaBoost"])
def test_the_types_that_a_file_needs_are_named_and_the_remedy_can_be_copied(tmp_path, judged, inside):
    X, y, _ = stack_pairs(*planted(30, logits=True))
    detector = PathDetector(inside, random_state=0).fit(X, y).calibrate(X)
    detector.save(tmp_path / "detector")
    with pytest.raises(FileFormatError, match="holds types that are not trusted: ") as told:
        PathDetector.load(tmp_path / "detector")
    remedy = str(told.value).rpartition("load it with load(path, ")[2]
    again = eval(f"PathDetector.load(path, {remedy}", {"PathDetector": PathDetector, "path": tmp_path / "detector"})
    same(again, detector, judged)


@pytest.mark.parametrize(("module", "kind"), [("subprocess", "Popen"), ("test_saved", "Stranger"), ("os", "system")])
@pytest.mark.parametrize("depth", ["all", "detector"])
def test_a_type_written_into_the_file_is_not_made(file, module, kind, depth):
    """Where this package's own class stood: its name alone is trusted, and not the place."""

    def change(schema):
        node = schema
        if depth == "detector":
            node = schema["content"]["detector"]
        node["__module__"], node["__class__"] = module, kind

    MADE.clear()
    with pytest.raises(FileFormatError):
        PathDetector.load(rewritten(file, change))
    assert not MADE


def test_a_file_of_a_version_whose_detectors_lay_elsewhere_is_refused_without_a_wrong_remedy(file):
    def change(schema):
        schema["content"]["detector"]["__module__"] = "captum_classfilters.detection.detector"

    with pytest.raises(FileFormatError, match=r"written by another version .*detection.detector.PathDetector.*; fit"):
        PathDetector.load(rewritten(file, change))


def test_the_file_names_no_type_that_is_not_known(file):
    """What is trusted is what is in these files, and no more."""
    X, y, _ = stack_pairs(*planted(30))
    PathDetector(LogisticRegression(), features="profiles", profiles=ClassProfiles(planted(30)[0])).fit(X, y).save(file)
    PathOutlierDetector().fit(X).save(file.with_name("outlier"))
    FamiliarityDetector().fit(X).save(file.with_name("mahalanobis"))
    FamiliarityDetector("class_gaussian").fit(X).save(file.with_name("class_gaussian"))
    head_pass = HeadPass(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), [(torch.rand(9, 4), torch.arange(9) % 2)])
    FamiliarityDetector("vim").fit(head_pass).save(file.with_name("vim"))
    files = [file, *(file.with_name(name) for name in ("outlier", "mahalanobis", "class_gaussian", "vim"))]
    assert {name for one in files for name in skops.get_untrusted_types(file=one)} == set(_TRUSTED)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_failing_save_leaves_the_old_file_whole(file, judged, monkeypatch):
    whole, known = file.read_bytes(), PathDetector.load(file)

    def half(content, path):
        path.write_bytes(whole[:50])
        raise OSError("no space left")

    monkeypatch.setattr(skops, "dump", half)
    with pytest.raises(OSError, match="no space left"):
        known.save(file)
    assert file.read_bytes() == whole
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    monkeypatch.undo()
    known.calibrate(judged).save(file)
    same(PathDetector.load(file), known, judged)


def test_no_folder_to_write_into(tmp_path, file):
    detector = PathDetector.load(file)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        detector.save(tmp_path / "no" / "detector")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        detector.save(tmp_path)
