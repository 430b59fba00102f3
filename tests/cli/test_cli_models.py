"""MODEL and ``--weights``: what is found, what is loaded, and what is refused in words before a pass starts."""

import sys
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
from cli_examples import CLASSES, append, draw_images, small_resnet
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet18_Weights, _api, resnet18

from captum_classfilters import ClassFilters
from captum_classfilters.cli.models import _ZOOS, aligned, classes_in, fill, read_weights

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = ("--image-size", "32")


@pytest.fixture
def refused(run, shared_images, tmp_path):
    """Run ``attribute`` on a model that is refused; the words on stderr. Nothing was written."""

    def call(*words, data=shared_images / "train"):
        out = tmp_path / "out"
        found = run("attribute", words[0], data, "--out", out, *SMALL, *words[1:])
        assert found.status == 1
        assert found.out == ""
        assert "Traceback" not in found.err
        assert not out.exists()
        assert found.err.startswith("captum-classfilters: error: ")
        return found.err

    return call


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "model_state_dict", "DataParallel", "compiled"],
)
def test_a_checkpoint_is_read_however_it_was_saved(tmp_path, wrap):
    state = small_resnet().state_dict()
    torch.save(wrap(state), tmp_path / "net.ckpt")
    model = resnet18(num_classes=3)
    found, _ = aligned(read_weights(tmp_path / "net.ckpt").tensors, model.state_dict())
    assert list(found) == list(state)
    fill(model, found, tmp_path / "net.ckpt", "resnet18")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_safetensors_and_the_number_of_classes_in_it(run, shared_images, tmp_path):
    # in alphabetical order, as safetensors keeps them: the head is not the last
    save_file(dict(sorted(small_resnet().state_dict().items())), tmp_path / "net.safetensors")
    data = shared_images / "train"
    found = run("attribute", "resnet18", data, "--weights", tmp_path / "net.safetensors", "--out", tmp_path, *SMALL)
    assert found.status == 0, found.err
    assert "weights" in found.out


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0", "vit_b_32", "inception_v3"])
def test_the_head_in_a_file_is_found_by_shape(name):
    zoo = _ZOOS["torchvision"]
    extra = zoo.extra(name, None)
    with torch.device("meta"):
        state = zoo.make(name, 37, **extra).state_dict()
    assert classes_in(state, lambda classes: zoo.make(name, classes, **extra)) == 37
    assert classes_in({}, lambda classes: zoo.make(name, classes, **extra)) is None


def test_a_missing_file(refused, tmp_path):
    assert f"there is no file {tmp_path}/no.pt" in refused("resnet18", "--weights", tmp_path / "no.pt")


@pytest.mark.parametrize(
    ("name", "said"),
    [("net.safetensors", "is not a whole safetensors file"), ("net.pt", "could not be read as a checkpoint")],
)
def test_a_broken_file(refused, tmp_path, name, said):
    (tmp_path / name).write_bytes(b"not weights at all")
    assert f"{tmp_path / name} {said}" in refused("resnet18", "--weights", tmp_path / name)


