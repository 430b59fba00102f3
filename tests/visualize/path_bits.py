"""Paths from plain bits, and what a picture shows."""

import numpy as np
import torch

from captum_classfilters.decoupling import Paths


def drawn(ax, index=0):
    return np.ma.filled(ax.images[index].get_array().astype(float), np.nan)


def texts(labels):
    return [label.get_text() for label in labels]


def legend(ax):
    return texts(ax.get_legend().get_texts())


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def paths_of(bits, labels, channels, classes):
    """`Paths` of gates ``(N, K)``."""
    codes = torch.from_numpy(np.packbits(np.asarray(bits, np.uint8), axis=1, bitorder="little"))
    labels = None if labels is None else torch.as_tensor(labels)
    layers = tuple(f"conv{index + 1}" for index in range(len(channels)))
    return Paths(codes, torch.zeros(len(codes), dtype=torch.int64), labels, layers, channels, classes, "f", costs=None)
