"""Files that are no files, unpack without end, or say odd things: refused shortly, in bounded memory."""

import copy
import gzip
import io
import json
import os
import random
import zipfile

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from captum_classfilters import PathDetector
from captum_classfilters.cli.data import open_source
from captum_classfilters.core.errors import FileFormatError
from captum_classfilters.detection import detectors

skops = pytest.importorskip("skops.io")

VALUES = [None, True, -1, 0, 0.5, 10**8, 10**30, "x", "y" * 10**6, [], {}, [[]], [10**8], "numpy", "builtins", "eval"]


@pytest.fixture
def file(tmp_path):
    draw = np.random.default_rng(0)
    X, y = draw.random((60, 6)), np.arange(60) % 2
    path = tmp_path / "detector.skops"
    PathDetector(LogisticRegression()).fit(X, y).calibrate(X[y == 0]).save(path)
    return path


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("schema.json", "w") as schema:
        for _ in range(100):
            schema.write(b" " * 2**20)


def bomb_inside(path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("data.npy", "w") as array:
        for _ in range(100):
            array.write(b" " * 2**20)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("schema.json", "{}")
        archive.writestr("1.npz", inner.getvalue())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and devices are files of Unix")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pipe, "is a device or a pipe, not a file; give the name of a file that PathDetector.save wrote"),
        (device, "is a device or a pipe, not a file"),
        (bomb, r"unpacks to far more than its \d+ bytes, which no detector does"),
        (bomb_inside, r"unpacks to far more than its \d+ bytes"),
    ],
)
def test_what_is_no_file_or_unpacks_without_end_is_not_read(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr(detectors, "_skops", lambda: None)  # it must not come so far
    make(tmp_path / "file")
    with pytest.raises(FileFormatError, match=message):
        PathDetector.load(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: gzip.compress(bytes(9))[:-10] + b"\xff" * 10, "is not a whole gzip file"),
        (lambda: gzip.compress(bytes(60_000 * 784 + 17), 1), "holds more than the images of Fashion-MNIST"),
    ],
    ids=["damaged", "too long"],
)
def test_packed_data_sets_are_whole_and_bounded(tmp_path, content, message):
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(content())
    with pytest.raises(FileFormatError, match=message):
        open_source(f"fashion_mnist:{tmp_path}", "test")


def places(value, name="schema"):
    """Every entry of lists and tables within ``value``: holder and key."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in entries for place in [(value, key), *places(inner)]]


def attack(path, seed, count):
    """Change the file many times; only short errors of the package may come. How many were refused."""
    draw, whole = random.Random(seed), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    schema, messages = json.loads(parts["schema.json"]), []
    for turn in range(count):
        if turn % 3 == 0:
            raw = bytearray(whole)
            for _ in range(draw.choice([1, 4, 30])):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            path.write_bytes(raw[: draw.choice([len(raw), draw.randrange(len(raw))])])
        else:
            changed = copy.deepcopy(schema)
            holder, key = draw.choice(places(changed))
            if isinstance(holder, dict) and draw.random() < 0.3:
                del holder[key]
            else:
                holder[key] = draw.choice([*VALUES, *(h[k] for h, k in places(schema)[:40])])
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in (parts | {"schema.json": json.dumps(changed).encode()}).items():
                    archive.writestr(name, content)
        try:
            PathDetector.load(path)
        except FileFormatError as error:
            messages.append(str(error))
    assert max(map(len, messages)) < 1500 + len(str(path))
    return len(messages)


@pytest.mark.filterwarnings("ignore")
def test_changed_detectors_are_refused_shortly_or_work(file):
    assert attack(file, seed=17, count=150) >= 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_thousands_of_changed_detectors_are_refused_shortly_or_work(file):
    assert attack(file, seed=18, count=6000) >= 2000