class Trap:
    """Does something when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_runs_on_load(refused, tmp_path):
    torch.save(small_resnet(), tmp_path / "model.pt")
    assert "whole models run code when they are loaded" in refused("resnet18", "--weights", tmp_path / "model.pt")
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    refused("resnet18", "--weights", tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_something_else(refused, tmp_path):
    torch.save({"losses": [1.0], "epoch": 2}, tmp_path / "log.pt")
    assert "holds a dict of 'losses', 'epoch'" in refused("resnet18", "--weights", tmp_path / "log.pt")


def test_weights_of_another_network_say_which_names(refused, checkpoint):
    said = refused("resnet34", "--weights", checkpoint)
    assert "does not fit torchvision:resnet34" in said
    assert "missing (layer1.2.conv1.weight; " in said
    said = refused("resnet50", "--weights", checkpoint)
    assert "layer1.0.conv1.weight: file (64, 64, 3, 3), network (64, 64, 1, 1); " in said
    assert "unexpected" not in said


def test_classes_of_file_option_and_folders_must_agree(refused, run, checkpoint, shared_images, tmp_path):
    said = refused("resnet18", "--weights", checkpoint, "--num-classes", "7")
    assert f"the head in {checkpoint} has 3 classes, --num-classes says 7" in said
    assert "pass --num-classes 3" in said
    draw_images(tmp_path / "two", 0, classes=("cat", "dog"))
    said = refused("resnet18", "--weights", checkpoint, data=tmp_path / "two")
    assert "tells 3 classes apart" in said
    assert "has 2 ('cat', 'dog')" in said
    assert "--classes FILE" in said
    out = tmp_path / "fine"
    words = ("--weights", checkpoint, "--num-classes", "3", "--out", out)
    assert run("attribute", "resnet18", shared_images / "train", *words, *SMALL).status == 0


# -- torchvision and timm ----------------------------------------------------------------------------------------------


def test_random_weights_are_refused_unless_asked_for(refused, run, shared_images, tmp_path):
    assert "--pretrained" in refused("resnet18")
    found = run("attribute", "resnet18", shared_images / "train", "--random-weights", "--out", tmp_path, *SMALL)
    assert found.status == 0
    assert "note: random weights" in found.err


def test_a_name_is_looked_for_in_torchvision_then_in_timm(run, shared_images, tmp_path):
    for name, package in (("resnet18", "torchvision"), ("timm:resnet18", "timm"), ("resnet10t", "timm")):
        found = run("attribute", name, shared_images / "train", "--random-weights", "--out", tmp_path, *SMALL)
        assert found.status == 0, found.err
        assert f"Network: {package}:" in found.out


def test_unknown_names_get_close_ones(refused):
    assert "resnet18" in refused("resnet81")
    assert "resnet18d" in refused("timm:resnet81d")
    assert "expected torchvision:NAME" in refused("torchvision:")


def test_networks_that_classify_nothing_are_not_offered(refused):
    assert "no classifier is called 'raft_large'" in refused("torchvision:raft_large", "--random-weights")


def test_without_timm(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in refused("timm:resnet18")
    assert "timm is not installed: pip install timm" in refused("resnet10t")


def test_published_weights_come_with_their_preprocessing(run, tmp_path, monkeypatch):
    state = resnet18().state_dict()
    asked = []
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda url, *_, **__: asked.append(url) or state)
    draw_images(tmp_path / "pets", 0, count=1)
    (tmp_path / "all.txt").write_text("\n".join([*CLASSES, *(f"class {n}" for n in range(997))]))
    words = ("--pretrained", "--classes", tmp_path / "all.txt", "--out", tmp_path / "out")
    found = run("attribute", "resnet18", tmp_path / "pets", *words)
    assert found.status == 0, found.err
    assert asked == [ResNet18_Weights.DEFAULT.url]
    assert "published weights" in found.out
    assert "shorter side to 256, centre 224 x 224" in found.out
    assert ClassFilters.load(tmp_path / "out" / "filters.safetensors").counts.sum() == 3
    found = run("attribute", "resnet18", tmp_path / "pets", *words, "--num-classes", "3")
    assert found.status == 1
    assert "the published resnet18 has 1000 classes, --num-classes says 3" in found.err


def test_without_a_network_published_weights_are_an_error_in_words(refused, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(_api, "load_state_dict_from_url", offline)
    said = refused("resnet18", "--pretrained")
    assert "the published weights of torchvision:resnet18 could not be loaded" in said
    assert "pass --weights FILE" in said


def picture(size=(300, 260)):
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy())


def test_preprocessing_is_torchvisions_own():
    theirs = ResNet18_Weights.DEFAULT.transforms()
    ours = _ZOOS["torchvision"].preprocessing(theirs).transform()
    torch.testing.assert_close(ours(picture()), theirs(picture()))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_preprocessing_is_timms_own(name):
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    theirs = timm.data.create_transform(**config, is_training=False)
    ours = _ZOOS["timm"].preprocessing(config).transform()
    torch.testing.assert_close(ours(picture()), theirs(picture()), rtol=0, atol=1e-5)


# -- a function of the user's ------------------------------------------------------------------------------------------


def test_a_function_in_the_current_folder_with_weights(run, shared_images, module, tmp_path):
    net = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(8, 3)})
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    words = ("attribute", f"{module}:Net", shared_images / "train", "--out", "out", *SMALL)
    assert run(*words, "--selector", "weight", "--weights", "net.safetensors").status == 0
    table = ClassFilters.load(tmp_path / "out" / "filters.safetensors")
    torch.testing.assert_close(table.scores, net["fc"].weight.detach().abs().double())
    assert run(*words).status == 0


def test_a_function_is_refused_for_what_is_wrong_with_it(refused, module):
    assert "there is no module 'nowhere'" in refused("nowhere:net")
    assert f"{module} has no 'Ned'; it has Net" in refused(f"{module}:Ned")
    assert "returned tuple; expected a torch.nn.Module" in refused(f"{module}:pair")
    assert "failed: KeyError: 'no such config'" in refused(f"{module}:broken")
    assert "is int, nothing to call" in refused(f"{module}:number")
    assert "leave them out" in refused(f"{module}:Net", "--num-classes", "3")
    assert "takes 5 channels" in refused(f"{module}:five_colours")
    assert "the model has no layer 'head'" in refused(f"{module}:Net", "--layer", "head")


def test_a_module_that_lacks_a_package_says_which(refused, module, tmp_path):
    append(tmp_path / f"{module}.py", "\nimport no_such_package_anywhere\n")
    assert "no_such_package_anywhere" in refused(f"{module}:Net")


def test_a_network_that_takes_other_images(refused, module, tmp_path):
    append(tmp_path / f"{module}.py", "\ndef flat():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))\n")
    said = refused(f"{module}:flat")
    assert "does not take an image of shape (3, 32, 32)" in said
    assert "--image-size" in said


def test_k_of_more_channels_than_there_are(refused, module):
    assert "--k must be an integer in [1, 8]" in refused(f"{module}:Net", "--k", "9")


def test_a_device_that_is_not_there(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "pass --device cpu" in refused("resnet18", "--random-weights", "--device", "cuda")
    assert "--device must be auto, cpu, cuda" in refused("resnet18", "--random-weights", "--device", "gpu")
    for name in ("xla", "meta", "privateuseone"):
        said = refused("resnet18", "--random-weights", "--device", name)
        assert f"--device {name} does not work here (" in said
        assert "pass --device cpu" in said


def test_too_little_memory_is_said_in_words(run, shared_images, module, tmp_path):
    append(
        tmp_path / f"{module}.py",
        "\nimport torch\nclass Big(Net):\n    def forward(self, images):\n        if len(images) > 1:\n"
        "            raise torch.OutOfMemoryError('80 GiB')\n        return super().forward(images)\n",
    )
    found = run("attribute", f"{module}:Big", shared_images / "train", "--out", "out", *SMALL)
    assert found.status == 1
    assert "pass a smaller --batch-size" in found.err


def test_debug_shows_where(run, shared_images, module):
    found = run("attribute", f"{module}:broken", shared_images / "train", "--out", "out", "--debug")
    assert found.status == 1
    assert "Traceback" in found.err
    assert 'raise KeyError("no such config")' in found.err
