"""Nowhere to write, a full disk, Ctrl-C: what was there stays, what was counted is kept, and all of it is said."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from cli_examples import append

from captum_classfilters import ClassFilters, HeadMoments, InfluentialFeatures
from captum_classfilters.cli import commands, demo, prepare
from captum_classfilters.cli.data import Loader, Preprocessing, interleaved, open_source

COMMANDS = ("attribute", "decompose")
FIRST = {"attribute": "filters.safetensors", "decompose": "filters.safetensors"}
SMALL = ("--image-size", "16", "--batch-size", "2")


@pytest.fixture
def words(shared_images, module):
    """A network of eight channels on 18 images, batches of two, into ``out``."""
    return f"{module}:Net", shared_images / "train", "--out", "out", *SMALL


# -- nowhere to write --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_where_the_folder_should_be(run, words, tmp_path, monkeypatch, command):
    (tmp_path / "out").write_text("in the way")
    monkeypatch.setattr(prepare, "find_model", pytest.fail)  # refused before any work
    found = run(command, *words)
    assert found.status == 1
    assert "error: cannot write to out: File exists; choose another folder with --out" in found.err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_permission(run, words, tmp_path, monkeypatch, command):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    # root may write anywhere: a folder's own bits would not stop these tests
    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    monkeypatch.setattr(prepare, "find_model", pytest.fail)
    found = run(command, *words)
    assert found.status == 1
    assert "error: cannot write to out: Permission denied; choose another folder with --out" in found.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_where_a_file_should_be(run, words, tmp_path, monkeypatch, command):
    (tmp_path / "out" / FIRST[command]).mkdir(parents=True)
    monkeypatch.setattr(prepare, "find_model", pytest.fail)
    found = run(command, *words)
    assert found.status == 1
    assert f"cannot write to out: out/{FIRST[command]} is a folder" in found.err


# -- a full disk -------------------------------------------------------------------------------------------------------


def fill_with_old_files(run, words, command, out):
    """A first run's files, each then marked as old."""
    assert run(command, *words, "--k", "2").status == 0
    for path in out.iterdir():
        path.write_bytes(b"old " + path.name.encode())
    return sorted(path.name for path in out.iterdir())


def assert_old(out, names, written=()):
    assert sorted(path.name for path in out.iterdir()) == names  # nothing half written lies beside
    for name in names:
        assert ((out / name).read_bytes() == b"old " + name.encode()) is (name not in written), name


@contextmanager
def no_file_beyond(size):
    """A real error of the system, in the writer itself."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_is_full_already(run, words, monkeypatch, command):
    monkeypatch.setattr(prepare, "find_model", pytest.fail)
    with no_file_beyond(0):
        found = run(command, *words)
    assert found.status == 1
    assert "error: cannot write to out: File too large; choose another folder with --out" in found.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_write_that_fails_in_the_middle(run, words, tmp_path, command):
    names = fill_with_old_files(run, words, command, tmp_path / "out")
    with no_file_beyond(200):
        found = run(command, *words, "--k", "2", "--quiet")
    assert found.status == 1
    assert f"error: cannot write out/{FIRST[command]}: " in found.err
    assert "File too large" in found.err
    assert "the one from before is untouched; make room, or choose another folder" in found.err
    assert_old(tmp_path / "out", names)


@pytest.mark.parametrize(
    ("command", "name", "before"),
    [
        ("attribute", "filters.safetensors", []),
        ("attribute", "top.csv", ["filters.safetensors"]),
        ("attribute", "overlap.png", ["filters.safetensors", "top.csv", "class_filters.png"]),
        ("decompose", "small.safetensors", ["filters.safetensors"]),
        ("decompose", "decompose.json", ["filters.safetensors", "small.safetensors"]),
    ],
)
def test_a_full_disk_leaves_each_old_file(run, words, tmp_path, monkeypatch, command, name, before):
    names = fill_with_old_files(run, words, command, tmp_path / "out")
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    found = run(command, *words, "--k", "2")
    assert found.status == 1
    assert f"error: cannot write out/{name}: No space left on device; the one from before is untouched" in found.err
    assert ("written before that" in found.err) is bool(before)
    assert all(f"out/{written}" in found.err for written in before)
    assert_old(tmp_path / "out", names, before)


def test_the_demo_says_it_too(run, tmp_path, monkeypatch):
    def full(out):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo, "run_demo", full)
    found = run("demo", "--out", tmp_path)
    assert found.status == 1
    assert "No space left on device; choose another folder with --out" in found.err


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

# one call finds the head, and each batch has two images
STOPPING = """
import torch

