"""Captum's ``target`` where it must be classes: one index, or one for each sample."""

from typing import Any

import torch
from torch import Tensor

from captum_classfilters.core.errors import LabelError


def classes_of(target: Any, samples: int, classes: int, device: torch.device) -> Tensor:
    """The classes as ``(N,)`` int64.

    Args:
        target: An int, or N of them.
        samples: N.
        classes: C.
        device: Where they are wanted.

    Raises:
        LabelError: Not integers, not N of them, or outside ``[0, C)``.
    """
    names = [name for name in (target if isinstance(target, list | tuple) else [target]) if isinstance(name, str)]
    if names:
        raise LabelError(
            f"target must be a class index, got the name {names[0]!r}; use class_names.index({names[0]!r})"
        )
    try:
        labels = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabelError(f"target must be a class index, or one for each sample; got {target!r}") from error
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise LabelError(f"target must be integers, got {labels.dtype}; pass class indices")
    if labels.dim() == 0 or (labels.dim() == 1 and len(labels) == 1):
        labels = labels.reshape(1).expand(samples)
    if labels.shape != (samples,):
        raise LabelError(
            f"target must be an int or {samples} of them, one for each sample; got shape {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise LabelError(f"target must lie in [0, {classes}), got {low if low < 0 else high}")
    return labels.to(device).long()
