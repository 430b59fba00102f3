"""`HeadPass`: one network and one loader, for any number of measures.

The head is found and checked once. Nothing of the data set is kept, unless `HeadPass.cached` is asked for.
N samples, K features, C classes.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from captum_classfilters.core.batches import check_loader, image_errors
from captum_classfilters.core.borrow import Borrowed, borrowed, unwrap
from captum_classfilters.core.calls import CONVS
from captum_classfilters.core.errors import DeviceError, HeadError, NonFiniteError, NoPositionsWarning, OptionError
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_search import Found, HeadSearch
from captum_classfilters.core.labels import check_range
from captum_classfilters.core.outputs import check_output, read_by
from captum_classfilters.core.stream import Placement, Samples, samples
from captum_classfilters.core.wide import home, wide


class Batch(NamedTuple):
    """What one batch gave; tensors are on the model's device, or on the CPU where that has no float64.

    The inputs stay on the model's device.
    """

    head: Head
    inputs: tuple[Any, ...]
    features: Tensor  # (N, K)
    logits: Tensor  # (N, C)
    labels: Tensor | None  # (N,) int64; or (N, C) bool where many labels were asked for
    maps: Tensor | None  # (N, K, *positions), of images (N, K, h, w)
    largest: float  # of |features|: finite
    extras: Any = ()  # as the loader gave it: what stood behind the labels, or the whole mapping


class HeadPass:
    """The head's features, logits and labels of a whole loader, for any number of measures.

    Every measure of the head takes ``(model, ..., loader)``, or a `HeadPass` in the place of the model; then the loader
    is left out. Several measures that get the same `HeadPass` find and check the head once; with `cached` they share
    one pass of the network.

    Args:
        model: An ``nn.Module`` (compiled, DataParallel and DDP ones are unwrapped), or a function, then with ``layer``.
        loader: Any iterable of ``(inputs, labels, ...)``, of mappings with such keys, or of inputs alone where labels
            are not needed. Inputs: a tensor, or a tuple of tensors for several. `Batches` for other forms.
        layer: The head, if it cannot be found: a module or its dotted name.
        additional_forward_args: Passed on to every forward pass.
        class_names: C names; None: numbers, or the names in a table.
        device: Where the model is expected to be; checked, never moved.
        show_progress: Show a tqdm bar in every pass.
        output: Takes what the model returns, gives the logits ``(N, C)``. None: a tensor, ``.logits``, ``["logits"]``,
            or the first of a tuple.

    Raises:
        OptionError: The model or the loader is not one.
        HeadError: The model is a bare function, and ``layer`` is not a module.

    Example:
        >>> from captum_classfilters import HeadPass, metrics
        >>> from captum_classfilters.assets import load_demo_network, load_images
        >>> head_pass = HeadPass(load_demo_network()[0], load_images("test").batches(500)[:1]).cached()
        >>> head_pass.head
        Head('fc', 64 features, 10 classes)
    """

    def __init__(
        self,
        model: Any,
        loader: Iterable[Any],
        *,
        layer: nn.Module | str | None = None,
        additional_forward_args: Any = None,
        class_names: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        show_progress: bool = False,
        output: Callable[[Any], Tensor] | None = None,
    ) -> None:
        forward = unwrap(model)
        if not isinstance(forward, nn.Module):
            if not callable(forward):
                raise OptionError(f"the model must be an nn.Module or a function, got {type(model).__name__}")
            if not isinstance(layer, nn.Module):
                raise HeadError(
                    "a bare function does not show its layers: pass layer= with the nn.Linear that is its head"
                )
        if isinstance(forward, torch.jit.ScriptModule):
            raise OptionError("a ScriptModule takes no hooks; pass the nn.Module it was made from")
        check_loader(loader)
        self.model, self.loader, self.layer = model, loader, layer
        self.class_names, self.show_progress = class_names, show_progress
        self.output = check_output(output)
        self._forward = forward
        self._module = forward if isinstance(forward, nn.Module) else None
        arguments = additional_forward_args
        self._arguments = () if arguments is None else arguments if isinstance(arguments, tuple) else (arguments,)
        self._head: Head | None = None
        owner = self._module if self._module is not None else layer
        _check_device(owner, device)
        self._placement = Placement.of(owner)  # type: ignore[arg-type]

    @classmethod
    def of(cls, model: Any, loader: Iterable[Any] | None = None, layer: nn.Module | str | None = None) -> "HeadPass":
        """What a measure was given: a `HeadPass` in the place of the model, or a model and a loader.

        Raises:
            OptionError: A `HeadPass` together with a loader or a layer, or a model without a loader.
        """
        if isinstance(model, cls):
            if loader is not None or layer is not None:
                raise OptionError(
                    "a HeadPass has its own loader and layer; leave loader= and layer= out, or pass the model itself"
                )
            return model
        if loader is None:
            raise OptionError("a loader is missing: pass the model and a loader, or HeadPass(model, loader) alone")
        return cls(model, loader, layer=layer)

    @property
    def head(self) -> Head:
        """The head; where no pass has found it yet, the loader's first batch is run for it."""
        if self._head is None:
            with self.batches(need_labels=None) as stream:
                next(stream)
        return self._head  # type: ignore[return-value]

    @contextmanager
    def batches(
        self,
        *,
        need_labels: bool | None = True,
        need_maps: bool | None = False,
        num_classes: int | None = None,
        description: str = "",
        many_labels: bool = False,
    ) -> Iterator[Iterator[Batch]]:
        """Borrow the model and read the loader once: ``with head_pass.batches() as stream: for batch in stream``.

        Args:
            need_labels: True: batches without labels are refused. False: labels are given where there are some. None:
                they play no part.
            need_maps: Also give the feature map behind the head; None: where there is one.
            num_classes: Checked against the head.
            description: Label of the progress bar.
            many_labels: Labels that are rows of 0 and 1 are given as ``(N, C)`` bool.

        Raises:
            HeadError: There is no head, or more than one reading of it; or no map behind it where maps are needed.
            LabelError, ShapeError: Labels or inputs are in none of the forms that are read.
            NonFiniteError: NaN or infinity in weights or features; names layer and batch.
            EmptyLoaderError: The loader gave no sample.
            OptionError: The head has not ``num_classes`` outputs.

        Warns:
            NoPositionsWarning: Maps are needed, and the one behind the head has a single position.
        """
        with (
            borrowed(self._module) as borrow,
            samples(
                self.loader,
                placement=self._placement,
                need_labels=need_labels,
                many_labels=many_labels,
                description=description,
                show_progress=self.show_progress,
            ) as stream,
        ):
            yield self._run(stream, borrow, need_maps, num_classes, need_labels is not None)

    def _run(
        self,
        stream: Iterator[Samples],
        borrow: Borrowed,
        need_maps: bool | None,
        num_classes: int | None,
        labels_matter: bool,
    ) -> Iterator[Batch]:
        forward = self._forward if self.output is None else self._logits
        reader = _Reader(forward, self._module, self.layer, borrow, need_maps, self._arguments, self._head)
        for position, batch in enumerate(stream):
            result = reader.read(batch)
            self._head = result.head
            classes = result.head.num_classes
            if position == 0 and num_classes is not None and num_classes != classes:
                raise OptionError(
                    f"num_classes={num_classes}, but the head {result.head.name} has {classes} outputs; leave it out, "
                    f"or pass {classes}"
                )
            if result.labels is not None and (labels_matter or result.labels.dim() == 2):
                check_range(result.labels, classes, batch.place)
            yield result

    def _logits(self, *args: Any) -> Tensor:
        return read_by(self.output, self._forward(*args))

    def over(self, loader: Iterable[Any]) -> "HeadPass":
        """The same network and head over another loader."""
        known = self._head is not None and not self._head.parts and not self._head.auxiliary
        layer = self._head.module if known else self.layer  # type: ignore[union-attr]
        return HeadPass(
            self.model,
            loader,
            layer=layer,
            additional_forward_args=self._arguments,
            class_names=self.class_names,
            show_progress=self.show_progress,
            output=self.output,
        )

    def cached(self, *, need_labels: bool | None = True, many_labels: bool = False) -> "HeadPass":
        """Run the network over the loader once and keep what its head read: for measures that share one pass.

        Kept are features ``(N, K)``, logits ``(N, C)`` and labels, on the model's device; no images, no maps. Each pass
        over the result gives them again, batch by batch.

        Args:
            need_labels: As for `batches`.
            many_labels: As for `batches`.

        Raises:
            As `batches` does.
        """
        with self.batches(need_labels=need_labels, description="HeadPass", many_labels=many_labels) as stream:
            kept = [batch._replace(inputs=(), extras=()) for batch in stream]
        return _Cached(self, kept)


