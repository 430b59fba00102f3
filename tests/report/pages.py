"""Networks and images for the tests of the report, and what a page holds, read without a browser."""

import base64
import json
import re

import numpy as np
import torch
from torch import nn

from captum_classfilters import ClassFilters

HOSTILE = (
    "<script>alert(1)</script>",
    "quote \" and ' and \\",
    "</script><img src=x onerror=alert(2)>",
    "猫とキツネ",
    "🦊 fox",
    "x" * 200,
)


class Colours(nn.Module):
    """A convolution whose channels see one colour each, and a head that reads them."""

    def __init__(self, classes, channels=12, colours=3, seed=0):
        super().__init__()
        self.conv = nn.Conv2d(colours, channels, 5, stride=4, padding=2)
        self.fc = nn.Linear(channels, classes)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)))


def batches(classes, count=48, size=28, colours=3, seed=0, batch=16, labels=None):
    """Images in [0, 1] of random colours; ``labels`` are those that occur."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, colours, size, size, generator=generator) * torch.rand(
        count, colours, 1, 1, generator=generator
    )
    occurring = torch.arange(classes) if labels is None else torch.tensor(labels)
    targets = occurring[torch.arange(count) % len(occurring)]
    return list(zip(images.split(batch), targets.split(batch), strict=True))


def random_table(classes, channels, layer="fc", names=None, seed=0):
    scores = torch.rand(classes, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    names = tuple(map(str, range(classes))) if names is None else tuple(names)
    return ClassFilters(scores, scores, torch.ones(classes, dtype=torch.int64), "histogram", layer, names)


def contents(path):
    """The page's data, and its chunks of bytes by name."""
    html = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', html, re.S)[1])
    chunks = re.findall(r'<script type="text/plain" id="chunk-(\w+)">(.*?)</script>', html, re.S)
    return data, {name: base64.b64decode(text) for name, text in chunks}


def stored_weights(data, chunks):
    rows = np.concatenate([np.frombuffer(chunks[f"w{i}"], "<i2") for i in range(-(-len(data["names"]) // 64))])
    return rows.reshape(len(data["names"]), -1) * np.array(data["head"]["scales"])[:, None]


def stored_features(data, chunks):
    count = len(data["examples"])
    rows = np.concatenate([np.frombuffer(chunks[f"f{i}"], "<i2") for i in range(-(-count // 64))])
    return rows.reshape(count, -1) * np.array([example["scale"] for example in data["examples"]])[:, None]
