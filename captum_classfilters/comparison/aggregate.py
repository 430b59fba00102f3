"""`aggregate`: any Captum layer attribution over a loader, as the same table that every method here gives."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters.class_filters import UNKNOWN_LAYER, ClassFilters, names_of, warn_unseen
from captum_classfilters.core.batches import image_errors
from captum_classfilters.core.borrow import borrowed, outermost, unwrap
from captum_classfilters.core.check import integer, one_of
from captum_classfilters.core.class_sums import ClassSums
from captum_classfilters.core.errors import (
    EmptyLoaderError,
    LabelError,
    LayerError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from captum_classfilters.core.labels import check_range
from captum_classfilters.core.layout import LayoutWatch
from captum_classfilters.core.outputs import LogitReader, find_logits, gives_many_labels, two_logits
from captum_classfilters.core.stream import Placement, Samples, samples
from captum_classfilters.core.wide import wide


def aggregate(
    attribution: LayerAttribution,
    loader: Iterable[Any],
    *,
    importance: str = "signed",
    label_source: str = "target",
    channel_dim: int | None = None,
    classes: int | Sequence[str] | None = None,
    show_progress: bool = False,
    **options: Any,
) -> ClassFilters:
    """Sum a layer attribution by class, to see which channels of the layer work for which class.

    Each sample is attributed for its own class; positions are summed, so that a sample adds one number for each
    channel.

    Args:
        attribution: A Captum layer attribution of one layer, such as ``LayerIntegratedGradients(model, layer)``, or one
            without ``target``, such as ``LayerActivation``.
        loader: Batches ``(inputs, labels)``; read once, moved to the model's device batch by batch.
        importance: ``"signed"``: negative attributions reduce a channel's score; ``"abs"``: magnitudes are taken after
            the sum over positions.
        label_source: ``"target"``; or ``"prediction"``, which needs no labels and one more pass for each batch. Many
            labels, rows of 0 and 1: a sample counts for each, by prediction for each class with a logit above 0.
        channel_dim: The axis of the channels; 1 for convolutions, -1 for tokens. None: what the layers before and
            behind it read as channels in the first forward pass.
        classes: C names, or C; None: as many as the model has outputs, named by the loader's data set, the model's
            config, or numbers.
        show_progress: Show a tqdm bar.
        **options: Passed on to ``attribution.attribute``, such as ``n_steps`` or ``attribute_to_layer_input``.

    Returns:
        `ClassFilters` with ``method`` the attribution's class and ``layer`` the layer's name; tables of shards merge.

    Raises:
        OptionError: ``attribution`` is no layer attribution, or an option has an unknown value.
        LayerError: The attribution covers several layers or tensors.
        ShapeError: There is only one channel, because the method sums over channels; or nothing says which axis holds
            the channels.
        LabelError: Labels are missing, of the wrong type, or out of range.
        EmptyLoaderError: The loader gave no sample.
        NonFiniteError: An attribution is NaN or infinite.

    An exception that ends the pass early, KeyboardInterrupt too, carries the table so far as ``error.partial_result``.
    """
    aggregation = Aggregation(attribution, importance, label_source, channel_dim, classes, options)
    with aggregation.samples(loader, show_progress) as stream:
        try:
            for batch in stream:
                aggregation.add(*aggregation.attribute(batch), batch.place)
        except BaseException as error:
            if aggregation.started:
                error.partial_result = aggregation.table()  # type: ignore[attr-defined]
            raise
    table = aggregation.table()
    warn_unseen(table, stacklevel=3)
    return table


class Aggregation:
    """One aggregation in progress. The number of classes is known once the model has run.

    The arguments are those of `aggregate`, ``options`` as a mapping.
    """

    def __init__(
        self,
        attribution: LayerAttribution,
        importance: str = "signed",
        label_source: str = "target",
        channel_dim: int | None = None,
        classes: int | Sequence[str] | None = None,
        options: Any = None,
    ) -> None:
        if not isinstance(attribution, LayerAttribution):
            raise OptionError(
                f"expected a Captum layer attribution, such as LayerIntegratedGradients(model, layer), got "
                f"{type(attribution).__name__}; an attribution to inputs has no channels of a layer"
            )
        self._attribution, self._options = attribution, dict(options or {})
        self._importance = one_of(importance, "importance", ("signed", "abs"))
        self._source = one_of(label_source, "label_source", ("target", "prediction"))
        self._channel_dim = channel_dim
        by_name = classes is not None and not hasattr(classes, "__index__")
        self._class_names = names_of(classes, len(classes)) if by_name else None  # type: ignore[arg-type]
        number = len(self._class_names) if self._class_names is not None else classes
        self._classes = None if number is None else integer(number, "classes", 1, meaning="how many, or their names")
        model = unwrap(attribution.forward_func)
        self._model = model if isinstance(model, nn.Module) else None
        owner = self._model if self._model is not None else attribution.layer
        self._placement = Placement.of(owner) if isinstance(owner, nn.Module) and _has_weights(owner) else None
        self._takes_target = "target" in inspect.signature(attribution.attribute).parameters
        self._outputs, self._columns = 0, 0
        self._deciding = False  # the model runs to tell classes, which needs its output as it is
        self._sums: ClassSums | None = None
        self._loader: Any = None

    def samples(self, loader: Iterable[Any], show_progress: bool = False) -> Any:
        """Read a loader as this aggregation needs it."""
        self._loader = loader
        return samples(
            loader,
            placement=self._placement,
            need_labels=True if self._source == "target" else None,
            many_labels=True,
            description="aggregate",
            show_progress=show_progress,
        )

    def attribute(self, batch: Samples) -> tuple[Tensor, Tensor]:
        """One number for each sample and channel, ``(N, K)``, and the class of each sample, ``(N,)``.

        A sample of many labels comes once for each of its classes.
        """
        with borrowed(outermost(self._attribution.forward_func), grad=True) as borrow:
            if self._model is not None:
                borrow.after(self._model, self._see)
            labels, kept = self._labels(batch), slice(None)
            if labels.dim() == 2:
                batch, labels, kept = self._one_by_one(batch, labels)
            arguments = {**self._options, **({"target": labels} if self._takes_target else {})}
            inputs = batch.inputs[0] if len(batch.inputs) == 1 else batch.inputs
            layer, watch = self._attribution.layer, None
            if self._channel_dim is None and isinstance(layer, nn.Module):
                of_input = bool(self._options.get("attribute_to_layer_input", False))
                watch = LayoutWatch(self._model, layer, borrow, of_input)
            with image_errors(batch.inputs, self._model):
                result = _one_tensor(self._attribution.attribute(inputs, **arguments))
            if self._channel_dim is None:
                self._channel_dim = _channel_axis(watch, result)
            return _channels(result, self._channel_dim, batch.place)[kept], labels[kept]

    def _one_by_one(self, batch: Samples, labels: Tensor) -> tuple[Samples, Tensor, slice]:
        """The batch with each sample once for each of its classes, ``(M,)``; and which of the results are kept."""
        self._columns = labels.shape[1]
        rows, classes = labels.nonzero(as_tuple=True)
        kept = slice(len(rows))
        if not len(rows):  # no label at all: one sample tells the number of channels
            rows, classes = rows.new_zeros(1), classes.new_zeros(1)
        inputs = tuple(
            value[rows] if isinstance(value, Tensor) and len(value) == batch.size else value for value in batch.inputs
        )
        return batch._replace(inputs=inputs), classes, kept

    def add(self, values: Tensor, labels: Tensor, index: int) -> None:
        """Add rows of values to the classes of their samples."""
        if self._sums is None:
            self._sums = ClassSums(self._number(), values.shape[1], ["scores", "mass"], values.device)
        classes, channels = self._sums["mass"].shape
        check_range(labels, classes, index)
        if values.shape[1] != channels:
            raise ShapeError(f"batch {index} has {values.shape[1]} channels, those before {channels}")
        scores = values.abs() if self._importance == "abs" else values
        self._sums.add(labels, {"scores": scores, "mass": values.abs()})

    @property
    def started(self) -> bool:
        """Whether a batch was added."""
        return self._sums is not None

    def table(self) -> ClassFilters:
        """The table so far, on the CPU."""
        if self._sums is None:
            raise EmptyLoaderError("the loader gave no sample; expected at least one batch")
        layer = self._attribution.layer
        names = {module: name for name, module in self._model.named_modules()} if self._model is not None else {}
        return ClassFilters(
            self._sums["scores"].cpu(),
            self._sums["mass"].cpu(),
            self._sums.counts.cpu(),
            type(self._attribution).__name__,
            names.get(layer, UNKNOWN_LAYER) if isinstance(layer, nn.Module) else layer or UNKNOWN_LAYER,
            names_of(self._class_names, len(self._sums.counts), self._loader, self._model),
            {"importance": self._importance},
        )

    def _see(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """A hook that notes how many classes the model has, and gives one logit as those of two classes."""
        logits = find_logits(output)
        if logits is None or logits.dim() != 2:
            return None
        two = two_logits(logits)
        self._outputs = two.shape[1]
        return None if two is logits or self._deciding else two

    def _number(self) -> int:
        number = self._classes or self._outputs
        if self._columns and number and self._columns != number:
            raise LabelError(f"labels have {self._columns} columns, and there are {number} classes; pass one for each")
        if self._outputs and number != self._outputs:
            raise OptionError(
                f"the model has {self._outputs} outputs, classes= says {number}; leave it out, or name all "
                f"{self._outputs}"
            )
        if not number:
            raise OptionError("the model does not say how many classes there are: pass classes=")
        return number

    def _labels(self, batch: Samples) -> Tensor:
        if self._source == "target":
            return batch.labels  # type: ignore[return-value]
        with torch.no_grad(), image_errors(batch.inputs, self._model), LogitReader() as reader:
            self._deciding = True
            logits: Tensor = reader.class_logits(self._attribution.forward_func(*batch.inputs))
            self._deciding = False
            many = batch.labels is not None or gives_many_labels(self._attribution.forward_func)
            return logits > 0 if many else logits.argmax(1)


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.is_floating_point() for parameter in module.parameters())


def _channel_axis(watch: LayoutWatch | None, result: Tensor) -> int:
    """The axis of the channels in an attribution, which has the shape of the layer's tensor."""
    if watch is None or result.dim() < 3:
        return 1
    last = watch.has_channels_last(result)
    if last is None:
        raise ShapeError(
            f"the attribution has shape {tuple(result.shape)}, and nothing in the forward pass says which axis holds "
            "the channels; pass channel_dim=1 for (N, K, *positions), or channel_dim=-1 for tokens and channels last"
        )
    return -1 if last else 1


def _one_tensor(result: Any) -> Tensor:
    if isinstance(result, tuple) and len(result) == 1:
        result = result[0]
    if not isinstance(result, Tensor):
        raise LayerError(f"expected an attribution of one tensor, got {type(result).__name__}; choose one layer")
    return result


def _channels(result: Tensor, channel_dim: int, index: int) -> Tensor:
    """One number for each sample and channel, ``(N, K)``."""
    values = result.detach().movedim(channel_dim, 1)
    values = wide(values).flatten(2).sum(2) if values.dim() > 2 else wide(values)
    if values.shape[1] < 2:
        raise ShapeError(
            "the attribution has one channel, so it says nothing of channels; where the method sums over them, as "
            "Grad-CAM does, pass attr_dim_summation=False"
        )
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"expected finite attributions, got NaN or infinity in batch {index}; look at that batch")
    return values
