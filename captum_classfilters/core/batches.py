"""One batch of a loader as its inputs and its labels: the conventions that are read, and `Batches` for all others.

`stream.py` reads whole loaders. N samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from captum_classfilters.core.errors import (
    ClassFiltersError,
    HeadError,
    LabelError,
    OptionError,
    ShapeError,
    brief,
    quoted,
)
from captum_classfilters.core.labels import usable_labels

_INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x", "img", "data")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


class Unpacked(NamedTuple):
    """A batch of which it is known what is what."""

    inputs: Any
    labels: Any = None
    extras: Any = ()


class Batches:
    """A loader with odd batches: says which part of a batch is the input, and which the label.

    Every call of this package that reads a loader takes one in its place. Other facts of the loader, such as its
    ``dataset``, stay reachable.

    Args:
        loader: A DataLoader or any iterable of batches.
        unpack: Takes a batch and returns ``(inputs, labels)``, the inputs alone, or ``(inputs, labels, extras)``.
            Several inputs are a tuple.
        input_key: Key, position or attribute of the inputs; a list of them for several. None: as usual.
        label_key: Key, position or attribute of the labels. None: as usual.

    Raises:
        OptionError: ``loader`` is no iterable, or ``unpack`` comes together with keys or is no function.

    Example:
        >>> loader = [(torch.zeros(2, 3, 8, 8), {"camera": "left"}, torch.tensor([0, 1]))]
        >>> next(iter(Batches(loader, label_key=2))).labels.tolist()
        [0, 1]
        >>> next(iter(Batches(loader, lambda batch: (batch[0], batch[2])))).labels.tolist()
        [0, 1]
    """

    def __init__(
        self,
        loader: Iterable[Any],
        unpack: Callable[[Any], Any] | None = None,
        *,
        input_key: Any = None,
        label_key: Any = None,
    ) -> None:
        check_loader(loader)
        if unpack is not None and not callable(unpack):
            raise OptionError(f"unpack must be a function of a batch, got {type(unpack).__name__}")
        if unpack is not None and (input_key is not None or label_key is not None):
            raise OptionError("unpack= says all of a batch; leave input_key= and label_key= out")
        self.loader, self.unpack, self.input_key, self.label_key = loader, unpack, input_key, label_key

    def __iter__(self) -> Iterator[Unpacked]:
        for index, raw in enumerate(self.loader):
            yield self._of(raw, index)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def _of(self, raw: Any, index: int) -> Unpacked:
        if self.unpack is not None:
            result = self.unpack(raw)
            if isinstance(result, Tensor):
                return Unpacked(result)
            if not isinstance(result, tuple | list) or not 2 <= len(result) <= 3:
                raise OptionError(
                    f"unpack must return (inputs, labels), (inputs, labels, extras) or a tensor of inputs; for batch "
                    f"{index} it returned {_described(result)}"
                )
            extras = result[2] if len(result) == 3 else ()
            extras = extras if isinstance(extras, Mapping | tuple) else (extras,)
            return Unpacked(result[0], result[1], extras)
        several = isinstance(self.input_key, list | tuple)
        keys = list(self.input_key) if several else [self.input_key]
        known = raw._asdict() if _is_named(raw) else raw
        if self.input_key is None:
            inputs = _inputs_of(known, index)
        else:
            values = tuple(_part(raw, key, "input_key", index) for key in keys)
            inputs = values if several else values[0]
        key = self.label_key
        labels = _labels_of(known, index) if key is None else _part(raw, key, "label_key", index)
        if isinstance(known, Mapping):
            return Unpacked(inputs, labels, known)
        parts = raw if isinstance(raw, list | tuple) else ()
        return Unpacked(inputs, labels, tuple(part for part in parts if part is not inputs and part is not labels))


def check_loader(loader: Any) -> None:
    """Refuse what is no loader: one batch, a data set, anything that cannot be iterated."""
    if isinstance(loader, Mapping):
        raise OptionError(
            f"expected a DataLoader or an iterable of batches, got {type(loader).__name__}; if it is one batch, pass "
            "[batch]"
        )
    if not isinstance(loader, Iterable):
        samples = hasattr(loader, "__getitem__") and hasattr(loader, "__len__")
        remedy = "; a data set gives single samples: pass DataLoader(dataset, batch_size=64)" if samples else ""
        raise OptionError(f"expected a DataLoader or an iterable of batches, got {type(loader).__name__}{remedy}")


def _part(raw: Any, key: Any, what: str, index: int) -> Any:
    """What a batch has under a key, at a position or as an attribute."""
    try:
        if isinstance(key, str) and not isinstance(raw, Mapping) and hasattr(raw, key):
            return getattr(raw, key)
        return raw[key]
    except (KeyError, IndexError, TypeError) as error:
        raise OptionError(f"{what}={key!r} is not in batch {index}, which is {_described(raw)}") from error


def unpack_batch(raw: Any, index: int = 0, *, check_labels: bool = True) -> Unpacked:
    """Split one batch of a loader; labels are None where there are none.

    Args:
        raw: The batch.
        index: Its place, for messages.
        check_labels: Refuse a batch of which several parts could be the labels.

    Raises:
        ShapeError: It has no inputs, or it is not known which they are.
        LabelError: It is not known which part the labels are.
    """
    if isinstance(raw, Unpacked):
        inputs, labels, extras = raw
    else:
        raw = raw._asdict() if _is_named(raw) else raw
        inputs, labels = _inputs_of(raw, index), _labels_of(raw, index, check=check_labels)
        extras = raw if isinstance(raw, Mapping) else () if isinstance(raw, Tensor) else tuple(raw[2:])
    one_label = isinstance(labels, Number) or (isinstance(labels, Tensor | np.generic) and not labels.ndim)
    if one_label and isinstance(inputs, Tensor) and inputs.dim() < 4:
        raise ShapeError(
            f"batch {index} is a single sample, inputs of shape {tuple(inputs.shape)} with one label; a loader gives "
            "batches: pass DataLoader(dataset, batch_size=64)"
        )
    return Unpacked(_several(inputs, labels, index) if isinstance(inputs, list | tuple) else (inputs,), labels, extras)


def _is_named(raw: Any) -> bool:
    """A named tuple whose names are read as keys."""
    names = {*getattr(raw, "_fields", ())} if isinstance(raw, tuple) else set()
    return bool(names & {*_INPUT_KEYS} and names & {*_LABEL_KEYS})


def _inputs_of(raw: Any, index: int) -> Any:
    if isinstance(raw, Tensor):
        return raw
    if isinstance(raw, Mapping):
        key = _only([key for key in _INPUT_KEYS if key in raw], raw, "input", index)
        if key is None:
            raise ShapeError(
                f"batch {index} is a mapping with keys {sorted(map(str, raw))[:20]}; expected one of "
                f"{list(_INPUT_KEYS)} for the inputs: say which it is, Batches(loader, input_key=...)"
            )
        return raw[key]
    if isinstance(raw, list | tuple) and raw:
        return raw[0]
    raise ShapeError(
        f"batch {index} is {type(raw).__name__}; expected (inputs, labels), a mapping with such keys, or a tensor: "
        "for another form say what is what, Batches(loader, unpack=...)"
    )


def _labels_of(raw: Any, index: int, *, check: bool = True) -> Any:
    if isinstance(raw, Mapping):
        keys = [key for key in _LABEL_KEYS if key in raw]
        return raw.get(_only(keys, raw, "label", index) if check else next(iter(keys), None))
    if not isinstance(raw, list | tuple) or len(raw) < 2:
        return None
    if check:
        _check_place(raw, index)
    return raw[1]


def _only(keys: Sequence[str], raw: Mapping[str, Any], kind: str, index: int) -> str | None:
    """The one key that is meant; of several, the one that holds a tensor."""
    tensors = [key for key in keys if isinstance(raw[key], Tensor)] if len(keys) > 1 else keys
    if len(tensors) > 1 and not all(_same(raw[tensors[0]], raw[key]) for key in tensors[1:]):
        raise (ShapeError if kind == "input" else LabelError)(
            f"batch {index} has several keys for the {kind}s, {tensors}; say which is meant, "
            f"Batches(loader, {kind}_key={tensors[0]!r})"
        )
    return next(iter([*tensors, *keys]), None)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _check_place(raw: Sequence[Any], index: int) -> None:
    """Refuse a tuple of which a later part looks as much like labels as the second, or more."""
    size = _length(raw[0])
    later = [place for place in range(2, len(raw)) if _looks_like_indices(raw[place], size)]
    if size is None or not later:
        return
    usable = usable_labels(raw[1], size) is not None
    places = [1, *later] if usable else later
    listed = " or ".join(f"label_key={place}" for place in places)
    reason = (
        f"the parts {places}, counted from 0, could all be the labels"
        if usable
        else f"part 1, {_described(raw[1])}, cannot be the labels, part {later[0]} could"
    )
    raise LabelError(
        f"batch {index} has {len(raw)} parts, and {reason}; say which it is, Batches(loader, label_key=...): {listed}"
    )


def _looks_like_indices(value: Any, size: int | None) -> bool:
    if isinstance(value, Tensor):
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        return whole and value.dim() in (1, 2) and value.numel() == value.shape[0] == size
    return isinstance(value, list) and len(value) == size and all(type(entry) is int for entry in value)


def _length(value: Any) -> int | None:
    """How many samples; of a list, whose first entry may be an image or an input, that of the first tensor."""
    if isinstance(value, list | tuple):
        value = next((entry for entry in value if isinstance(entry, Tensor)), None)
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else None


def _several(values: Sequence[Any], labels: Any, index: int) -> tuple[Any, ...]:
    """A list in the place of the inputs: several inputs, or single images that were not put together."""
    if not values or not all(isinstance(value, Tensor) and value.dim() == 3 for value in values):
        return tuple(values)
    count = len(labels) if isinstance(labels, list | tuple) or (isinstance(labels, Tensor) and labels.dim()) else None
    shapes = list(dict.fromkeys(tuple(value.shape) for value in values))
    colours = {shape[0] for shape in shapes}
    if len(shapes) > 1 and (len(values) == count or (count is None and colours == {3})):
        raise ShapeError(
            f"batch {index} is a list of {len(values)} images of unequal sizes, {quoted(shapes, 4)}; a network takes "
            "images of one size: resize them in the data set's transform, or read one at a time, batch_size=1"
        )
    if len(values) != count or count == 1:
        return tuple(values)
    if colours == {count}:
        raise ShapeError(
            f"batch {index} is a list of {count} tensors of shape {shapes[0]} with {count} labels: these could be "
            f"{count} images or {count} inputs; for images pass Batches(loader, unpack=lambda batch: "
            "(torch.stack(list(batch[0])), batch[1]))"
        )
    return (torch.stack(list(values)),)


@contextmanager
def image_errors(inputs: Any, model: Any) -> Iterator[None]:
    """Inside, what a model says of images in another form than ``(N, colours, H, W)`` of floats is said in words.

    A model may take any of them, so that nothing is refused before it has failed.

    Raises:
        ShapeError: The model failed, and its inputs are bytes, a single image, or have their colours last.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = _odd_images(inputs, model)
        if reason is None or (isinstance(error, ClassFiltersError) and not isinstance(error, HeadError | ShapeError)):
            raise
        raise ShapeError(f"{reason}. The model said: {brief(error, 160)}") from error


