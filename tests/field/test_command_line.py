"""The command line on folders, files and shells as people have them: nothing is lost without a word."""

import argparse
import csv
import errno
import io
import json
import os
import signal
import sys
from pathlib import PurePosixPath

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model, get_model_weights

from captum_classfilters import ClassFilters
from captum_classfilters.__main__ import main
from captum_classfilters.cli import commands
from captum_classfilters.cli.data import Loader, Preprocessing, open_source
from captum_classfilters.cli.models import _ZOOS, find_model
from captum_classfilters.core.errors import OptionError

HOW = Preprocessing(3, 8, 8, (0.0,) * 3, (1.0,) * 3)
NETWORK = """
import os, signal
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.calls = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), 0

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)))

class Asserting(Net):
    def forward(self, images):
        assert len(images) < 2, "one at a time"
        return super().forward(images)

class Killed(Net):
    def forward(self, images):
        self.calls += 1
        if self.calls == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(images)
"""


@pytest.fixture
def field(tmp_path, monkeypatch, capsys):
    """A folder of two classes, a network beside it, and the command line run on them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(commands, "_draw", lambda *_: None)
    name = f"field_net_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(NETWORK)
    root = draw(tmp_path / "pets", ("cat", "dog"))

    def call(*words, model="Net", folder=root, size=("--image-size", "8")):
        capsys.readouterr()
        status = main(["attribute", f"{name}:{model}", str(folder), "--out", "out", *size, *map(str, words)])
        return status, *capsys.readouterr()

    call.root, call.out = root, tmp_path / "out"
    yield call
    sys.modules.pop(name, None)


def draw(root, names, count=3):
    generator = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def read(root, how=HOW):
    loader = Loader(open_source(str(root), None), how, 64, 0, False)
    return loader, list(loader)


# -- pixels ------------------------------------------------------------------------------------------------------------


def test_16_bit_images_keep_their_brightness(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    (tmp_path / "cat").mkdir()
    Image.fromarray(pixels).save(tmp_path / "cat" / "1.png")
    Image.fromarray(pixels).save(tmp_path / "cat" / "2.tiff")
    _, batches = read(tmp_path)
    expected = torch.from_numpy(pixels.astype(np.float64) / 65535).float()
    for image in batches[0][0]:
        assert (image - expected).abs().max() < 0.5 / 255 + 1e-6


def test_pixels_without_a_known_range_are_skipped_and_named(field):
    for number, kind in enumerate((np.int32, np.float32)):
        Image.fromarray(np.full((12, 12), 1000, kind)).save(field.root / "cat" / f"deep{number}.tiff")
    status, out, err = field("--json")
    assert status == 0
    assert "2 images could not be read and were skipped" in err
    assert json.loads(out)["skipped"] == [f"{field.root}/cat/deep{n}.tiff" for n in (0, 1)]


def test_exif_rotation_is_followed_on_demand_and_said(field, tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned" / "cat").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "turned" / "cat" / "1.png", exif=exif)
    upright = Preprocessing(3, 8, 8, (0.0,) * 3, (1.0,) * 3, exif=True)
    expected = torch.from_numpy(pixels / 255).float().permute(2, 0, 1)
    assert torch.equal(read(tmp_path / "turned")[1][0][0][0], expected)
    assert torch.equal(read(tmp_path / "turned", upright)[1][0][0][0], expected.rot90(-1, (1, 2)))
    assert "EXIF rotation ignored" in field()[1]
    assert "turned as EXIF says" in field("--exif")[1]


def test_a_strip_and_a_pipe_are_skipped_and_counted(field):
    Image.new("L", (1, 65000)).save(field.root / "cat" / "strip.png")
    os.mkfifo(field.root / "cat" / "pipe.png")
    status, out, err = field("--json", size=("--image-size", "64"))
    assert status == 0
    assert json.loads(out)["skipped"] == [f"{field.root}/cat/strip.png"]
    assert "pipe.png (not a regular file)" in err


@pytest.mark.parametrize("option", ["--resize", "--image-size"])
def test_sizes_are_bounded(field, option):
    status, _, err = field(option, "200000")
    assert status == 1
    assert "may be at most 8192 pixels, got 2" in err


# -- files and folders -------------------------------------------------------------------------------------------------


def test_hidden_copies_links_and_other_files(field, tmp_path):
    cat = field.root / "cat"
    (cat / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/0-checkpoint.png", "3.jfif", "notes.psd"):
        (cat / name).write_bytes((cat / "0.png").read_bytes())
    draw(tmp_path / "elsewhere", ("many",), count=2)
    (field.root / "dog" / "more").symlink_to(tmp_path / "elsewhere" / "many")
    (cat / "loop").symlink_to(field.root / "cat")
    (field.root / "eel").symlink_to(tmp_path / "elsewhere" / "many")
    source = open_source(str(field.root), None)
    assert source.class_names == ("cat", "dog", "eel")
    assert [list(source.labels).count(label) for label in range(3)] == [4, 5, 2]
    assert set(source.left_out) == {str(cat / ".ipynb_checkpoints"), str(cat / "notes.psd")}
    (field.root / "eel").unlink()
    (field.root / "stray.png").write_bytes(b"")
    status, out, err = field("--json")
    assert status == 0
    assert "3 files left out" in err
    assert set(json.loads(out)["left_out"]) == {*source.left_out, str(field.root / "stray.png")}


@pytest.mark.parametrize("names", [("Train", "Test"), ("training_set", "test_set"), ("TrainData", "val2017")])
def test_splits_of_any_spelling_are_no_classes(field, tmp_path, names):
    for name in names:
        draw(tmp_path / "parts" / name, ("cat", "dog"))
    status, _, err = field(folder=tmp_path / "parts")
    assert status == 1
    assert "are splits" in err


def test_classes_called_like_words_of_splits_stay_classes(tmp_path):
    for name in ("train station", "tram", "testudo"):
        draw(tmp_path / name, ("one",))
    assert len(open_source(str(tmp_path), None).class_names) == 3


@pytest.mark.parametrize("name", [b"caf\xe9", b"red\x1b[31m", b"=cmd|x", b"price_$10_$20"])
def test_odd_folder_names_reach_no_terminal_and_no_spreadsheet(field, name):
    (field.root / "dog").rename(os.fsdecode(os.fsencode(field.root / "") + b"/" + name))
    status, out, err = field()
    assert status == 0, err
    text = (field.out / "top.csv").read_text(encoding="utf-8")
    assert "\x1b" not in out + err + text
    cells = {row["class"] for row in csv.DictReader(io.StringIO(text))}
    assert len(cells) == 2
    assert not any(cell.startswith("=") for cell in cells)


def test_a_list_of_classes_with_a_mark_and_blanks(field, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfdog \r\n cat\t\r\n\r\n")
    status, _, err = field("--classes", tmp_path / "list.txt")
    assert status == 0, err
    assert ClassFilters.load(field.out / "filters.safetensors").class_names == ("dog", "cat")


# -- runs that end early, and what stays -------------------------------------------------------------------------------


def test_sigterm_keeps_a_table_of_all_classes(field):
    before = signal.getsignal(signal.SIGTERM)
    status, _, err = field("--batch-size", "2", model="Killed")
    assert status == 143
    assert signal.getsignal(signal.SIGTERM) is before
    kept = ClassFilters.load(field.out / "filters.partial.safetensors")
    # class by class, the first two batches would be cats alone
    assert kept.seen.all()
    assert "ended early" in err


def test_a_failed_run_leaves_no_folder(field):
    assert field("--k", "99")[0] == 1
    assert not field.out.exists()


def test_files_of_an_earlier_run_are_named(field):
    field.out.mkdir()
    for name in ("filters_margin.safetensors", "notes.txt"):
        (field.out / name).write_text("")
    err = field()[2]
    assert "from an earlier run, not of this one: filters_margin.safetensors in" in err


def test_an_error_of_the_users_network_is_told_in_words(field):
    status, _, err = field(model="Asserting")
    assert status == 1
    assert "AssertionError: one at a time (raised in " in err
    assert "Traceback" not in err


def test_a_reader_that_leaves_early_stops_only_the_prose(field, monkeypatch):
    class Head(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Head())
    assert field()[0] == 0
    assert (field.out / "filters.safetensors").is_file()


def test_bars_at_a_terminal_and_none_into_a_pipe(field, monkeypatch):
    assert "100%" not in field()[2]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "100%" in field()[2]
    assert "100%" not in field("--quiet")[2]


def test_a_batch_size_without_end(field):
    assert field("--batch-size", 10**30)[0] == 0


@pytest.mark.parametrize("model", [":two", "..:x", "a.:b", "a:b..c"])
def test_odd_model_names(field, tmp_path, capsys, model):
    assert main(["attribute", model, str(field.root), "--out", str(field.out)]) == 1
    assert "expected" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_named(field, tmp_path):
    torch.save(nn.Linear(300, 300).state_dict(), tmp_path / "net.pt")
    whole = (tmp_path / "net.pt").read_bytes()
    for size in (len(whole) // 2, 100, len(whole) - 30):
        (tmp_path / "net.pt").write_bytes(whole[:size])
        status, _, err = field("--weights", tmp_path / "net.pt")
        assert status == 1
        assert str(tmp_path / "net.pt") in err


# -- checkpoints of others ---------------------------------------------------------------------------------------------


def small_state():
    model = timm.create_model("test_resnet.r160_in1k", num_classes=2)
    torch.manual_seed(0)
    return {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in model.state_dict().items()}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: prefixed(s, "model."), ""),
        (lambda s: prefixed(s, "net."), ""),
        (lambda s: prefixed(s, "backbone."), ""),
        (lambda s: prefixed(s, "_orig_mod.module."), ""),
        (lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")}, "'n_averaged'"),
        (
            lambda s: {
                "epoch": 3,
                "pytorch-lightning_version": "2.5.0",
                "state_dict": {**prefixed(s, "model."), "criterion.weight": torch.ones(2)},
                "hyper_parameters": {"lr": 0.1},
                "optimizer_states": [{"state": {}, "param_groups": []}],
            },
            "1 tensors not under 'model.' are left out: 'criterion.weight'",
        ),
        (lambda s: {"model": s, "args": argparse.Namespace(lr=0.1, output=PurePosixPath("runs"))}, ""),
        (lambda s: {k.replace("fc.", "fc.1."): t for k, t in s.items()}, "fc.1.weight is read as fc.weight"),
        (lambda s: {"state_dict": s, "state_dict_ema": prefixed(s, "")}, "others are under 'state_dict_ema'"),
    ],
)
def test_checkpoints_as_training_scripts_save_them(tmp_path, wrap, said):
    state = small_state()
    torch.save(wrap(state), tmp_path / "net.ckpt")
    network = found_network(tmp_path / "net.ckpt")
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert said in network.about


def found_network(path, name="timm:test_resnet.r160_in1k", key=None):
    options = argparse.Namespace(
        model=name, weights=path, checkpoint_key=key, pretrained=False, random_weights=False, num_classes=None
    )
    return find_model(options, 2)


def test_the_checkpoint_key_chooses(tmp_path):
    state = small_state()
    doubled = {name: 2 * tensor for name, tensor in state.items()}
    torch.save({"state_dict": state, "ema": doubled}, tmp_path / "net.pt")
    weight = found_network(tmp_path / "net.pt", key="ema").model.state_dict()["fc.weight"]
    assert torch.equal(weight, doubled["fc.weight"])
    with pytest.raises(OptionError, match="no state dict under 'swa'; it has 'state_dict', 'ema'"):
        found_network(tmp_path / "net.pt", key="swa")


def test_a_timm_network_is_fed_as_its_configuration_says(tmp_path):
    torch.save(small_state(), tmp_path / "net.pt")
    preprocessing = found_network(tmp_path / "net.pt").preprocessing
    config = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    assert preprocessing.crop == config.input_size[-1] == 160
    assert preprocessing.mean == tuple(config.mean)
    assert preprocessing.std == tuple(config.std)
    assert preprocessing.interpolation == config.interpolation


@pytest.mark.parametrize("name", ["inception_v3", "efficientnet_b7", "regnet_y_16gf", "vit_b_16", "resnet50"])
def test_torchvision_networks_are_fed_as_their_weights_say(name):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((900, 700))
    theirs = get_model_weights(name).IMAGENET1K_V1.transforms()(image)
    ours = _ZOOS["torchvision"].usual_preprocessing(name, None).transform()(image)
    torch.testing.assert_close(ours, theirs)


def test_weights_of_a_torchvision_network_choose_its_size(tmp_path):
    model = get_model("squeezenet1_1", weights=None, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    network = found_network(tmp_path / "net.pt", "torchvision:squeezenet1_1")
    assert (network.preprocessing.resize, network.preprocessing.crop) == (256, 224)
    # the sets of small images are not enlarged to that
    assert network.guessed


@pytest.mark.parametrize(("name", "auxiliary"), [("inception_v3", "AuxLogits"), ("googlenet", "aux")])
def test_networks_with_auxiliary_heads(tmp_path, name, auxiliary):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_model(name, weights=None, num_classes=2, init_weights=False, transform_input=True).eval()
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(auxiliary)}
    torch.save(state, tmp_path / "net.pt")
    network = found_network(tmp_path / "net.pt", f"torchvision:{name}")
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(network.model.eval()(image), model(image))
    namespace = {}
    exec("\n".join(network.recipe), namespace)
    assert namespace["model"].transform_input
    assert namespace["model"].state_dict().keys() == state.keys()


# -- is it the right network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "share"), [("('dog',)", "0.500"), ("('cat', 'dog')", "1.000")])
def test_accuracy_on_the_images_read_is_told_and_chance_is_warned_of(field, tmp_path, right, share):
    for name, value in (("cat", 0), ("dog", 255)):
        (tmp_path / "plain" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (12, 12), (value,) * 3).save(tmp_path / "plain" / name / f"{number}.png")
    (module,) = tmp_path.glob("field_net_*.py")
    knows = 30.0 if "cat" in right else 0.0
    module.write_text(
        NETWORK
        + f"""
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]) * {knows})
            self.fc.bias.copy_(torch.tensor([0.0, 0.1]))

    def forward(self, images):
        return self.fc(images.mean((2, 3)))
"""
    )
    status, out, err = field("--k", "2", model="Plain", folder=tmp_path / "plain")
    assert status == 0, err
    assert f"Accuracy of the network on the 24 images read: {share}" in out
    assert ("the usual reasons are" in err) == (share == "0.500")