class _Cached(HeadPass):
    """A `HeadPass` that does not run the network."""

    def __init__(self, source: HeadPass, kept: list[Batch]) -> None:
        self.__dict__.update(source.__dict__)
        self._kept = kept

    @contextmanager
    def batches(
        self,
        *,
        need_labels: bool | None = True,
        need_maps: bool | None = False,
        num_classes: int | None = None,
        description: str = "",
        many_labels: bool = False,
    ) -> Iterator[Iterator[Batch]]:
        """As `HeadPass.batches`; maps are not kept."""
        if need_maps:
            raise HeadError("a cached pass keeps no feature maps; pass the HeadPass that it was made from")
        if need_labels and any(batch.labels is None for batch in self._kept):
            raise OptionError("the cached pass has no labels; make it from a loader that gives labels")
        if num_classes is not None and num_classes != self.head.num_classes:
            raise OptionError(f"num_classes={num_classes}, but the head has {self.head.num_classes} outputs")
        if (
            not many_labels
            and need_labels
            and any(batch.labels.dim() == 2 for batch in self._kept if batch.labels is not None)
        ):
            raise OptionError(
                "the cached pass has many labels, (N, C), and this measure takes one class for each sample"
            )
        yield iter(self._kept)

    def cached(self, *, need_labels: bool | None = True, many_labels: bool = False) -> HeadPass:
        """Itself."""
        return self


