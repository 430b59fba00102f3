"""ART's one-pixel attack behind our door: one pixel, any range, one seed, a network given back."""

import sys

import numpy as np
import pytest
import torch
from contract import Snapshot
from torch import nn

from captum_classfilters.attacks import OnePixel
from captum_classfilters.core.errors import LabelError, OptionError, ShapeError

pytest.importorskip("art")


NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Spot(nn.Module):
    """Class 1 where the pixel at (6, 2) is brighter than 0.7 in every colour, else class 0; sure of itself."""

    def __init__(self, classes=3, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(60.0, dtype=dtype))
        self.dropout = nn.Dropout(0.5)
        self.classes = classes

    def forward(self, x):
        bright = self.scale * (self.dropout(x)[:, :, 6, 2].amin(1) - 0.7)
        rest = torch.full_like(bright, -100.0)
        return torch.stack([torch.zeros_like(bright), bright, *[rest] * (self.classes - 2)], dim=1)


def dark_images(count, colours, seed=0, dtype=torch.float32):
    """Not multiples of 1/255, and not square."""
    return torch.rand(count, colours, 8, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 0.6


def changed_places(found, images):
    return (found != images).any(1).flatten(1).sum(1).tolist()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize(
    ("colours", "classes", "dtype"), [(1, 3, torch.float32), (3, 3, torch.float64), (1, 2, torch.float32)]
)
def test_it_finds_the_pixel_and_leaves_all_others(colours, classes, dtype, device):
    model = Spot(classes, dtype).to(device)
    images = dark_images(3, colours, dtype=dtype).to(device)
    found = OnePixel(model, max_iter=20)(images, torch.tensor([0, 0, 0]))
    assert found.dtype == dtype
    assert found.device == images.device
    assert (model.eval()(found).argmax(1) == 1).all()
    assert changed_places(found, images) == [1, 1, 1]
    assert (found[:, :, 6, 2] > 0.7).all()
    assert found.max() <= 254 / 255 + 1e-6


def test_images_in_another_range():
    model = Spot()
    images = dark_images(2, 3)
    expected = OnePixel(model, max_iter=20)(images, torch.tensor([0, 0]))
    attack = OnePixel(lambda x: model.eval()((x + 1) / 4), (-1.0, 3.0), max_iter=20)
    found = attack(images * 4 - 1, torch.tensor([0, 0]))
    assert changed_places(found, images * 4 - 1) == [1, 1]
    torch.testing.assert_close((found + 1) / 4, expected, rtol=0, atol=1e-6)


def test_what_is_not_fooled_comes_back_as_it_was():
    images = dark_images(2, 1)
    dull = Spot()
    dull.scale.data.zero_()
    assert torch.equal(OnePixel(dull, max_iter=2)(images, torch.tensor([0, 0])), images)
    # wrong already: class 1 is not what it sees
    assert torch.equal(OnePixel(Spot(), max_iter=2)(images, torch.tensor([1, 2])), images)
    assert OnePixel(Spot())(images[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 1, 8, 5)


def test_what_only_arts_copy_is_fooled_by_is_no_success(monkeypatch):
    images = dark_images(1, 1)
    monkeypatch.setattr(OnePixel, "_attacked", lambda self, attack, image, index: image * 0.5)
    assert torch.equal(OnePixel(Spot())(images, torch.tensor([0])), images)


def test_more_pixels():
    class Both(nn.Module):
        """Class 1 where two pixels are bright: one alone is not enough."""

        def forward(self, x):
            bright = 10 * (x[:, 0, 1, 1] + x[:, 0, 6, 2] - 1.3)
            return torch.stack([torch.zeros_like(bright), bright], dim=1)

    images, labels = torch.zeros(1, 1, 8, 5), torch.tensor([0])
    assert changed_places(OnePixel(Both(), max_iter=5)(images, labels), images) == [0]
    found = OnePixel(Both(), th=2, max_iter=60)(images, labels)
    assert changed_places(found, images) == [2]


def test_the_seed_decides_and_no_other_state_is_touched(capfd):
    images, labels = dark_images(3, 1), torch.tensor([0, 0, 0])
    np.random.seed(7)
    torch.manual_seed(7)
    first = OnePixel(Spot(), max_iter=10)(images, labels)
    after = (np.random.rand(), torch.rand(1))
    np.random.seed(8)
    assert torch.equal(OnePixel(Spot(), max_iter=10)(images, labels), first)
    assert not torch.equal(OnePixel(Spot(), max_iter=10, seed=1)(images, labels), first)
    # images do not share their draws
    same = images[:1].expand(2, -1, -1, -1)
    twins = OnePixel(Spot(), max_iter=10)(same, labels[:2])
    assert not torch.equal(twins[0], twins[1])
    np.random.seed(7)
    torch.manual_seed(7)
    assert after == (np.random.rand(), torch.rand(1))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["success", "KeyboardInterrupt"])
def test_the_model_is_given_back(error):
    model = Spot().train()
    before = Snapshot.of(model)
    attack = OnePixel(model, max_iter=3)
    if error is None:
        attack(dark_images(1, 1), torch.tensor([0]))
    else:
        numpy_state = np.random.get_state()[1].copy()
        asked = []

        def interrupt(module, args):
            asked.append(len(args[0]))
            if len(asked) == 4:
                raise error

        handle = model.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            attack(dark_images(1, 1), torch.tensor([0]))
        handle.remove()
        assert (np.random.get_state()[1] == numpy_state).all()
    Snapshot.of(model).assert_same(before)


def test_it_refuses_what_it_cannot_attack():
    images, labels = dark_images(2, 1), torch.tensor([0, 0])
    with pytest.raises(OptionError, match=r"images must lie in \[0.0, 1.0\], got values from .*; pass bounds="):
        OnePixel(Spot())(images - 0.5, labels)
    with pytest.raises(ShapeError, match="images must be floats"):
        OnePixel(Spot())(images.byte(), labels)
    with pytest.raises(LabelError, match=r"labels must have shape \(2,\)"):
        OnePixel(Spot())(images, labels[:1])
    with pytest.raises(LabelError, match=r"labels must lie in \[0, 3\), got 3"):
        OnePixel(Spot())(images, labels + 3)
    for options, message in (({"th": 0}, "th must be"), ({"max_iter": 0}, "max_iter must be"), ({"seed": -1}, "seed")):
        with pytest.raises(OptionError, match=message):
            OnePixel(Spot(), **options)


def test_without_art_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "art.attacks", None)
    with pytest.raises(OptionError, match=r"pip install 'captum-classfilters\[attacks\]'"):
        OnePixel(Spot())
