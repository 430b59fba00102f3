"""The data sets and images of ``tutorials/recipes``, which is no package, and batches of them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tutorials" / "recipes"))
from data import Data, Split, load
from kanji import calibration, degrade, load_kanji
from train_fashion_mnist import augment

__all__ = ["Data", "Loader", "Split", "augment", "calibration", "degrade", "first", "load", "load_kanji"]


class Loader:
    """Batches of a split, made anew for every pass; floats in [0, 1]."""

    def __init__(self, split: Split, size: int = 500) -> None:
        self._split, self._size = split, size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in zip(*(part.split(self._size) for part in self._split), strict=True):
            yield images.float().div_(255), labels


def first(split: Split, limit: int | None) -> Split:
    """The first ``limit`` images; None: all."""
    return Split(*(part[:limit] for part in split))
