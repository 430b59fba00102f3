"""Numbers in float64, also of devices that have none, such as Apple's and some accelerators of others.

There they are brought to the CPU first: what comes out is exact all the same, and small beside the forward pass.
"""

from functools import cache

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


@cache
def _has_float64(kind: str) -> bool:
    if kind in ("cpu", "cuda", "meta"):
        return True
    try:
        return bool(torch.zeros(1, dtype=torch.float64, device=kind).dtype == torch.float64)
    except (TypeError, RuntimeError):
        return False
