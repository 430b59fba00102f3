"""Squares of pure colours, and a network whose filters are these colours: what each responds to is known."""

import numpy as np
import torch
from torch import nn

COLOURS = ("red", "green", "blue")
SIDE = 16


class Colours(nn.Module):
    """Filter k of ``conv`` is the k-th colour itself: its map is the image's, halved in size."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        self.conv = nn.Conv2d(3, 3, 2, stride=2, bias=False)
        self.last = nn.Conv2d(3, 3, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(3, 2)
        with torch.no_grad():
            for conv in (self.first, self.conv, self.last):
                conv.weight.zero_()
                area = conv.kernel_size[0] ** 2
                for k in range(3):
                    conv.weight[k, k] = 1 / area

    def forward(self, images):
        return self.fc(self.last(self.relu(self.conv(self.first(images)))).mean((2, 3)))


def square(top, left, side=4):
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def painted(masks):
    """Images with a square of 1 in the channel of each colour."""
    images = torch.zeros(len(masks), 3, SIDE, SIDE)
    for image, each in zip(images, masks, strict=True):
        for name, mask in each.items():
            image[COLOURS.index(name), mask] = 1.0
    return images


def in_batches(images, masks, size):
    return [(images[i : i + size], masks[i : i + size]) for i in range(0, len(images), size)]


def numpy_upsample(array, height, width):
    """Bilinear without aligned corners, in float64, one output pixel at a time."""
    h, w = array.shape
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * h / height - 0.5, 0), h - 1)
            u = min(max((x + 0.5) * w / width - 0.5, 0), w - 1)
            t, left = int(v), int(u)
            bottom, right = min(t + 1, h - 1), min(left + 1, w - 1)
            a, b = v - t, u - left
            upper = array[t, left] * (1 - b) + array[t, right] * b
            lower = array[bottom, left] * (1 - b) + array[bottom, right] * b
            out[y, x] = upper * (1 - a) + lower * a
    return out
