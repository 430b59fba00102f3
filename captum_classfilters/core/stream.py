"""Batches in, whatever form people's loaders give them in: the only reader of loaders.

`head_pass.py` runs a network on what is read here. N samples, C classes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import length_hint
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters.core.errors import EmptyLoaderError, LabelError, OptionError, ShapeError

_INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x", "img", "data")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


class Samples(NamedTuple):
    """One batch of a loader."""

    place: int  # in the loader, empty batches counted
    inputs: tuple[Any, ...]  # the arguments of one forward pass
    labels: Tensor | None  # (N,) int64
    extras: Any  # as the loader gave it: what stood behind the labels, or the whole mapping
    size: int  # N, at least 1


class Placement(NamedTuple):
    """Where a model is, and of which dtype: batches follow it."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module | None) -> "Placement":
        """The placement of a model's first floating parameter; the CPU for a model without parameters."""
        parameters = model.parameters() if model is not None else iter(())
        first = next((parameter for parameter in parameters if parameter.is_floating_point()), None)
        if first is None:
            return cls(torch.device("cpu"), torch.get_default_dtype())
        return cls(first.device, first.dtype)

    def move(self, value: Any) -> Any:
        """A tensor of a batch where the model is, of its dtype if it is floating; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        # asynchronous where the loader pinned its memory, an ordinary copy where not
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype, non_blocking=True)


@contextmanager
def samples(
    loader: Iterable[Any],
    *,
    placement: Placement | None = None,
    need_labels: bool = True,
    read_labels: bool = True,
    description: str = "",
    show_progress: bool = False,
    skip: int = 0,
    on_skipped: Callable[[], None] | None = None,
) -> Iterator[Iterator[Samples]]:
    """Read a loader once: ``with samples(loader) as stream: for batch in stream``.

    Empty batches are passed over. Errors name the batch.

    Args:
        loader: Any iterable of ``(inputs, labels, ...)``, of mappings with such keys, or of inputs alone where labels
            are not needed. Inputs: a tensor, or a list or tuple of tensors for several.
        placement: Where inputs and labels are moved; None: they stay where they are.
        need_labels: Refuse batches without labels.
        read_labels: False for loaders that give something else in the place of labels: this is then part of the
            extras, and no batch needs labels.
        description: Label of the progress bar.
        show_progress: Show a tqdm bar.
        skip: So many batches at the start are read and not given.
        on_skipped: Called after the last skipped batch, before the next one is made.

    Raises:
        OptionError: ``loader`` is not an iterable.
        LabelError, ShapeError: A batch is in none of these forms.
        EmptyLoaderError: The loader gave no sample.
    """
    if not isinstance(loader, Iterable):
        raise OptionError(f"expected a DataLoader or an iterable of batches, got {type(loader).__name__}")
    # iter: of a loader tqdm.auto makes two iterators, each with its workers
    total = length_hint(loader) or None
    with tqdm(iter(loader), desc=description, disable=not show_progress, total=total) as bar:
        yield _read(bar, placement, need_labels, read_labels, skip, on_skipped)


def _read(
    loader: Iterable[Any],
    placement: Placement | None,
    need_labels: bool,
    read_labels: bool,
    skip: int,
    on_skipped: Callable[[], None] | None,
) -> Iterator[Samples]:
    empty = True
    for index, raw in enumerate(loader):
        if index < skip:
            empty = False
            if index == skip - 1 and on_skipped is not None:
                on_skipped()
            continue
        inputs, labels = unpack(raw, need_labels and read_labels, index)
        size = _size(inputs)
        if size == 0:
            continue
        labels = check_labels(labels, size, index) if read_labels and labels is not None else None
        if placement is not None:
            inputs = tuple(placement.move(value) for value in inputs)
            labels = None if labels is None else labels.to(placement.device, non_blocking=True)
        empty = False
        yield Samples(index, inputs, labels, _extras(raw, 2 if read_labels else 1), size)
    if empty:
        raise EmptyLoaderError(
            "the loader gave no sample; expected at least one batch. An iterator that was read before is empty: pass "
            "the loader itself"
        )


def refuse_iterator(loader: Any, name: str) -> None:
    """Refuse what can be read only once and is needed more often."""
    if isinstance(loader, Iterator):
        raise EmptyLoaderError(
            f"{name} is an iterator, {type(loader).__name__}, which can be read only once, and it is needed more "
            "often; pass a DataLoader or a list of batches"
        )


def unpack(raw: Any, need_labels: bool, index: int = 0) -> tuple[tuple[Any, ...], Any]:
    """Split one batch of a loader into ``(inputs, labels)``; ``labels`` is None where there are none."""
    inputs: Any
    labels: Any
    if isinstance(raw, Tensor):
        inputs, labels = raw, None
    elif isinstance(raw, Mapping):
        inputs = next((raw[key] for key in _INPUT_KEYS if key in raw), None)
        labels = next((raw[key] for key in _LABEL_KEYS if key in raw), None)
        if inputs is None:
            raise ShapeError(
                f"batch {index} is a mapping with keys {sorted(map(str, raw))}; expected one of {list(_INPUT_KEYS)} "
                "for the "
                "inputs: rename it in the loader's collate_fn"
            )
    elif isinstance(raw, list | tuple) and raw:
        inputs, labels = raw[0], raw[1] if len(raw) > 1 else None
    else:
        raise ShapeError(
            f"batch {index} is {type(raw).__name__}; expected (inputs, labels), a mapping with such keys, or a tensor"
        )
    if labels is None and need_labels:
        raise LabelError(
            f"batch {index} has no labels; expected (inputs, labels) or a mapping with one of {list(_LABEL_KEYS)}. "
            "If this list "
            "is itself one batch, write [(inputs, labels)]. Without "
            'labels, the model\'s own predictions can stand in where there is label_source="prediction"'
        )
    return (tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)), labels


def _extras(raw: Any, start: int) -> Any:
    if isinstance(raw, list | tuple):
        return tuple(raw[start:])
    return raw if isinstance(raw, Mapping) else ()


def check_labels(given: Any, size: int, index: int | None = None) -> Tensor:
    """Labels as ``(N,)`` int64, or a `LabelError` that says what they look like; ``index``: of the batch, if known."""
    where = _where(index)
    try:
        labels: Tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabelError(
            f"labels must be integers, got {type(given).__name__}{where} ({error}); pass class indices"
        ) from error
    if labels.dim() == 2 and labels.shape[1] > 1:
        raise LabelError(
            f"labels must have shape ({size},), got {tuple(labels.shape)}{where}; they look one-hot: pass "
            "class "
            "indices, labels.argmax(1)"
        )
    if labels.shape != (size,):
        raise LabelError(
            f"labels must have shape ({size},), got {tuple(labels.shape)}{where}; pass one class index per sample"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise LabelError(f"labels must be integers, got {labels.dtype}{where}; pass class indices, labels.long()")
    return labels.long()


def check_range(labels: Tensor, classes: int, index: int | None = None) -> None:
    """Refuse labels outside ``[0, C)``."""
    if not len(labels):
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise LabelError(
            f"labels must lie in [0, {classes}), got {wrong}{_where(index)}; the head has {classes} outputs, "
            "counted from 0"
        )


def _where(index: int | None) -> str:
    return "" if index is None else f" in batch {index}"


def _size(inputs: tuple[Any, ...]) -> int:
    first = next((value for value in inputs if isinstance(value, Tensor)), None)
    if first is None:
        raise ShapeError(
            f"expected a tensor of inputs, got {type(inputs[0]).__name__}; convert images to tensors in the data "
            "set's transform"
        )
    return first.shape[0] if first.dim() else 1
