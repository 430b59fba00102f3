"""Batches in, whatever form people's loaders give them in: the only reader of loaders.

`batches.py` knows in which forms a batch comes, `labels.py` what a label can be; `head_pass.py` runs a network on what
is read here. N samples, C classes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters.core.batches import Batches, check_loader, unpack_batch
from captum_classfilters.core.errors import DeviceError, EmptyLoaderError, LabelError, ShapeError
from captum_classfilters.core.labels import check_labels, parse_labels, usable_labels


class Samples(NamedTuple):
    """One batch of a loader."""

    place: int  # in the loader, empty batches counted
    inputs: tuple[Any, ...]  # the arguments of one forward pass
    labels: Tensor | None  # (N,) int64; or (N, C) bool where many labels were asked for
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
        if first.is_meta:
            raise DeviceError(
                "the model has no weights yet, it is on the meta device; load them first, model.to_empty(device=...) "
                "and load_state_dict"
            )
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
    need_labels: bool | None = True,
    read_labels: bool = True,
    many_labels: bool = False,
    description: str = "",
    show_progress: bool = False,
    skip: int = 0,
    on_skipped: Callable[[], None] | None = None,
) -> Iterator[Iterator[Samples]]:
    """Read a loader once: ``with samples(loader) as stream: for batch in stream``.

    Empty batches are passed over. Errors name the batch.

    Args:
        loader: Any iterable of ``(inputs, labels, ...)``, of mappings with such keys, or of inputs alone where labels
            are not needed. Inputs: a tensor, or a list or tuple of tensors for several. `Batches` for other forms.
        placement: Where inputs and labels are moved; None: they stay where they are.
        need_labels: True: batches without labels are refused. False: labels are given where there are some; paths and
            the like, and -1 for every sample, are none. None: labels play no part, and wrong ones are none.
        read_labels: False for loaders that give something else in the place of labels: this is then part of the
            extras, and no batch needs labels.
        many_labels: Rows of 0 and 1 are given as ``(N, C)`` bool; else only one-hot ones are taken, as ``(N,)``.
        description: Label of the progress bar.
        show_progress: Show a tqdm bar.
        skip: So many batches at the start are read and not given.
        on_skipped: Called after the last skipped batch, before the next one is made.

    Raises:
        OptionError: ``loader`` is not an iterable.
        LabelError, ShapeError: A batch is in none of these forms.
        EmptyLoaderError: The loader gave no sample.
    """
    check_loader(loader)
    # iter: of a loader tqdm.auto makes two iterators, each with its workers
    total = length_hint(loader) or None
    with tqdm(iter(loader), desc=description, disable=not show_progress, total=total) as bar:
        reader = _LabelReader(need_labels, read_labels, many_labels)
        yield _read(bar, placement, reader, skip, on_skipped)


def _read(
    loader: Iterable[Any],
    placement: Placement | None,
    reader: "_LabelReader",
    skip: int,
    on_skipped: Callable[[], None] | None,
) -> Iterator[Samples]:
    empty, form = True, None
    for index, raw in enumerate(loader):
        if index < skip:
            empty = False
            if index == skip - 1 and on_skipped is not None:
                on_skipped()
            continue
        inputs, found, extras = unpack_batch(raw, index, check_labels=reader.matter)
        size = _size(inputs)
        if size == 0:
            continue
        labels = reader.labels_of(found, size, index)
        if reader.need and labels is not None:
            if form not in (None, labels.dim()):
                raise LabelError(
                    f"batch {index} has its labels in another form than those before: some are class indices, others "
                    "rows of 0 and 1; give all in one form"
                )
            form = labels.dim()
        if placement is not None:
            inputs = tuple(placement.move(value) for value in inputs)
            labels = None if labels is None else labels.to(placement.device, non_blocking=True)
        empty = False
        if not reader.read and isinstance(extras, tuple) and (extras or found is not None):
            extras = (found, *extras)
        yield Samples(index, inputs, labels, extras, size)
    if empty:
        raise EmptyLoaderError(
            "the loader gave no sample; expected at least one batch. An iterator that was read before is empty: pass "
            "the loader itself"
        )


class _LabelReader(NamedTuple):
    """What becomes of that which stands in the place of a batch's labels."""

    need: bool | None
    read: bool
    many: bool

    @property
    def matter(self) -> bool:
        return self.read and self.need is not None

    def labels_of(self, value: Any, size: int, index: int) -> Tensor | None:
        if not self.read:
            return None
        if self.need:
            if value is None:
                raise LabelError(
                    f"batch {index} has no labels; expected (inputs, labels) or a mapping with a key such as 'label'; "
                    "for another one Batches(loader, label_key=...). If this list is itself one batch, write "
                    "[(inputs, labels)]. Without labels, the model's own predictions can stand in where there is "
                    'label_source="prediction"'
                )
            return (parse_labels if self.many else check_labels)(value, size, index)
        labels = None if value is None else usable_labels(value, size, index, strict=self.matter)
        if labels is None or labels.dim() == 1:
            return labels if self.matter else None
        if self.many:
            return labels
        return labels.long().argmax(1) if self.matter and bool((labels.sum(1) == 1).all()) else None


def refuse_iterator(loader: Any, name: str) -> None:
    """Refuse what can be read only once and is needed more often."""
    loader = loader.loader if isinstance(loader, Batches) else loader
    if isinstance(loader, Iterator):
        raise EmptyLoaderError(
            f"{name} is an iterator, {type(loader).__name__}, which can be read only once, and it is needed more "
            "often; pass a DataLoader or a list of batches"
        )


def _size(inputs: tuple[Any, ...]) -> int:
    first = next((value for value in inputs if isinstance(value, Tensor)), None)
    if first is None:
        raise ShapeError(
            f"expected a tensor of inputs, got {type(inputs[0]).__name__}; convert images to tensors in the data "
            "set's transform"
        )
    return first.shape[0] if first.dim() else 1
