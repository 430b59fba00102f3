"""Sums over the samples of each class, which no interruption tears, and what follows from such sums.

N samples, C classes, K channels.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_classfilters.core.wide import home, wide

# Sums are kept on a grid of 2**-24: numbers on it add up exactly, in any order, while they stay below 2**29
GRID = 2.0**24


def to_grid(values: Tensor) -> Tensor:
    """Round to the grid on which sums are exact: float64, multiples of 2**-24."""
    return (wide(values) * GRID).round_().div_(GRID)


class _State(NamedTuple):
    counts: Tensor  # (C,) int64
    sums: dict[Hashable, Tensor]  # (C, K) float64 each


class ClassSums:
    """Running sums by class: how many samples, and of each named quantity the sum of its rows.

    Args:
        classes: C.
        channels: K.
        names: The quantities.
        device: Where the sums are kept; on the CPU for a device without float64.
        unrounded: Quantities that are added as they are, in float64: their squares or differences matter, so that the
            grid, on which sums are exact in any order, would be too coarse.

    Example:
        >>> sums = ClassSums(2, 1, ["mass"], torch.device("cpu"))
        >>> sums.add(torch.tensor([1, 1]), {"mass": torch.tensor([[1.0], [2.0]])})
        >>> sums.counts.tolist(), sums["mass"].tolist()
        ([0, 2], [[0.0], [3.0]])
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        names: Sequence[Hashable],
        device: torch.device,
        unrounded: Collection[Hashable] = (),
    ) -> None:
        self._unrounded = frozenset(unrounded)
        device = home(device)
        counts = torch.zeros(classes, dtype=torch.int64, device=device)
        zeros = torch.zeros(classes, channels, dtype=torch.float64, device=device)
        self._state = _State(counts, {name: zeros.clone() for name in names})

    def add(self, classes: Tensor, rows: Mapping[Hashable, Tensor]) -> None:
        """Add a batch: the class of each sample, ``(N,)`` int64, and of each quantity its rows, ``(N, K)``."""
        counts, sums = self._state
        classes = classes.to(counts.device)
        # one assignment at the end: whatever interrupts this, the state is that of whole batches
        self._state = _State(
            counts.index_add(0, classes, torch.ones_like(classes)),
            {name: table.index_add(0, classes, self._plain(name, rows[name])) for name, table in sums.items()},
        )

    def _plain(self, name: Hashable, rows: Tensor) -> Tensor:
        return wide(rows) if name in self._unrounded else to_grid(rows)

    @property
    def counts(self) -> Tensor:
        """``(C,)`` int64."""
        return self._state.counts

    def __getitem__(self, name: Hashable) -> Tensor:
        return self._state.sums[name]


def class_correlation(counts: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """Pearson's correlation of each channel with being of each class, from sums by class.

    Args:
        counts: Samples of each class, ``(C,)``.
        total: Sum of each channel over the samples of each class, ``(C, K)`` float64.
        squares: Sum of its squares, ``(C, K)`` float64.

    Returns:
        ``(C, K)`` float64 in [-1, 1]; 0 where a channel never varies, or where all samples or none are of the class.

    Example:
        >>> features, labels = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 0, 1])
        >>> total, squares = torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[5.0], [16.0]]).double()
        >>> round(class_correlation(torch.tensor([2, 1]), total, squares)[1, 0].item(), 3)
        0.945
    """
    samples = counts.sum().clamp(min=1).double()
    share = counts.double()[:, None] / samples
    mean = total.sum(0) / samples
    variance = (squares.sum(0) / samples - mean**2).clamp(min=0)
    # what rounding leaves of a channel that never varies is no variance
    variance = torch.where(variance > 1e-12 * (squares.sum(0) / samples), variance, 0)
    scale = (variance * share * (1 - share)).sqrt()
    covariance = total / samples - share * mean
    return torch.where(scale > 0, covariance / scale.clamp(min=1e-300), 0.0).clamp(-1, 1)
