"""What paths are worth: what they say of the class, whether it matters which one an image takes, and pruned gates.

N images, C classes, L gated layers with K_l channels.
"""

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import LabelError, MergeError, OptionError, ShapeError
from captum_classfilters.core.intervals import draws_interval, wilson
from captum_classfilters.core.labels import check_range
from captum_classfilters.core.outputs import LogitReader
from captum_classfilters.core.stream import Placement, samples
from captum_classfilters.decoupling.decoupler import PathDecoupler
from captum_classfilters.decoupling.paths import Paths

GATES = ("own", "of another image", "random", "all open")
# Halvings of the share of filters that `l1_gates` keeps
_STEPS = 40


def path_information(decoupler: PathDecoupler, paths: Paths, *, seed: int = 0) -> pd.DataFrame:
    """How well the class can be read from each layer's gates alone: the cross-entropy of eq. 9, on hard gates.

    The entropy of the labels less this cross-entropy bounds the mutual information of class and gates from below
    (eq. 8). Judge it on images that were not trained on.

    Source: "Interpretable neural network decoupling", section 3.2, eqs. 8 and 9. No difference.

    Args:
        decoupler: A trained one: its readers read the class from the gates.
        paths: Paths of the same decoupler, with labels.
        seed: Seed of the control, which reads every image's gates for another image's label.

    Returns:
        One row for each layer and one for ``"all"``, their mean, and the same rows again with ``control=True``.
        Columns: ``layer``, ``cross_entropy`` in nats with ``low`` and ``high`` (Student-t interval over images),
        ``information`` (the bound in nats, at least 0), ``control``.

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
    weights = [reader.weight.detach().cpu().double() for reader in decoupler.readers]  # type: ignore[operator]
    scores = [gate.double() @ weight.T for gate, weight in zip(paths.gates(), weights, strict=True)]
    rows = []
    for control, labels in ((False, paths.labels), (True, shuffled)):
        losses = [F.cross_entropy(logits, labels, reduction="none") for logits in scores]
        # of all layers together: each image's mean over them
        losses.append(torch.stack(losses).mean(0))
        for name, loss in zip((*paths.layers, "all"), losses, strict=True):
            value, low, high = draws_interval(loss)
            rows.append((name, value, low, high, max(entropy - value, 0.0), control))
    return pd.DataFrame(rows, columns=["layer", "cross_entropy", "low", "high", "information", "control"])


def path_accuracy(decoupler: PathDecoupler, loader: Iterable[Any], *, seed: int = 0) -> pd.DataFrame:
    """Accuracy with each image's own path, with that of another image, with a random one as wide, and with all open.

    If paths do not matter, all rows are the same.

    Args:
        decoupler: It is borrowed.
        loader: Batches of ``(inputs, labels)``; the other image is the one before, so shuffle a sorted loader. The
            first image takes the path of the last of its batch, which must have two at least.
        seed: Seed of the random paths: each layer's gates permuted, for each image anew.

    Returns:
        One row for each of `GATES`: ``accuracy``, ``low`` and ``high`` (Wilson), ``images``, and ``control``, True for
        ``"random"``.

    Raises:
        EmptyLoaderError, LabelError, ShapeError: The loader gives no image or bad batches; the first has one image.
    """
    generator = torch.Generator().manual_seed(seed)
    right, images = np.zeros(len(GATES), int), 0
    last: tuple[Tensor, ...] = ()
    with borrowed(decoupler), samples(loader, placement=Placement.of(decoupler.model)) as stream:
        for batch in stream:
            if not last and batch.size == 1:
                raise ShapeError(
                    "the first batch has one image, and there is no other's path yet; begin with two or more"
                )
            with LogitReader() as reader:
                output, own_gates = decoupler.gates(*batch.inputs)
                logits, labels = reader.class_logits(output), cast(Tensor, batch.labels)
            check_range(labels, logits.shape[1], batch.place)
            before = last or tuple(gate[-1:] for gate in own_gates)
            last = tuple(gate[-1:] for gate in own_gates)
            other_gates = (
                tuple(torch.cat([row, gate[:-1]]) for row, gate in zip(before, own_gates, strict=True)),
                tuple(_permuted(gate, generator) for gate in own_gates),
                tuple(torch.ones_like(gate) for gate in own_gates),
            )
            right[0] += int(torch.eq(logits.argmax(1), labels).sum())
            for row, gates in enumerate(other_gates, start=1):
                with decoupler.frozen(gates), LogitReader() as reader:
                    answers = reader.class_logits(decoupler(*batch.inputs)).argmax(1)
                right[row] += int(torch.eq(answers, labels).sum())
            images += batch.size
    low, high = wilson(right, images)
    control = [name == "random" for name in GATES]
    table = {"accuracy": right / images, "low": low, "high": high, "images": images, "control": control}
    return pd.DataFrame(table, index=pd.Index(GATES, name="gates"))


def _permuted(gate: Tensor, generator: torch.Generator) -> Tensor:
    """As many open channels in each row, at random places."""
    order = torch.rand(gate.shape, generator=generator).argsort(1).to(gate.device)
    return gate.gather(1, order)


def l1_gates(decoupler: PathDecoupler, image: Tensor, macs: float) -> tuple[Tensor, ...]:
    """Close the filters of smallest l1 norm, the same share in every gated layer, down to a share of the MACs.

    Source: "Pruning filters for efficient ConvNets" (Li et al. 2017), section 3.1, with one share for all layers; the
    "L1" rows of "Interpretable neural network decoupling", table 2.

    Args:
        decoupler: Its layers are pruned; use the gates in ``decoupler.frozen``.
        image: ``(1, colours, H, W)``: its size is that of the images.
        macs: Share of the network's MACs that may remain, in (0, 1].

    Returns:
        For each layer ``(1, K_l)`` float32, 0 or 1; at least one filter stays in each.

    Raises:
        OptionError: ``macs`` is out of range, or less than what cannot be pruned.
    """
    if not 0 < macs <= 1:
        raise OptionError(f"macs is a share in (0, 1], got {macs!r}")
    first = next(decoupler.model.parameters())
    costs = decoupler.costs(image.to(first.device, first.dtype))
    weights = [decoupler.model.get_submodule(name).weight.detach() for name in decoupler.layers]
    norms = [weight.flatten(1).abs().sum(1) for weight in weights]
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        share = (low + high) / 2
        spent = float(costs.of(_kept(norms, share), controllers=False)) / costs.dense
        low, high = (share, high) if spent <= macs else (low, share)
    gates = _kept(norms, high if macs == 1 else low)
    if float(costs.of(gates, controllers=False)) / costs.dense > macs:
        raise OptionError(
            f"macs={macs} cannot be reached by pruning {len(norms)} layers: one filter in each and what is not gated "
            f"take {float(costs.of(gates, controllers=False)) / costs.dense:.3f}; ask for more"
        )
    return tuple(gate.float().to(weight.device) for gate, weight in zip(gates, weights, strict=True))


def _kept(norms: list[Tensor], share: float) -> list[Tensor]:
    """The strongest ``share`` of each layer's filters, at least one, as ``(1, K_l)`` bool."""
    gates = []
    for norm in norms:
        count = max(1, round(share * len(norm)))
        gate = torch.zeros(1, len(norm), dtype=torch.bool)
        gate[0, norm.topk(count).indices.cpu()] = True
        gates.append(gate)
    return gates
