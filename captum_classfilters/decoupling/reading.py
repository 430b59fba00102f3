"""Paths as they are read off forwards: batch by batch, or in one pass over a loader.

N images, L layers with K_l channels, K in all.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import (
    EmptyLoaderError,
    LabelError,
    LayerError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from captum_classfilters.core.stream import check_labels, check_range, unpack, value_to_model
from captum_classfilters.decoupling.calls import calls_of
from captum_classfilters.decoupling.macs import Costs, count_costs
from captum_classfilters.decoupling.paths import Paths
from captum_classfilters.decoupling.run import not_finite
from captum_classfilters.decoupling.saved import fingerprint

if TYPE_CHECKING:
    from captum_classfilters.decoupling.decoupler import PathDecoupler

# by decoupler and size of its inputs: to find them takes longer than the forward of a small batch
_COSTS: WeakKeyDictionary["PathDecoupler", dict[tuple[int, ...], Costs]] = WeakKeyDictionary()


class PathReader:
    """Reads the paths of one batch after another; what stays the same for all of them is found out once.

    Args:
        decoupler: Borrowed in eval mode by whoever reads.
        logits: Also keep g of eq. 2.

    Raises:
        OptionError: Gates are frozen, and so no image's own.
    """

    def __init__(self, decoupler: "PathDecoupler", logits: bool = False) -> None:
        if decoupler.is_frozen:
            raise OptionError("inside frozen() gates are given and are no image's path; collect paths outside of it")
        self.decoupler, self.logits = decoupler, logits
        self.like = next(decoupler.model.parameters())
        self._fingerprint = fingerprint(decoupler)
        self._costs: Costs | None = None
        self._size: tuple[int, ...] = ()

    def place(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs on the model's device, in its dtype, without their history."""
        placed = (value_to_model(value, self.like.device, self.like.dtype) for value in inputs)
        return tuple(value.detach() if isinstance(value, Tensor) else value for value in placed)

    @torch.no_grad()
    def read(self, inputs: tuple[Any, ...], labels: Any = None, index: int = 0) -> Paths:
        """One forward.

        Args:
            inputs: Of the model, placed.
            labels: ``(N,)``, or None.
            index: Of the batch, for messages.

        Raises:
            ShapeError: The model gives no logits ``(N, C)``; images of another size than before.
            NonFiniteError: Gates or logits are not finite.
            LabelError: Labels do not fit.
        """
        output, gates = self.decoupler.gate_logits(*inputs) if self.logits else self.decoupler.gates(*inputs)
        if not isinstance(output, Tensor) or output.dim() != 2:
            shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(f"expected logits (N, C) from the model, got {shown}")
        row = torch.cat(gates, 1)
        if not torch.isfinite(row).all():
            raise NonFiniteError(f"{not_finite(self.decoupler.layers, gates)}; look at batch {index}")
        if not torch.isfinite(output).all():
            raise NonFiniteError(f"the logits of batch {index} hold NaN or infinity; look at that batch")
        if labels is not None:
            labels = check_labels(labels, len(row), index).cpu()
            check_range(labels, output.shape[1], index)
        codes = np.packbits((row > 0).cpu().numpy(), axis=1, bitorder="little")
        kept = row.float().cpu() if self.logits else None
        return Paths(
            torch.from_numpy(codes), output.argmax(1).cpu(), labels, self.decoupler.layers, self.decoupler.channels,
            output.shape[1], self._fingerprint, self._costs_for(inputs, index), kept,
        )  # fmt: skip

    def _costs_for(self, inputs: tuple[Any, ...], index: int) -> Costs:
        shape = tuple(inputs[0].shape[1:])
        if self._costs is None:
            self._size = shape
            known = _COSTS.setdefault(self.decoupler, {})
            if shape not in known:
                one = tuple(value[:1] if isinstance(value, Tensor) else value for value in inputs)
                known[shape] = costs_of(self.decoupler, one)
            self._costs = known[shape]
        elif shape != self._size:
            raise ShapeError(
                f"batch {index} has inputs of size {shape}, those before it {self._size}; what a path costs depends "
                "on that: resize the images, or collect each size for itself"
            )
        return self._costs


def collect(decoupler: "PathDecoupler", loader: Iterable[Any], *, logits: bool, show_progress: bool) -> Paths:
    """See `PathDecoupler.paths`."""
    if not isinstance(loader, Iterable):
        raise OptionError(f"expected a DataLoader, an iterable of batches or one batch, got {type(loader).__name__}")
    reader = PathReader(decoupler, logits)
    parts = []
    with borrowed(decoupler), tqdm(_batches(loader), disable=not show_progress, desc="paths") as bar:
        for index, raw in enumerate(bar):
            inputs, labels = unpack(raw, False, index)
            if len(inputs[0]):
                parts.append(reader.read(reader.place(inputs), labels, index))
    if not parts:
        raise EmptyLoaderError("the loader gave no sample; expected at least one batch")
    labelled = sum(part.labels is not None for part in parts)
    if labelled not in (0, len(parts)):
        raise LabelError(f"{labelled} of {len(parts)} batches have labels; give them for all or for none")
    return Paths.merge(*parts)


def _batches(loader: Iterable[Any]) -> Iterable[Any]:
    """A tensor is one batch: to go through it would give single images."""
    return [loader] if isinstance(loader, Tensor) else iter(loader)


def costs_of(decoupler: "PathDecoupler", example: tuple[Any, ...]) -> Costs:
    """See `PathDecoupler.costs`."""
    try:
        calls = calls_of(decoupler.model)
    except LayerError:
        calls = calls_of(decoupler.model, example)
    controllers: Any = decoupler.controllers
    work = sum(each.squeeze.weight.numel() + each.excite.weight.numel() for each in controllers)
    return count_costs(decoupler.model, calls, decoupler.units, example, work)
