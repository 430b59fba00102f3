"""What calculation paths say of the class, layer by layer; and whether it matters which path an image takes.

N images, C classes, L gated layers.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import EmptyLoaderError, LabelError, MergeError, OptionError, ShapeError
from captum_classfilters.core.stream import check_labels, check_range, unpack, value_to_model
from captum_classfilters.decoupling import PathDecoupler, Paths
from captum_classfilters.metrics.intervals import draws_interval, wilson

GATES = ("own", "of another image", "random", "all open")


def path_information(decoupler: PathDecoupler, paths: Paths, *, seed: int = 0) -> pd.DataFrame:
    """How well the class can be read from each layer's gates alone: the cross-entropy of eq. 9, on hard gates.

    The entropy of the labels less this cross-entropy bounds the mutual information of class and gates from below
    (eq. 8). Judge it on images that were not trained on.

    Source: "Interpretable neural network decoupling", section 3.2, eqs. 8 and 9. No difference.

    Args:
        decoupler: Trained: its readers are what reads.
        paths: Of the same decoupler, with labels.
        seed: Of the control, which reads every image's gates for another image's label.

    Returns:
        One row for each layer and one for all, their mean: ``cross_entropy`` in nats with ``low`` and
        ``high`` (Student-t interval over images), ``information`` (the bound, at least 0), ``random`` (the control's
        cross-entropy).

    Raises:
        OptionError: The decoupler has no readers.
        LabelError: The paths have no labels.
        MergeError: They are of another decoupler.
    """
    if decoupler.readers is None:
        raise OptionError("this decoupler has no readers; make it with num_classes= and train it with loss()")
    if paths.labels is None:
        raise LabelError("these paths have no labels; collect them from batches of (inputs, labels)")
    if paths.fingerprint != decoupler.fingerprint():
        raise MergeError("these paths are of another decoupler; collect them with this one")
    shuffled = paths.labels[torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))]
    counts = torch.bincount(paths.labels, minlength=paths.num_classes).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = float(-(shares * shares.log()).sum())
    own, random = [], []
    for gate, reader in zip(paths.gates(), decoupler.readers, strict=True):
        weight = reader.weight.detach().cpu().double()  # type: ignore[operator]
        read = gate.double() @ weight.T
        own.append(F.cross_entropy(read, paths.labels, reduction="none"))
        random.append(F.cross_entropy(read, shuffled, reduction="none"))
    # of all layers together: each image's mean over them
    named = zip((*paths.layers, "all"), (*own, _mean(own)), (*random, _mean(random)), strict=True)
    rows = []
    for name, each, control in named:
        value, low, high = draws_interval(each)
        rows.append((name, value, low, high, max(entropy - value, 0.0), float(control.mean())))
    columns = ["layer", "cross_entropy", "low", "high", "information", "random"]
    return pd.DataFrame(rows, columns=columns).set_index("layer")


def path_accuracy(decoupler: PathDecoupler, loader: Iterable[Any], *, seed: int = 0) -> pd.DataFrame:
    """Accuracy with each image's own path, with that of another image, with a random one as wide, and with all open.

    If paths do not matter, all rows are the same.

    Args:
        decoupler: Borrowed.
        loader: Batches of ``(inputs, labels)``; the other image is the one before, so shuffle a sorted loader. The
            first image takes the path of the last of its batch, which must have two at least.
        seed: Of the random paths: each layer's gates permuted, for each image anew.

    Returns:
        One row for each of `GATES`: ``accuracy``, ``low`` and ``high`` (Wilson), ``images``.

    Raises:
        EmptyLoaderError, LabelError, ShapeError: Bad batches; the first has one image.
    """
    first = next(decoupler.model.parameters())
    generator = torch.Generator().manual_seed(seed)
    right, images = np.zeros(len(GATES), int), 0
    last: tuple[Tensor, ...] = ()
    with borrowed(decoupler):
        for index, raw in enumerate(loader):
            inputs, given = unpack(raw, True, index)
            inputs = tuple(value_to_model(value, first.device, first.dtype) for value in inputs)
            labels = check_labels(given, len(inputs[0]), index).to(first.device)
            if not len(labels):
                continue
            if not last and len(labels) == 1:
                raise ShapeError(
                    "the first batch has one image, and there is no other's path yet; begin with two or more"
                )
            logits, own = decoupler.gates(*inputs)
            check_range(labels, logits.shape[1], index)
            before = last or tuple(gate[-1:] for gate in own)
            last = tuple(gate[-1:] for gate in own)
            others = (
                tuple(torch.cat([row, gate[:-1]]) for row, gate in zip(before, own, strict=True)),
                tuple(_permuted(gate, generator) for gate in own),
                tuple(torch.ones_like(gate) for gate in own),
            )
            right[0] += int((logits.argmax(1) == labels).sum())
            for row, gates in enumerate(others, start=1):
                with decoupler.frozen(gates):
                    right[row] += int((decoupler(*inputs).argmax(1) == labels).sum())
            images += len(labels)
    if not images:
        raise EmptyLoaderError("the loader gave no sample; expected at least one batch of (inputs, labels)")
    low, high = wilson(right, images)
    table = {"accuracy": right / images, "low": low, "high": high, "images": images}
    return pd.DataFrame(table, index=pd.Index(GATES, name="gates"))


def _mean(each: list[Tensor]) -> Tensor:
    return torch.stack(each).mean(0)


def _permuted(gate: Tensor, generator: torch.Generator) -> Tensor:
    """As many open channels in each row, others."""
    order = torch.rand(gate.shape, generator=generator).argsort(1).to(gate.device)
    return gate.gather(1, order)
