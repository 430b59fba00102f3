"""One pass over a loader: batches in, the head's features, logits and labels out.

Nothing of the data set is kept. What is done with a batch is the caller's: `influential/`, `metrics/`.
N samples, K features, C classes.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters.core.borrow import Borrowed, borrowed, unwrap
from captum_classfilters.core.errors import (
    DeviceError,
    EmptyLoaderError,
    HeadError,
    LabelError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from captum_classfilters.core.head import Head, HeadSearch

_INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x", "img", "data")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


class Batch(NamedTuple):
    """What one batch gave; tensors are on the model's device."""

    head: Head
    inputs: tuple[Any, ...]
    features: Tensor  # (N, K)
    logits: Tensor  # (N, C)
    labels: Tensor | None  # (N,) int64
    maps: Tensor | None  # (N, K, h, w)
    largest: float  # of |features|: finite
    extras: Any = ()  # as the loader gave it: what stood behind the labels, or the whole mapping


@contextmanager
def batches(
    model: Any,
    loader: Iterable[Any],
    *,
    layer: nn.Module | str | None = None,
    need_labels: bool = True,
    need_maps: bool = False,
    num_classes: int | None = None,
    forward_args: Any = None,
    device: torch.device | str | None = None,
    show_progress: bool = False,
    description: str = "",
) -> Iterator[Iterator[Batch]]:
    """Borrow the model and pass over ``loader`` once: ``with batches(model, loader) as stream: for batch in stream``.

    Args:
        model: An ``nn.Module`` (compiled, DataParallel and DDP ones are unwrapped), or a function, then with ``layer``.
        loader: Any iterable of ``(inputs, labels, ...)``, of mappings with such keys, or of inputs alone where labels
            are not needed. Inputs: a tensor, or a tuple of tensors for several.
        layer: The head, if it cannot be found.
        need_labels: Refuse batches without labels.
        need_maps: Also give the feature map behind the head.
        num_classes: Checked against the head.
        forward_args: Further arguments of the model's forward.
        device: Where the model is expected to be; checked, never moved.
        show_progress: A tqdm bar.
        description: Its label.

    Raises:
        HeadError, LabelError, ShapeError, NonFiniteError, EmptyLoaderError, DeviceError, OptionError: Bad input; each
            message says what was expected, what came, and what to do.
    """
    module = unwrap(model)
    if not isinstance(module, nn.Module):
        if not callable(module):
            raise OptionError(f"the model must be an nn.Module or a function, got {type(model).__name__}")
        if not isinstance(layer, nn.Module):
            raise HeadError("a bare function does not show its layers: pass layer= with the nn.Linear that is its head")
    if isinstance(module, torch.jit.ScriptModule):
        raise OptionError("a ScriptModule takes no hooks; pass the nn.Module it was made from")
    if not isinstance(loader, Iterable):
        raise OptionError(f"expected a DataLoader or an iterable of batches, got {type(loader).__name__}")
    known = module if isinstance(module, nn.Module) else None
    _check_device(known if known is not None else layer, device)
    with borrowed(known) as borrow:
        # iter: of a loader tqdm.auto makes two iterators, each with its workers
        bar = tqdm(iter(loader), desc=description, disable=not show_progress, total=_length(loader))
        with bar:
            yield _pass(_Reader(module, known, layer, borrow, need_maps, forward_args), bar, need_labels, num_classes)


def _pass(reader: "_Reader", loader: Iterable[Any], need_labels: bool, num_classes: int | None) -> Iterator[Batch]:
    empty = True
    for index, raw in enumerate(loader):
        inputs, labels = unpack(raw, need_labels, index)
        size = _size(inputs)
        if size == 0:
            continue
        if labels is not None:
            labels = check_labels(labels, size, index)
        batch = reader.read(inputs, labels, index)
        classes = batch.head.num_classes
        if empty and num_classes is not None and num_classes != classes:
            raise OptionError(
                f"num_classes={num_classes}, but the head {batch.head.name} has {classes} outputs; leave it out, or "
                "pass "
                f"{classes}"
            )
        if labels is not None:
            check_range(labels, classes, index)
        empty = False
        yield batch._replace(extras=_extras(raw))
    if empty:
        raise EmptyLoaderError(
            "the loader gave no sample; expected at least one batch. An iterator that was read before is empty: pass "
            "the loader itself"
        )


