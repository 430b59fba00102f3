"""Reads the paths of one batch after another."""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from captum_classfilters.core.errors import NonFiniteError, OptionError, ShapeError
from captum_classfilters.core.labels import check_range
from captum_classfilters.core.outputs import LogitReader, two_logits
from captum_classfilters.core.stream import Placement
from captum_classfilters.decoupling.costs import Costs
from captum_classfilters.decoupling.paths import Paths
from captum_classfilters.decoupling.units import not_finite

# By decoupler and size of its inputs: finding the costs takes longer than the forward of a small batch
_COSTS: WeakKeyDictionary[Any, dict[tuple[int, ...], Costs]] = WeakKeyDictionary()


class PathReader:
    """Reads the paths of one batch after another; fingerprint and costs are computed once for all of them.

    Args:
        decoupler: A `PathDecoupler`, which the caller borrows in eval mode.
        logits: Also keep g of eq. 2.

    Raises:
        OptionError: Gates are frozen, and so no image's own.
    """

    def __init__(self, decoupler: Any, logits: bool = False) -> None:
        if decoupler.is_frozen:
            raise OptionError(
                "inside frozen() all images have the same gates, which are no image's path; collect paths outside of it"
            )
        self.decoupler, self.logits = decoupler, logits
        self.placement = Placement.of(decoupler.model)
        self._fingerprint = decoupler.fingerprint()
        self._costs: Costs | None = None
        self._size: tuple[int, ...] = ()

    def place(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Inputs on the model's device, in its dtype, without their history."""
        placed = (self.placement.move(value) for value in inputs)
        return tuple(value.detach() if isinstance(value, Tensor) else value for value in placed)

    @torch.no_grad()
    def read(self, inputs: tuple[Any, ...], labels: Tensor | None = None, index: int = 0) -> Paths:
        """One forward.

        Args:
            inputs: The model's inputs, where `place` has put them.
            labels: ``(N,)`` int64, or None.
            index: Number of the batch, for messages.

        Raises:
            HeadError, ShapeError: The model gives no logits ``(N, C)``; images of another size than before.
            NonFiniteError: Gates or logits are not finite.
            LabelError: Labels do not fit.
        """
        with LogitReader() as reader:
            output, gates = self.decoupler.gate_logits(*inputs) if self.logits else self.decoupler.gates(*inputs)
            logits = two_logits(logits_of(output, reader))
        row = torch.cat(gates, 1)
        if not torch.isfinite(row).all():
            raise NonFiniteError(f"{not_finite(self.decoupler.layers, gates)}; look at batch {index}")
        if not torch.isfinite(logits).all():
            raise NonFiniteError(f"the logits of batch {index} hold NaN or infinity; look at that batch")
        if labels is not None:
            labels = labels.cpu()
            check_range(labels, logits.shape[1], index)
        codes = np.packbits((row > 0).cpu().numpy(), axis=1, bitorder="little")
        kept = row.float().cpu() if self.logits else None
        return Paths(
            torch.from_numpy(codes), logits.argmax(1).cpu(), labels, self.decoupler.layers, self.decoupler.channels,
            logits.shape[1], self._fingerprint, self._costs_for(inputs, index), kept,
        )  # fmt: skip

    def _costs_for(self, inputs: tuple[Any, ...], index: int) -> Costs:
        shape = tuple(inputs[0].shape[1:])
        if self._costs is None:
            self._size = shape
            by_size = _COSTS.setdefault(self.decoupler, {})
            if shape not in by_size:
                one = tuple(value[:1] if isinstance(value, Tensor) else value for value in inputs)
                by_size[shape] = self.decoupler.costs(*one)
            self._costs = by_size[shape]
        elif shape != self._size:
            raise ShapeError(
                f"batch {index} has inputs of size {shape}, those before it {self._size}; the cost of a path depends "
                "on the size: resize the images, or collect each size for itself"
            )
        return self._costs


def logits_of(output: Any, reader: LogitReader) -> Tensor:
    """``(N, C)`` of what a model returned."""
    logits = reader.logits(output)
    if logits.dim() != 2:
        raise ShapeError(f"expected logits (N, C) from the model, got {tuple(logits.shape)}; pass a classifier")
    return logits
