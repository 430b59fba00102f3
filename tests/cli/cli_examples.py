"""What the tests of the command line are made of: images, a network, a user's module."""

from copy import deepcopy
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.models import resnet18

CLASSES = ("cat", "dog", "fish")


class Ran(NamedTuple):
    status: int
    out: str
    err: str


def draw_images(folder, seed, count=6, classes=CLASSES):
    """JPEG images, one folder for each class, each class with a colour of its own."""
    generator = np.random.default_rng(seed)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            pixels[:, :, index % 3] //= 4
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg")
    return folder


def small_resnet(classes=3, seed=0):
    """A ResNet-18 whose statistics have seen some images: all of its channels live."""
    return deepcopy(_trained_resnet(classes, seed))


@cache
def _trained_resnet(classes, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = resnet18(num_classes=classes)
        with torch.no_grad():
            for _ in range(5):
                model(torch.randn(16, 3, 32, 32))
    return model.eval()


NETWORK = '''
"""What a user's module looks like."""
from torch import nn

class Net(nn.Module):
    def __init__(self, colours=3, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(colours, 8, 3)
        self.fc = nn.Linear(8, classes)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)))

def grey():
    return Net(1, 10)

def pair():
    return Net(), {"accuracy": 1.0}

def broken():
    raise KeyError("no such config")

def five_colours():
    return Net(5)

number = 7
'''


def append(path, text):
    path.write_text(path.read_text() + text)