class _Reader:
    """Runs the model on a batch and reads the head; the head is found in the first."""

    def __init__(
        self,
        forward: Any,
        model: nn.Module | None,
        layer: nn.Module | str | None,
        borrow: Borrowed,
        need_maps: bool,
        forward_args: Any,
    ) -> None:
        self._forward, self._borrow, self._need_maps = forward, borrow, need_maps
        self._args = (
            () if forward_args is None else forward_args if isinstance(forward_args, tuple) else (forward_args,)
        )
        self._search: HeadSearch | None = HeadSearch(model, layer)
        self._search.watch(borrow)
        self._head: Head | None = None
        self._seen: dict[str, Tensor] = {}
        owner = model if model is not None else layer
        first = next((p for p in owner.parameters() if p.is_floating_point()), None)  # type: ignore[union-attr]
        self._device = first.device if first is not None else torch.device("cpu")
        self._dtype = first.dtype if first is not None else torch.get_default_dtype()

    def read(self, inputs: tuple[Any, ...], labels: Tensor | None, index: int) -> Batch:
        inputs = tuple(value_to_model(value, self._device, self._dtype) for value in inputs)
        self._seen.clear()
        output = self._forward(*inputs, *self._args)
        if self._head is None:
            head, features, logits = self._found(output)
            maps = self._first_maps(head, inputs) if self._need_maps else None
        else:
            head = self._head
            if "inputs" not in self._seen:
                raise HeadError(
                    f"layer {head.name} did not run in batch {index}; it must run once in every forward pass"
                )
            features, logits = head.pool(self._seen["inputs"]), head.pool(self._seen["output"])
            maps = self._seen.get("maps")
        # one number answers two questions: is all finite, and how large does it get
        largest = float(features.detach().abs().amax())
        if not torch.isfinite(torch.tensor(largest)):
            raise NonFiniteError(
                f"expected finite features, got NaN or infinity at the input of layer {head.name} in batch {index}; "
                "look at "
                "that batch and at the layers before it"
            )
        labels = None if labels is None else labels.to(self._device, non_blocking=True)
        return Batch(head, inputs, features, logits, labels, maps, largest)

    def _found(self, output: Any) -> Any:
        found = self._search.found(output)  # type: ignore[union-attr]
        self._search, self._head = None, found.head
        if not bool(torch.isfinite(found.head.weight).all() and torch.isfinite(found.head.bias).all()):
            raise NonFiniteError(
                f"expected finite weights, got NaN or infinity in layer {found.head.name}; load a whole checkpoint"
            )
        self._borrow.after(found.head.module, self._keep_call)
        if self._need_maps:
            if found.head.feature_map is None:
                raise HeadError(
                    f"there is no feature map of {found.head.num_features} channels behind the head "
                    f"{found.head.name}: its "
                    "features are not pooled from positions"
                )
            self._borrow.after(found.head.feature_map.module, self._keep_maps)
        return found

    def _first_maps(self, head: Head, inputs: tuple[Any, ...]) -> Tensor:
        # the hook on the map was not there yet: run this one batch again
        self._forward(*inputs, *self._args)
        return self._seen["maps"]

    def _keep_call(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._seen["inputs"], self._seen["output"] = args[0], output

    def _keep_maps(self, module: nn.Module, args: Any, output: Tensor) -> None:
        # a copy: an in-place operation may follow
        self._seen["maps"] = self._head.feature_map.read(output).clone()  # type: ignore[union-attr]


def value_to_model(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A tensor of a batch where the model is, of its dtype if it is floating; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    # asynchronous where the loader pinned its memory, an ordinary copy where not
    return value.to(device, dtype if value.is_floating_point() else value.dtype, non_blocking=True)


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


def _extras(raw: Any) -> Any:
    if isinstance(raw, list | tuple):
        return tuple(raw[2:])
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


def _check_device(owner: Any, device: torch.device | str | None) -> None:
    first = next(owner.parameters(), None)
    if device is None or first is None:
        return
    asked = torch.device(device)
    same_index = asked.index is None or asked.index == (first.device.index or 0)
    if asked.type != first.device.type or not same_index:
        raise DeviceError(
            f"the model is on {first.device}, but device={str(asked)!r} was asked for; move it yourself, "
            f"model.to({str(asked)!r}): "
            "batches follow the model, the model is never moved"
        )


def _size(inputs: tuple[Any, ...]) -> int:
    first = next((value for value in inputs if isinstance(value, Tensor)), None)
    if first is None:
        raise ShapeError(
            f"expected a tensor of inputs, got {type(inputs[0]).__name__}; convert images to tensors in the data "
            "set's transform"
        )
    return first.shape[0] if first.dim() else 1


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