class _Reader:
    """Runs the model on a batch and reads the head; a head that is not known yet is found in the first."""

    def __init__(
        self,
        forward: Any,
        model: nn.Module | None,
        layer: nn.Module | str | None,
        borrow: Borrowed,
        need_maps: bool | None,
        arguments: tuple[Any, ...],
        head: Head | None,
    ) -> None:
        self._forward, self._borrow, self._need_maps, self._arguments = forward, borrow, need_maps, arguments
        self._search: HeadSearch | None = None
        self._owner = model
        self._head = head
        self._seen: dict[str, Tensor] = {}
        if head is None:
            self._search = HeadSearch(model, layer)
            self._search.watch(borrow)
        else:
            self._hook(head)

    def read(self, batch: Samples) -> Batch:
        self._seen.clear()
        with image_errors(batch.inputs, self._owner):
            output = self._forward(*batch.inputs, *self._arguments)
            found = self._find(output) if self._head is None else None
        if found is not None:
            head, features, logits = found
            wants_maps = self._need_maps is not False and head.feature_map is not None
            maps = self._first_maps(batch.inputs) if wants_maps else None
        else:
            head = self._head  # type: ignore[assignment]
            if "inputs" not in self._seen:
                raise HeadError(
                    f"layer {head.name} did not run in batch {batch.place}; it must run once in every forward pass"
                )
            features = head.pool(self._seen["inputs"])
            logits = head.logits(features, self._seen["output"])
            maps = self._seen.get("maps")
        # all sums and measures behind this are in float64
        place = home(features.device)
        features, logits = features.to(place), logits.to(place)
        maps = None if maps is None else maps.to(place)
        labels = None if batch.labels is None else batch.labels.to(place)
        # one number answers two questions: is all finite, and how large does it get
        largest = float(features.detach().abs().max())
        if not math.isfinite(largest):
            raise NonFiniteError(
                f"expected finite features, got NaN or infinity at the input of layer {head.name} in batch "
                f"{batch.place}; look at that batch and at the layers before it"
            )
        # a class that the network masks has -inf
        if not math.isfinite(float(logits.detach().max())):
            raise NonFiniteError(
                f"expected finite logits, got NaN or infinity from layer {head.name} in batch {batch.place}: its "
                f"weights or features, up to {largest:.3g}, are too large for {logits.dtype}; use a wider dtype"
            )
        return Batch(head, batch.inputs, features, logits, labels, maps, largest, batch.extras)

    def _find(self, output: Any) -> Found:
        result = self._search.found(output)  # type: ignore[union-attr]
        self._search, self._head = None, result.head
        if not bool(torch.isfinite(result.head.weight).all() and torch.isfinite(result.head.bias).all()):
            raise NonFiniteError(
                f"expected finite weights, got NaN or infinity in layer {result.head.name}; load a whole checkpoint"
            )
        self._hook(result.head)
        return result

    def _hook(self, head: Head) -> None:
        self._borrow.after(head.module, self._keep_call)
        behind = head.feature_map
        if self._need_maps and behind is None:
            raise HeadError(
                f"there is no feature map of {head.num_features} channels behind the head {head.name}: {head.no_map}. "
                "LayerGradCamPlusPlus(model, layer, reshape=...) shows any layer that has positions"
            )
        if self._need_maps is not False and behind is not None:
            if behind.positions_at:
                warnings.warn(
                    f"no position is left at this layer: the map behind the head {head.name}, the output of "
                    f"{behind.name}, has one. The last layer with positions is {behind.positions_at}; pass larger "
                    "inputs, or show that layer by LayerGradCamPlusPlus",
                    NoPositionsWarning,
                    stacklevel=2,
                )
            self._borrow.after(behind.module, self._keep_maps)

    def _first_maps(self, inputs: tuple[Any, ...]) -> Tensor:
        # the hook on the map was not there yet: run this one batch again
        self._forward(*inputs, *self._arguments)
        return self._seen["maps"]

    def _keep_call(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._seen["inputs"], self._seen["output"] = args[0], output

    def _keep_maps(self, module: nn.Module, args: Any, output: Tensor) -> None:
        # a copy: an in-place operation may follow
        self._seen["maps"] = self._head.feature_map.read(output).clone()  # type: ignore[union-attr]


def single_batch(
    model: Any,
    inputs: Any,
    *,
    layer: nn.Module | str | None = None,
    additional_forward_args: Any = None,
    need_maps: bool | None = False,
    device: torch.device | str | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> Batch:
    """One batch of inputs without labels, run through the model; the head is found in it."""
    head_pass = HeadPass(
        model,
        [(inputs, None)],
        layer=layer,
        additional_forward_args=additional_forward_args,
        device=device,
        output=output,
    )
    with head_pass.batches(need_labels=False, need_maps=need_maps) as stream:
        return next(stream)


_Answer = TypeVar("_Answer")
_SIDES = (64, 224, 32, 28, 96, 128, 160, 192, 240, 256, 299, 384)


def probed_head(model: nn.Module, layer: nn.Module | str | None = None) -> Head | None:
    """The head that one pass of noise shows, for those who have no images; None where no noise fits the model.

    Raises:
        HeadError: The model takes the noise, and there is no head; or ``layer`` is not it.
    """

    def find(noise: Tensor) -> Head:
        return single_batch(model, noise, layer=layer).head

    return _with_noise(model, find)


def ran_on_noise(model: nn.Module, module: nn.Module) -> bool | None:
    """Whether a module runs in a pass of noise through the model; None where no noise fits the model."""
    placement = Placement.of(model)
    calls: list[int] = []

    def forward(noise: Tensor) -> bool:
        with borrowed(model) as borrow:
            borrow.after(module, lambda *_: calls.append(1))
            model(placement.move(noise))
        return bool(calls)

    return _with_noise(model, forward)


def _with_noise(model: nn.Module, call: Callable[[Tensor], _Answer]) -> _Answer | None:
    """What ``call`` gives for the first noise that the model takes; None where it takes none."""
    first = next((module for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding, *CONVS))), None)
    shapes: list[tuple[int, ...]] = []
    if isinstance(first, CONVS):
        axes = first.weight.dim() - 2
        sides = _SIDES if axes < 3 else (32, 16, 64)
        shapes = [(4, first.in_channels, *(side,) * axes) for side in (*_told_sides(model), *sides)]
    elif isinstance(first, nn.Linear):
        shapes = [(4, first.in_features)]
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        try:
            return call(torch.rand(shape, generator=generator))
        except HeadError:
            raise
        except Exception:  # a model may raise anything on an image of a size that it does not take
            continue
    return None