class Stopping(Net):
    calls = 0

    def forward(self, images):
        Stopping.calls += 1
        if Stopping.calls > 4:
            raise KeyboardInterrupt
        return super().forward(images)

torch.manual_seed(0)
one = Stopping()

def stopping():
    return one
"""


def first_batches(module, data, count):
    """The network, and the batches it saw before it was stopped."""
    how = Preprocessing(3, 18, 16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batches = list(Loader(interleaved(open_source(str(data), None)), how, 2, 0, True))[:count]
    model = sys.modules[module].Net()
    model.load_state_dict(sys.modules[module].one.state_dict())
    return model, batches


@pytest.mark.filterwarnings("ignore::captum_classfilters.UnseenClassWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_counted_before_ctrl_c_is_kept(run, words, module, shared_images, tmp_path, command):
    append(tmp_path / f"{module}.py", STOPPING)
    found = run(command, f"{module}:stopping", *words[1:])
    assert found.status == 130
    assert "what the first 6 images gave is kept in out/filters.partial.safetensors" in found.err
    assert "written before that" not in found.err
    assert found.err.endswith("captum-classfilters: interrupted\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["filters.partial.safetensors"]
    kept = ClassFilters.load(tmp_path / "out" / "filters.partial.safetensors")
    model, batches = first_batches(module, shared_images / "train", 3)
    expected = InfluentialFeatures(model).attribute(batches, class_names=("cat", "dog", "fish"))
    torch.testing.assert_close(kept.scores, expected.scores, rtol=0, atol=0)
    assert kept.counts.tolist() == [2, 2, 2]


def test_of_several_selectors_each_is_kept(run, words, module, tmp_path):
    append(tmp_path / f"{module}.py", STOPPING)
    assert run("attribute", f"{module}:stopping", *words[1:], "--selector", "weight,margin").status == 130
    for name in ("weight", "margin"):
        assert ClassFilters.load(tmp_path / "out" / f"filters_{name}.partial.safetensors").method == name


def test_moments_are_kept(run, words, module, shared_images, tmp_path):
    append(tmp_path / f"{module}.py", STOPPING)
    found = run("decompose", f"{module}:stopping", *words[1:], "--refit", "omp")
    assert found.status == 130
    kept = HeadMoments.load(tmp_path / "out" / "moments.partial.safetensors")
    model, batches = first_batches(module, shared_images / "train", 3)
    torch.testing.assert_close(kept.second, HeadMoments.collect(model, batches).second)
    assert kept.count == 6


def test_ctrl_c_after_the_pass_says_what_is_written(run, words, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_draw", stop)
    found = run("attribute", *words)
    assert found.status == 130
    assert "note: written before that: out/filters.safetensors, out/top.csv" in found.err
    assert ClassFilters.load(tmp_path / "out" / "filters.safetensors").counts.sum() == 18


def test_ctrl_c_before_the_pass(run, words, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "find_model", stop)
    assert run("attribute", *words) == (130, "", "captum-classfilters: interrupted\n")


SLOW = """
import pathlib, time

class Slow(Net):
    def forward(self, images):
        with pathlib.Path("calls").open("a") as file:
            file.write(".")
        time.sleep(0.2)
        return super().forward(images)
"""


def test_a_real_signal_in_a_real_process(words, module, tmp_path):
    append(tmp_path / f"{module}.py", SLOW)
    process = subprocess.Popen(
        [sys.executable, "-m", "captum_classfilters", "attribute", f"{module}:Slow", *map(str, words[1:])],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in the background has its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    calls = tmp_path / "calls"
    while (not calls.exists() or calls.stat().st_size < 4) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    kept = ClassFilters.load(tmp_path / "out" / "filters.partial.safetensors")
    assert 4 <= int(kept.counts.sum()) < 18
