"""`aggregate`: any Captum layer attribution over a loader, as the table that every method here answers with."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_classfilters.class_filters import UNKNOWN_LAYER, ClassFilters, names_of, to_grid, warn_unseen
from captum_classfilters.core.borrow import borrowed, outermost, unwrap
from captum_classfilters.core.errors import EmptyLoaderError, LayerError, NonFiniteError, OptionError, ShapeError
from captum_classfilters.core.stream import check_labels, check_range, unpack, value_to_model


def aggregate(
    attribution: LayerAttribution,
    loader: Iterable[Any],
    *,
    importance: str = "signed",
    label_source: str = "target",
    channel_dim: int = 1,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    show_progress: bool = False,
    **options: Any,
) -> ClassFilters:
    """Sum a layer attribution by class: which channels of the layer work for which class.

    Each sample is attributed for its own class; positions are summed, so that a sample adds one number for each
    channel.

    Args:
        attribution: A Captum layer attribution of one layer, such as ``LayerIntegratedGradients(model, layer)``; one
            that has no ``target``, such as ``LayerActivation``, too.
        loader: Batches ``(inputs, labels)``; read once, moved to the model's device batch by batch.
        importance: ``"signed"``: what speaks against a class counts against a channel; ``"abs"``: of each channel,
            after the sum over its positions.
        label_source: ``"target"``, or ``"prediction"``: then labels are not needed, and each batch takes one more pass.
        channel_dim: Which axis of the attribution has the channels; 1 for convolutions, -1 for tokens.
        num_classes: C; None: as many as the model has outputs.
        class_names: C names; otherwise numbers.
        show_progress: A tqdm bar.
        **options: Passed on to ``attribution.attribute``, such as ``n_steps`` or ``attribute_to_layer_input``.

    Returns:
        `ClassFilters` with ``method`` the attribution's class and ``layer`` the layer's name; tables of shards merge.

    Raises:
        OptionError: No layer attribution, or an option is not among what it may be.
        LayerError: The attribution is of several layers or tensors.
        ShapeError: There is one channel only: those methods that sum over channels must be told not to.
        LabelError, EmptyLoaderError, NonFiniteError: As their messages say.

    Whatever ends the pass early, KeyboardInterrupt included, carries the table so far as ``error.partial_result``.
    """
    if not isinstance(attribution, LayerAttribution):
        raise OptionError(
            f"expected a Captum layer attribution, such as LayerIntegratedGradients(model, layer), got "
            f"{type(attribution).__name__}; an attribution to inputs has no channels of a layer"
        )
    if importance not in ("signed", "abs"):
        raise OptionError(f'importance must be "signed" or "abs", got {importance!r}')
    if label_source not in ("target", "prediction"):
        raise OptionError(f'label_source must be "target" or "prediction", got {label_source!r}')
    model = unwrap(attribution.forward_func)
    known = model if isinstance(model, nn.Module) else None
    sums = _Sums(attribution, known, importance, num_classes, class_names)
    with borrowed(outermost(attribution.forward_func), grad=True) as borrow:
        if known is not None:
            borrow.after(known, sums.see)
        try:
            with tqdm(iter(loader), desc="aggregate", disable=not show_progress) as bar:
                for index, raw in enumerate(bar):
                    inputs, given = unpack(raw, label_source == "target", index)
                    inputs = _to_model(inputs, known, attribution.layer)
                    if not len(inputs[0]):
                        continue
                    labels = _labels(given, inputs, label_source, attribution.forward_func, index)
                    arguments = {**options, **({"target": labels} if _takes_target(attribution) else {})}
                    values = attribution.attribute(inputs[0] if len(inputs) == 1 else inputs, **arguments)
                    sums.add(_channels(values, channel_dim, index), labels, index)
        except BaseException as error:
            if sums.scores is not None:
                error.partial_result = sums.table()  # type: ignore[attr-defined]
            raise
    found = sums.table()
    warn_unseen(found, stacklevel=3)
    return found


class _Sums:
    """Running sums; they know how many classes there are once the model has run."""

    def __init__(
        self,
        attribution: LayerAttribution,
        model: nn.Module | None,
        importance: str,
        num_classes: int | None,
        class_names: Sequence[str] | None,
    ) -> None:
        self._attribution, self._model, self._importance = attribution, model, importance
        self._classes = num_classes if num_classes is not None or class_names is None else len(class_names)
        self._class_names, self._outputs = class_names, 0
        self.scores: Tensor | None = None
        self._mass = self._counts = torch.zeros(0)

    def see(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook: how many outputs the model has."""
        if isinstance(output, Tensor) and output.dim() == 2:
            self._outputs = output.shape[1]

    def add(self, values: Tensor, labels: Tensor, index: int) -> None:
        if self.scores is None:
            self._classes = self._classes or self._outputs
            if self._outputs and self._classes != self._outputs:
                raise OptionError(
                    f"the model has {self._outputs} outputs, num_classes= or class_names= say {self._classes}; leave "
                    f"num_classes= out, or name all {self._outputs}"
                )
            if not self._classes:
                raise OptionError("the model does not say how many classes there are: pass num_classes=")
            self.scores = torch.zeros(self._classes, values.shape[1], dtype=torch.float64, device=values.device)
            self._mass = torch.zeros_like(self.scores)
            self._counts = torch.zeros(self._classes, dtype=torch.int64, device=values.device)
        check_range(labels, len(self.scores), index)
        if values.shape[1] != self.scores.shape[1]:
            raise ShapeError(f"batch {index} has {values.shape[1]} channels, those before {self.scores.shape[1]}")
        self.scores.index_add_(0, labels, to_grid(values.abs() if self._importance == "abs" else values))
        self._mass.index_add_(0, labels, to_grid(values.abs()))
        self._counts.index_add_(0, labels, torch.ones_like(labels))

    def table(self) -> ClassFilters:
        if self.scores is None:
            raise EmptyLoaderError("the loader gave no sample; expected at least one batch")
        layer = self._attribution.layer
        names = {module: name for name, module in self._model.named_modules()} if self._model is not None else {}
        return ClassFilters(
            self.scores.cpu(),
            self._mass.cpu(),
            self._counts.cpu(),
            type(self._attribution).__name__,
            names.get(layer, UNKNOWN_LAYER) if isinstance(layer, nn.Module) else layer or UNKNOWN_LAYER,
            names_of(self._class_names, len(self.scores)),
            {"merge": "sum", "importance": self._importance},
        )