def _told_sides(model: nn.Module) -> list[int]:
    """The sides of images that a model says it takes, as vision transformers do."""
    told: list[int] = []
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            for name in ("image_size", "img_size"):
                value = getattr(owner, name, None)
                side = value[0] if isinstance(value, list | tuple) and value else value
                if isinstance(side, int) and side not in told:
                    told.append(side)
    return told


def class_map(batch: Batch, classes: Tensor, chosen: Tensor, channel_weights: str) -> Tensor:
    """The feature map behind the head, summed over chosen channels alone.

    Args:
        batch: With maps.
        classes: Whose weights each sample takes, ``(N,)`` int64.
        chosen: Channels of each sample, ``(N, K)`` bool.
        channel_weights: ``"head"``: each channel times its weight for the class; ``"ones"``: the plain sum.

    Returns:
        ``(N, 1, *positions)``, signed; of images ``(N, 1, h, w)``.
    """
    maps: Tensor = batch.maps  # type: ignore[assignment]
    weights = batch.head.weight[classes] if channel_weights == "head" else torch.ones_like(batch.features)
    return weighed(maps, (weights * chosen).to(maps.dtype)).to(batch.head.device)


def weighed(maps: Tensor, weights: Tensor) -> Tensor:
    """The sum over channels of maps ``(N, K, *positions)`` times weights ``(N, K)``: ``(N, 1, *positions)``."""
    return torch.einsum("nk...,nk->n...", maps, weights).unsqueeze(1)


