"""What ships: trained networks and real images, and that they are what they say."""

from pathlib import Path

import pytest
import torch

from captum_classfilters import LabelSensitiveGate, PathDecoupler, assets, metrics
from captum_classfilters.assets import (
    SEEDS,
    gate_file,
    load_demo_network,
    load_images,
    load_network,
    paths_file,
    save_images,
    save_network,
)
from captum_classfilters.assets.networks import SmallAlexNet, SmallResNet
from captum_classfilters.core.errors import FileFormatError, OptionError
from captum_classfilters.core.files import read, write

FOLDER = Path(assets.__file__).parent


@pytest.mark.parametrize("seed", SEEDS)
def test_each_network_reaches_its_accuracy_on_images_it_never_saw(seed):
    model, meta = load_demo_network(seed)
    assert (meta["seed"], meta["epochs"], meta["data"]) == (seed, 15, "fashion_mnist")
    assert meta["test_accuracy"] > 0.93
    sample = load_images("test")
    with torch.inference_mode():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in sample.batches())
    # 1,000 of the 10,000 images: three standard errors around the accuracy on all
    assert right / 1000 == pytest.approx(meta["test_accuracy"], abs=3 * (0.94 * 0.06 / 1000) ** 0.5)


@pytest.mark.parametrize(("method", "seed"), [("lsg", 0), ("fixed-gate", 0)])
def test_a_network_trained_with_a_gate_ships_with_that_gate(method, seed):
    model, meta = load_demo_network(seed, method)
    assert (meta["seed"], meta["epochs"], meta["method"]) == (seed, 15, method)
    gate = LabelSensitiveGate.load(gate_file(seed, method))
    assert (gate.weight.shape, gate.layer) == (model.fc.weight.shape, "fc")
    assert bool((gate.counts > 0).all())
    assert bool((gate.weight.amax(0) == 1).all())
    if method == "fixed-gate":
        assert torch.equal(gate.weight, LabelSensitiveGate.fixed(10, 64).weight)
    else:
        assert gate.density == pytest.approx(0.2, abs=0.005)
    images, labels = load_images("test").batches(1000)[0]
    with torch.inference_mode():
        plain = (model(images).argmax(1) == labels).double().mean().item()
        # trained with this gate and no other: without the channels that it gives a class, the class is lost
        masked = metrics.class_masking(model, gate.class_filters(), [(images[:300], labels[:300])], threshold=0.5)
    assert plain == pytest.approx(meta["test_accuracy"], abs=3 * (0.94 * 0.06 / 1000) ** 0.5)
    recall = masked[masked.masked == masked.class_name].groupby("control").recall.mean()
    assert recall[False] < recall[True] - 0.5