def _odd_images(inputs: Any, model: Any) -> str | None:
    first = inputs if isinstance(inputs, Tensor) else next((x for x in inputs if isinstance(x, Tensor)), None)
    if first is None:
        return None
    shape, colours = tuple(first.shape), (1, 3, 4)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    of_images = any(isinstance(module, nn.Conv2d) for module in modules)
    if len(shape) == 3 and of_images and (shape[0] in colours or shape[2] in colours):
        axes = "images[None]" if shape[0] in colours else "images.permute(2, 0, 1)[None]"
        return f"expected images (N, colours, H, W), got {shape}, which looks like a single image; pass {axes}"
    if len(shape) == 4 and shape[3] in colours and shape[1] not in colours:
        return (
            f"expected images (N, colours, H, W), got {shape}, which looks like (N, H, W, colours); pass "
            "images.permute(0, 3, 1, 2)"
        )
    if first.dtype == torch.uint8 and not any(isinstance(module, nn.Embedding) for module in modules):
        return (
            f"expected images of floats, got {first.dtype} of shape {shape}; scale and normalise them as in training, "
            "such as images.float() / 255"
        )
    return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with the keys {sorted(map(str, value))[:10]}"
    if isinstance(value, list | tuple):
        kinds = ", ".join(dict.fromkeys(type(entry).__name__ for entry in value[:20]))
        return f"{type(value).__name__} of {len(value)} ({kinds})"
    return type(value).__name__