def position_map(batch: Batch, slope: Tensor, offset: Tensor | None = None, *, exact: bool = True) -> Tensor | None:
    """What each position adds to a score that is a sum over channels, ``sum_k slope_k * feature_k + offset_k``.

    Of a maximum the whole feature is at its position.

    Args:
        batch: With maps.
        slope: ``(N, K)``.
        offset: ``(N, K)``; None: zeros.
        exact: None where the positions do not add up to the score, as behind a class token. False: what the score would
            be at each position, divided by their number.

    Returns:
        ``(N, 1, *positions)``, which sums to the score of each sample.
    """
    behind = batch.head.feature_map
    if batch.maps is None or behind is None or (exact and not behind.exact):
        return None
    maps, features, slope = wide(batch.maps), wide(batch.features), wide(slope)
    positions = maps[0, 0].numel()
    if behind.pooling == "max":
        flat = maps.flatten(2)
        places = flat.argmax(2, keepdim=True)
        maps = torch.zeros_like(flat).scatter_(2, places, flat.gather(2, places) * positions).view_as(maps)
    half = min(torch.finfo(batch.maps.dtype).bits, torch.finfo(batch.features.dtype).bits) < 32
    most = (3e-2 if half else 1e-3) * (float(features.abs().max()) + 1e-12)
    if exact and float((maps.flatten(2).mean(2) - features).abs().max()) > most:
        return None
    total = weighed(maps, slope)
    if offset is not None:
        total = total + wide(offset).sum(1).view(-1, *[1] * (total.dim() - 1))
    return (total / positions).float()


def _check_device(owner: Any, device: torch.device | str | None) -> None:
    first = next(owner.parameters(), None)
    if device is None or first is None:
        return
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device must be one that torch knows, such as 'cuda:0', got {device!r}") from error
    same_index = asked.index is None or asked.index == (first.device.index or 0)
    if asked.type != first.device.type or not same_index:
        raise DeviceError(
            f"the model is on {first.device}, but device={str(asked)!r} was asked for; move it yourself, "
            f"model.to({str(asked)!r}): batches follow the model, the model is never moved"
        )