def test_the_network_like_alexnet_is_saved_with_what_it_takes_to_build_it(tmp_path):
    torch.manual_seed(0)
    model = SmallAlexNet(5, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), widths=(4, 6, 8, 8, 12)).eval()
    save_network(model, tmp_path / "network.safetensors", {"seed": 3})
    loaded, meta = load_network(tmp_path / "network.safetensors")
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    assert isinstance(loaded, SmallAlexNet)
    assert (loaded.widths, meta["seed"]) == ((4, 6, 8, 8, 12), 3)
    convolutions = [m for m in SmallAlexNet().modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [48, 96, 192, 192, 256]
    with pytest.raises(ValueError, match="widths must be five numbers"):
        SmallAlexNet(widths=(1, 2))


def test_images_are_stratified_and_the_splits_differ():
    train, test = load_images("train"), load_images("test")
    for sample in (train, test):
        assert sample.images.shape == (1000, 1, 28, 28)
        assert sample.images.dtype == torch.uint8
        assert sample.labels.bincount().tolist() == [100] * 10
        assert len(sample.class_names) == 10
    assert not set(map(bytes, train.images.numpy())) & set(map(bytes, test.images.numpy()))


def test_images_are_saved_without_loss(tmp_path, monkeypatch):
    shipped = {split: load_images(split) for split in ("train", "test")}
    save_images(tmp_path / "fashion_mnist_sample.safetensors", **shipped)
    monkeypatch.setattr(assets, "_HERE", tmp_path)
    for split, sample in shipped.items():
        saved = load_images(split)
        assert torch.equal(saved.images, sample.images)
        assert torch.equal(saved.labels, sample.labels)
        assert saved.class_names == sample.class_names


def test_what_ships_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 8e6


def test_every_file_that_ships_can_be_asked_for():
    trainings = [(method, seed) for method, seeds in assets.SHIPPED.items() for seed in seeds]
    expected = {f"{assets.network_name(seed, method)}.safetensors" for method, seed in trainings}
    expected |= {gate_file(seed, method).name for method, seed in trainings if method in ("lsg", "fixed-gate")}
    expected |= {paths_file(seed).name for method, seed in trainings if method == "decoupled"}
    assert {path.name for path in FOLDER.glob("*.safetensors")} == expected | {"fashion_mnist_sample.safetensors"}


def test_a_network_saved_before_widths_existed_still_loads(tmp_path):
    old, new = FOLDER / "resnet20_s0.safetensors", tmp_path / "old.safetensors"
    tensors, meta = read(old, kind="SmallResNet", version=1)
    assert set(meta["config"]) == {"depth", "num_classes", "mean", "std"}
    assert set(SmallResNet().state_dict()) == set(tensors)
    write(new, tensors, kind="SmallResNet", version=1, meta=meta)
    assert (load_network(new)[0].widths, load_network(new)[0].stem_stride) == ((16, 32, 64), 1)


def test_widths_and_stem_stride_change_what_they_name(tmp_path):
    torch.manual_seed(0)
    model = SmallResNet(8, 5, widths=(4, 8, 24), stem_stride=2).eval()
    shapes = {}
    for name in ("conv1", "layer1", "layer2", "layer3"):
        getattr(model, name).register_forward_hook(
            lambda m, i, out, name=name: shapes.update({name: (*out.shape[1:],)})
        )
    images = torch.rand(2, 1, 32, 32)
    expected = model(images)
    assert shapes == {"conv1": (4, 16, 16), "layer1": (4, 16, 16), "layer2": (8, 8, 8), "layer3": (24, 4, 4)}
    assert model.fc.in_features == 24
    save_network(model, tmp_path / "network.safetensors", {})
    torch.testing.assert_close(load_network(tmp_path / "network.safetensors")[0](images), expected, rtol=0, atol=0)


def test_a_network_is_saved_with_all_it_takes_to_build_it(tmp_path):
    torch.manual_seed(0)
    model = SmallResNet(8, 5, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).eval()
    save_network(model, tmp_path / "network.safetensors", {"seed": 3})
    loaded, meta = load_network(tmp_path / "network.safetensors")
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    assert meta["seed"] == 3
    assert not loaded.training


def test_the_depth_is_the_number_of_layers_with_weights():
    for depth in (20, 32, 44, 56):
        layers = [m for m in SmallResNet(depth).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        shortcuts = [m for m in layers if getattr(m, "kernel_size", None) == (1, 1)]
        assert len(layers) - len(shortcuts) == depth


def test_the_decoupled_network_ships_with_its_controllers_and_its_paths_depend_on_the_image():
    model, meta = load_demo_network(0, "decoupled")
    decoupler = PathDecoupler(model).load(paths_file()).eval()
    assert (meta["method"], meta["seed"], meta["target_rate"]) == ("decoupled", 0, 0.5)
    paths = decoupler.paths(load_images("test").batches())
    right = (paths.predictions == paths.labels).double().mean()
    assert float(right) == pytest.approx(meta["test_accuracy"], abs=3 * (0.92 * 0.08 / 1000) ** 0.5)
    # what a training must reach to ship
    information = metrics.path_information(decoupler, paths)
    assert information.cross_entropy[(information.layer == "all") & ~information.control].item() < 1.8
    states = paths.states()
    assert states.dynamic.sum() / states.channels.sum() > 0.3
    assert float(paths.macs().double().mean()) < 0.6 * paths.costs.dense


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load_demo_network(7), OptionError, r"seed must be one of \[0, 1, 2\] for method 'std', got 7"),
        (
            lambda: load_demo_network(1, "fixed-gate"),
            OptionError,
            "make_networks.py resnet20_fixed_gate_s1 --to",
        ),
        (lambda: load_demo_network(1, "lsg"), OptionError, "make_networks.py resnet20_lsg_s1 --to"),
        (lambda: paths_file(1), OptionError, "make_networks.py resnet20_decoupled_s1 --to"),
        (lambda: load_demo_network(0, "gate"), OptionError, r"method must be one of \['std', 'lsg', .*, got 'gate'"),
        (lambda: gate_file(0, "std"), OptionError, "were trained without a gate"),
        (lambda: load_images("validation"), OptionError, 'split must be "train" or "test"'),
        (lambda: SmallResNet(21), ValueError, "depth must be 6 n"),
        (lambda: SmallResNet(20, widths=(16, 32)), ValueError, "widths must be three numbers"),
    ],
)
def test_what_does_not_ship_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_broken_network_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(FileFormatError):
        load_network(tmp_path / "x.safetensors")
