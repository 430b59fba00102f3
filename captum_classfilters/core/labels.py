"""The labels of a batch, in whatever form they come: class indices, or for networks of many labels rows of 0 and 1.

What can mean only one thing is taken; what cannot be a label, or could be another thing too, is refused in words.
N samples, C classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_classfilters.core.errors import LabelError


def check_labels(labels: Any, size: int, index: int | None = None) -> Tensor:
    """Labels as ``(N,)`` int64, or a `LabelError` that says what they look like.

    Taken are integers, whole floats and bools, ``(N,)`` or ``(N, 1)``, and one-hot rows.

    Args:
        labels: What stood in the place of the labels.
        size: N.
        index: Of the batch, if known.

    Example:
        >>> check_labels(torch.tensor([[1.0], [0.0]]), 2).tolist()
        [1, 0]
        >>> check_labels([[0, 0, 1], [1, 0, 0]], 2).tolist()
        [2, 0]
    """
    parsed = parse_labels(labels, size, index)
    if parsed.dim() == 1:
        return parsed
    if not bool((parsed.sum(1) == 1).all()):
        raise LabelError(
            f"labels must be one class for each sample here, got rows of 0 and 1 of shape {tuple(parsed.shape)}"
            f"{_where(index)} with {int(parsed.sum(1).min())} to {int(parsed.sum(1).max())} classes a sample. "
            "InfluentialFeatures.attribute and metrics.accuracy_curve take many labels; here pass the samples of "
            "one class at a time, or a network with one label"
        )
    return parsed.long().argmax(1)


def parse_labels(labels: Any, size: int, index: int | None = None) -> Tensor:
    """Labels as ``(N,)`` int64, or rows of 0 and 1 as ``(N, C)`` bool; the arguments are those of `check_labels`."""
    where = _where(index)
    values = _as_tensor(labels, where)
    shape = tuple(values.shape)
    if values.dim() > 1 and values.shape[0] == size and values.numel() == size:
        values = values.reshape(size)
    rows = values.dim() == 2 and values.shape[0] == size
    if not rows and values.shape != (size,):
        raise LabelError(f"labels must have shape ({size},), got {shape}{where}; pass one class index per sample")
    if rows and not bool(((values == 0) | (values == 1)).all()):
        kind = (
            "soft labels: pass the classes themselves"
            if values.is_floating_point()
            else "several kinds of labels: "
            "choose a column, Batches(loader, unpack=lambda batch: (batch[0], batch[1][:, 0]))"
        )
        raise LabelError(
            f"labels must have shape ({size},), got {shape}{where} with other numbers than 0 and 1; they look like "
            f"{kind}"
        )
    if values.is_complex() or not bool((values == values.round()).all() if values.is_floating_point() else True):
        raise LabelError(
            f"labels must be integers, got {values.dtype} with fractions{where}; pass class indices: regression and "
            "soft labels are not served"
        )
    return values.bool() if rows else values.long()


def usable_labels(labels: Any, size: int, index: int | None = None, *, strict: bool = False) -> Tensor | None:
    """As `parse_labels`; None for what is no label: paths, fractions, -1 for every sample.

    ``strict``: too few or too many integers are refused, not taken for something else.
    """
    try:
        parsed = parse_labels(labels, size, index)
    except LabelError:
        if strict and isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
            raise
        return None
    return None if parsed.dim() == 1 and size and bool((parsed == -1).all()) else parsed


def check_range(labels: Tensor, classes: int, index: int | None = None) -> None:
    """Refuse labels outside ``[0, C)``, and rows of other than C columns."""
    if labels.dim() == 2:
        if labels.shape[1] != classes:
            raise LabelError(
                f"labels must have {classes} columns, one for each output of the head, got {labels.shape[1]}"
                f"{_where(index)}; pass the network that was trained on them"
            )
        return
    if not len(labels):
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise LabelError(
            f"labels must lie in [0, {classes}), got {wrong}{_where(index)}; the head has {classes} outputs, "
            "counted from 0"
        )


def _as_tensor(labels: Any, where: str) -> Tensor:
    if isinstance(labels, Tensor):
        return labels
    first = labels
    while isinstance(first, list | tuple) and first:
        first = first[0]
    what = f"got {type(labels).__name__}{where}"
    if isinstance(first, str | bytes):
        raise LabelError(
            f"labels must be integers, {what} of text such as {first!r:.60}; pass class indices, such as those of the "
            "data set's class_to_idx"
        )
    if isinstance(first, Mapping):
        raise LabelError(
            f"labels must be integers, {what} of mappings with the keys {sorted(map(str, first))[:10]}; say where the "
            'class is, Batches(loader, unpack=lambda batch: (batch[0], batch[1]["label"]))'
        )
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabelError(f"labels must be integers, {what} ({error}); pass class indices") from error


def _where(index: int | None) -> str:
    return "" if index is None else f" in batch {index}"