def _to_model(inputs: tuple[Any, ...], model: nn.Module | None, layer: Any) -> tuple[Any, ...]:
    owner = model if model is not None else layer
    first = next((p for p in owner.parameters() if p.is_floating_point()), None) if owner is not None else None
    if first is None:
        return inputs
    return tuple(value_to_model(value, first.device, first.dtype) for value in inputs)


def _labels(given: Any, inputs: tuple[Any, ...], source: str, forward: Any, index: int) -> Tensor:
    device = inputs[0].device
    if source == "target":
        return check_labels(given, len(inputs[0]), index).to(device)
    with torch.no_grad():
        predicted: Tensor = forward(*inputs).argmax(1)
    return predicted


def _takes_target(attribution: LayerAttribution) -> bool:
    return "target" in inspect.signature(attribution.attribute).parameters


def _channels(found: Any, channel_dim: int, index: int) -> Tensor:
    """One number for each sample and channel, ``(N, K)``."""
    if isinstance(found, tuple) and len(found) == 1:
        found = found[0]
    if not isinstance(found, Tensor):
        raise LayerError(f"expected an attribution of one tensor, got {type(found).__name__}; choose one layer")
    values = found.detach().movedim(channel_dim, 1)
    values = values.flatten(2).double().sum(2) if values.dim() > 2 else values.double()
    if values.shape[1] < 2:
        raise ShapeError(
            "the attribution has one channel, so it says nothing of channels; where the method sums over them, as "
            "Grad-CAM does, pass attr_dim_summation=False"
        )
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"expected finite attributions, got NaN or infinity in batch {index}; look at that batch")
    return values
