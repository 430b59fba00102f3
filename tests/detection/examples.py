"""What the detection tests share: paths with planted classes, and a network whose gates and answers vary."""

from dataclasses import replace

import torch
from captum.robust import FGSM
from shared import SmallCNN, seeded
from torch import nn

from captum_classfilters.decoupling import Costs, PathDecoupler, Paths

LAYERS = ("conv1", "conv2", "conv3")
CHANNELS = (7, 12, 11)  # 30: not whole bytes
CLASSES = 3


def paths_of(bits, predictions, logits=None, layers=LAYERS, channels=CHANNELS, fingerprint="f" * 16):
    """Packed by hand: eight to a byte, the first in its lowest bit."""
    rows = []
    for row in bits.tolist():
        row = row + [False] * (-len(row) % 8)
        rows.append([sum(bit << i for i, bit in enumerate(row[b : b + 8])) for b in range(0, len(row), 8)])
    codes = torch.tensor(rows, dtype=torch.uint8).reshape(len(bits), -1)
    return Paths(
        codes, predictions, predictions.clone(), layers, channels, CLASSES, fingerprint, Costs((), 0, 0), logits
    )


def planted(count=60, seed=0, flips=0.1, logits=False, **others):
    """``(clean, adversarial)``: near the centre of their class.

    Of the adversarial the network says the next class, and they open gates that others leave shut.
    """
    centres = torch.rand(CLASSES, sum(CHANNELS), generator=torch.Generator().manual_seed(99)) < 0.5
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    found = []
    for predictions, attacked in ((labels, False), ((labels + 1) % CLASSES, True)):
        near = centres[labels] | (attacked & (torch.arange(sum(CHANNELS)) >= 20))
        bits = near ^ (torch.rand(count, sum(CHANNELS), generator=generator) < flips)
        # the sign is the bit; the size is another thing that is random
        sizes = torch.rand(bits.shape, generator=generator) + 0.1
        g = torch.where(bits, sizes, -sizes) if logits else None
        found.append(replace(paths_of(bits, predictions, g, **others), labels=labels))
    return tuple(found)


def tints(count=40, seed=3):
    """Images of one colour each with some grain, in [0, 1]: gates see the mean of a colour."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(count, 3, 1, 1, generator=generator)
    return 0.2 * torch.rand(count, 3, 8, 8, generator=generator) + 0.8 * colours


@torch.no_grad()
def decoupler_of(seed=2):
    """Gates on both convolutions, open for about half of the `tints`; FGSM fools it on about half of them."""
    decoupler = PathDecoupler(seeded(SmallCNN(), seed), ("conv1", "conv2"), reduction=1).eval()
    seeded(decoupler.controllers, seed + 1)
    images = tints()
    for index, controller in enumerate(decoupler.controllers):
        controller.excite.bias -= decoupler.gate_logits(images)[1][index].mean(0)
    head, logits = decoupler.model.fc, decoupler(images)
    head.weight /= logits.std(0)[:, None]
    head.bias /= logits.std(0)
    head.bias -= decoupler(images).mean(0)
    return decoupler


def right_and_wrong(decoupler):
    """``(images, labels)``: of every fifth image a label that the network does not say."""
    images = tints()
    labels = decoupler(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 4
    return images, labels


def attack_on(model, kind=FGSM):
    """An attack of Captum's on logits of pixels in [0, 1]."""
    return kind(model, nn.CrossEntropyLoss(reduction="none"), lower_bound=0.0, upper_bound=1.0)


def inverted(images, labels):
    """An attack that changes every pixel of an image by another amount."""
    return 1 - images
