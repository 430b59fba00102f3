"""Images of no class of Fashion-MNIST, for detectors of unfamiliar images: made from what packages ship."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lib.recipes import Split

_LETTERS = "ABCDEFGHIJ"  # those of notMNIST
_SIZES = (18, 22, 26)


def letters() -> Tensor:
    """The letters A to J in every font that matplotlib ships, white on black, ``(N, 1, 28, 28)`` in [0, 1]."""
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    drawn = []
    for path in sorted(folder.glob("[!L]*.ttf")):  # LastResort draws boxes
        for size in _SIZES:
            font = ImageFont.truetype(str(path), size)
            for letter in _LETTERS:
                image = Image.new("L", (28, 28))
                ImageDraw.Draw(image).text((14, 14), letter, fill=255, font=font, anchor="mm")
                drawn.append(np.asarray(image))
    pictures = torch.from_numpy(np.stack(drawn))[:, None].float().div_(255)
    # fonts of mathematical signs have no letters
    return pictures[pictures.flatten(1).sum(1) > 10]


def digits() -> Tensor:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged to 20 x 20 in a frame of 4."""
    images = torch.from_numpy(load_digits().images).float()[:, None] / 16
    return F.pad(F.interpolate(images, (20, 20), mode="bilinear"), (4,) * 4)


def turned(split: Split, count: int = 2000) -> Tensor:
    """Test images turned by a quarter."""
    return split.images[:count].float().div_(255).rot90(1, (2, 3))


def noise(count: int = 2000, seed: int = 0) -> dict[str, Tensor]:
    """Uniform noise, and normal noise about grey."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 1, 28, 28)
    return {
        "uniform noise": torch.rand(shape, generator=generator),
        "normal noise": (0.5 + 0.25 * torch.randn(shape, generator=generator)).clamp(0, 1),
    }


def far(test: Split) -> dict[str, Tensor]:
    """All sets by name."""
    return {"letters": letters(), "digits": digits(), "turned": turned(test), **noise()}
