"""Numbers in float64, also of devices that have none, such as Apple's and some accelerators of others.

There they are brought to the CPU first: what comes out is exact all the same, and small beside the forward pass.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has no float64.

    Example:
        >>> wide(torch.tensor([1.0], dtype=torch.bfloat16)).dtype
        torch.float64
    """
    return tensor.to(home(tensor.device)).double()


def home(device: torch.device) -> torch.device:
    """Where numbers of a device are summed up: the device itself, or the CPU where it has no float64."""
    return device if _has_float64(device.type) else torch.device("cpu")


def full_precision(kind: str) -> AbstractContextManager[Any]:
    """No autocast on devices of this kind; some know none."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def portions(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of equal length, at most ``size`` rows at a time; of empty ones one empty portion.

    Unlike ``torch.split`` with a size above the length, which some devices do not survive.

    Example:
        >>> [part.tolist() for part, in portions(2, torch.arange(3))]
        [[0, 1], [2]]
    """
    for start in range(0, max(len(tensors[0]), 1), size):
        yield tuple(tensor[start : start + size] for tensor in tensors)


@cache
def _has_float64(kind: str) -> bool:
    if kind in ("cpu", "cuda", "meta"):
        return True
    try:
        return bool(torch.zeros(1, dtype=torch.float64, device=kind).dtype == torch.float64)
    except (TypeError, RuntimeError):
        return False
