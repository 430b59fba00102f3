"""A user's folder of images, checkpoint and module, made anew; and the command line called as from a shell."""

import sys

import pytest
import torch
from cli_examples import NETWORK, Ran, draw_images, small_resnet

from captum_classfilters.__main__ import main
from captum_classfilters.cli import commands


@pytest.fixture
def run(capsys, monkeypatch):
    """Call the command line: words in, exit status and what was printed out."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words):
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Ran(status, *capsys.readouterr())

    return call


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests that do not look at them: a run takes a second less."""
    monkeypatch.setattr(commands, "_draw", lambda *_: None)


@pytest.fixture(scope="session")
def shared_images(tmp_path_factory):
    """``train`` and ``val``, 6 images of each of 3 classes: to be read only."""
    root = tmp_path_factory.mktemp("pets")
    draw_images(root / "train", 0)
    draw_images(root / "val", 1)
    return root


@pytest.fixture
def pets(tmp_path):
    """6 images of each of 3 classes, to be spoilt."""
    return draw_images(tmp_path / "pets", 0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A ResNet-18 for three classes, as a training script saves it."""
    path = tmp_path_factory.mktemp("weights") / "pets.pt"
    torch.save({"epoch": 3, "state_dict": small_resnet().state_dict()}, path)
    return path


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the current folder, by a name that no other test has imported."""
    name = f"net_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)
