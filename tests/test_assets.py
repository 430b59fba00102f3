"""What ships: three trained networks and real images, and that they are what they say."""

import pytest
import torch

from captum_classfilters.assets import SEEDS, load_demo_network, load_images, load_network, save_network
from captum_classfilters.assets.networks import SmallResNet
from captum_classfilters.core.errors import FileFormatError, OptionError


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


def test_images_are_stratified_and_the_splits_differ():
    train, test = load_images("train"), load_images("test")
    for sample in (train, test):
        assert sample.images.shape == (1000, 1, 28, 28)
        assert sample.images.dtype == torch.uint8
        assert sample.labels.bincount().tolist() == [100] * 10
        assert len(sample.class_names) == 10
    assert not set(map(bytes, train.images.numpy())) & set(map(bytes, test.images.numpy()))


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


def test_what_does_not_ship_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"seed must be one of \[0, 1, 2\], got 7"):
        load_demo_network(7)
    with pytest.raises(OptionError, match='split must be "train" or "test"'):
        load_images("validation")
    with pytest.raises(ValueError, match="depth must be 6 n"):
        SmallResNet(21)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(FileFormatError):
        load_network(tmp_path / "x.safetensors")
