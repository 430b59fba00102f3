"""Receptive fields: where on the image a filter responds. Maps of layers are read, enlarged and cut at a threshold.

N images, K filters of a layer, h x w positions of a map, H x W pixels.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.core.borrow import Borrowed, borrowed, unwrap
from captum_classfilters.core.check import number
from captum_classfilters.core.errors import LayerError, NonFiniteError, OptionError, ShapeError
from captum_classfilters.core.layout import Layout, LayoutWatch
from captum_classfilters.core.stream import Placement, Samples, refuse_iterator, samples
from captum_classfilters.core.wide import full_precision, wide
from captum_classfilters.decoupling import PathDecoupler

# How many numbers of enlarged maps are held at once
CELLS = 2**24
Layers = Iterable[nn.Module | str] | None
Thresholds = Mapping[str, Tensor]


def receptive_fields(maps: Tensor, thresholds: Tensor, size: Sequence[int]) -> Tensor:
    """Where filters respond: their maps, enlarged to the image, above each filter's threshold.

    Source: "Interpretable neural network decoupling", section 4.2; "Network dissection" (Bau et al. 2017), section 2.2.
    No difference; bilinear with ``align_corners=False``.

    Args:
        maps: ``(N, K, h, w)``; a closed filter is 0 everywhere.
        thresholds: ``(K,)``, as from `activation_thresholds`.
        size: H and W of the images.

    Returns:
        ``(N, K, H, W)`` bool.

    Raises:
        ShapeError: ``thresholds`` is not one number for each filter.

    Example:
        >>> receptive_fields(torch.tensor([[[[0.0, 4.0]]]]), torch.tensor([2.0]), (1, 4)).int().tolist()
        [[[[0, 0, 1, 1]]]]
    """
    if maps.dim() != 4 or thresholds.shape != maps.shape[1:2]:
        raise ShapeError(
            f"expected maps (N, K, h, w) and thresholds (K,), got {tuple(maps.shape)} and {tuple(thresholds.shape)}; "
            "pass the thresholds of these filters"
        )
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    large = F.interpolate(wide, tuple(size), mode="bilinear", align_corners=False)
    return large > thresholds.to(large)[:, None, None]


def field_iou(fields: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of every filter's receptive field and every mask of the same image.

    Source: "Interpretable neural network decoupling", section 4.2. No difference.

    Args:
        fields: ``(N, K, H, W)`` bool.
        masks: ``(N, T, H, W)`` bool.

    Returns:
        ``(N, K, T)`` float64; NaN where both are empty.

    Raises:
        ShapeError: Fields and masks belong to different images or have different sizes.

    Example:
        >>> field_iou(torch.tensor([[[[True, True, False]]]]), torch.tensor([[[[False, True, True]]]])).item()
        0.333...
    """
    if (
        fields.dim() != 4
        or masks.dim() != 4
        or fields.shape[::2] != masks.shape[::2]
        or fields.shape[3] != masks.shape[3]
    ):
        raise ShapeError(
            f"expected fields (N, K, H, W) and masks (N, T, H, W), got {tuple(fields.shape)} and {tuple(masks.shape)}; "
            "masks must be those of the same images, in their size"
        )
    # float32 counts exactly up to 2**24 pixels; half precision, as under autocast, would not
    with full_precision(fields.device.type):
        shared = wide(torch.bmm(fields.flatten(2).float(), masks.flatten(2).float().mT))
    union = (fields.sum((2, 3))[:, :, None] + masks.sum((2, 3))[:, None]).to(shared.device) - shared
    return shared / union


def activation_thresholds(
    model: Any, loader: Iterable[Any], layers: Layers = None, *, quantile: float = 0.005, show_progress: bool = False
) -> dict[str, Tensor]:
    """For each filter the value that a share ``quantile`` of all its responses exceeds, over all images and positions.

    The value is exact. It takes the memory of each filter's highest responses, a share ``quantile`` of all. The loader
    is first read without the model, to count the images. At least one response exceeds the threshold (except for ties).
    A filter that responds less often has threshold 0.

    Source: "Network dissection" (Bau et al. 2017), section 2.2, P(a > T) = .005; "Interpretable neural network
    decoupling", section 4.2. Differs: negative responses count as 0, as behind the ReLU of eq. 1.

    Args:
        model: The network, or a `PathDecoupler`; borrowed.
        loader: Batches of images ``(N, c, H, W)`` or of tuples that begin with them, all of one size; read twice.
        layers: Names or modules whose outputs are the maps ``(N, K, h, w)``. Of a decoupler: gated convolutions, whose
            maps are read behind the gates, on the norm; None: all of them.
        quantile: Share in (0, 1).
        show_progress: A tqdm bar.

    Returns:
        By layer, ``(K,)`` on the model's device.

    Raises:
        LayerError: A layer does not exist, does not run once in each forward, or gives no maps.
        OptionError: ``quantile`` is out of range; the loader gives other images when read again.
        EmptyLoaderError: No images, or an iterator, which can be read only once.
        ShapeError, NonFiniteError: Images or maps are not as expected.
    """
    quantile = number(quantile, "quantile", 0, 1, open_ends=True, meaning="a share of the responses")
    refuse_iterator(loader, "the loader")
    total = sum(batch.size for batch in image_batches(loader))
    return _thresholds(model, loader, layers, quantile, total, show_progress)


def _thresholds(
    model: Any, loader: Iterable[Any], layers: Layers, quantile: float, total: int, show_progress: bool
) -> dict[str, Tensor]:
    """`activation_thresholds` of a loader whose ``total`` of images is known."""
    count, highest = 0, dict[str, Tensor]()
    with borrowed(network_of(model)) as borrow:
        reader = MapReader(model, layers, borrow)
        for batch in image_batches(loader, show_progress, "thresholds"):
            count += batch.size
            for name, maps in reader.maps(batch.inputs[0]).items():
                values = maps.transpose(0, 1).flatten(1)
                kept = 1 + max(1, math.floor(quantile * total * maps[0, 0].numel() + 1e-9))
                values = torch.cat([highest[name], values], 1) if name in highest else values
                highest[name] = values.topk(min(kept, values.shape[1])).values
    if count != total:
        raise OptionError(
            f"the loader gave {total} images, and {count} when read again; it must give the same each time"
        )
    return {name: values[:, -1].clone() for name, values in highest.items()}


def thresholds_of(
    thresholds: Thresholds | float, model: Any, loader: Iterable[Any], layers: Layers, total: int, show_progress: bool
) -> Thresholds:
    """Thresholds from the user's ``thresholds=``, which is a mapping, or a share for which the loader is read once."""
    if isinstance(thresholds, Mapping):
        return thresholds
    meaning = "a share of the responses, unless you pass what activation_thresholds gives"
    share = number(thresholds, "thresholds", 0, 1, open_ends=True, meaning=meaning)
    return _thresholds(model, loader, layers, share, total, show_progress)


def check_thresholds(thresholds: Thresholds, layers: Sequence[str]) -> None:
    """Refuse thresholds that lack a layer."""
    if missing := [name for name in layers if name not in thresholds]:
        raise OptionError(
            f"thresholds have no layer {missing[0]!r}; pass activation_thresholds(model, loader, layers) of this one"
        )


class MapReader:
    """Runs a model and reads the maps of some layers, behind their gates if they have any; negative values become 0."""

    def __init__(self, model: Any, layers: Layers, borrow: Borrowed) -> None:
        self.model = network_of(model)
        self.decoupler = self.model if isinstance(self.model, PathDecoupler) else None
        self._modules = {name: module for name, module in _network(self.model).named_modules() if name}
        self.layers = tuple(dict.fromkeys(self._name(layer) for layer in self._requested(layers)))
        if not self.layers:
            raise LayerError("layers= is empty; name at least one layer")
        self._outputs: dict[str, Tensor] = {}
        # of gated convolutions the layout is known; of other layers the first forward tells it
        free = () if self.decoupler is not None else self.layers
        self._watches = {name: LayoutWatch(self.model, self._modules[name], borrow) for name in free}
        self._layouts = dict.fromkeys(set(self.layers) - set(free), Layout())
        sites = {unit.conv: unit.site for unit in self.decoupler.units} if self.decoupler else {}
        for name in self.layers:
            borrow.after(self._modules[sites.get(name, name)], self._keeping(name))
        self._placement = Placement.of(self.model)
        self.device = self._placement.device

    def _requested(self, layers: Layers) -> list[Any]:
        if layers is None and self.decoupler is not None:
            return list(self.decoupler.layers)
        if layers is None or isinstance(layers, str | nn.Module) or not isinstance(layers, Iterable):
            got = "none" if layers is None else type(layers).__name__
            raise LayerError(f"layers must be a list of names or modules, got {got}; say whose maps are to be read")
        return list(layers)

    def _name(self, layer: Any) -> str:
        names: list[str] = list(self._modules if self.decoupler is None else self.decoupler.layers)
        for name in names:
            if layer is self._modules[name] or layer == name:
                return name
        what = "a layer of the model" if self.decoupler is None else "a gated convolution of the decoupler"
        shown = repr(layer) if isinstance(layer, str) else f"a {type(layer).__name__}"
        raise LayerError(f"expected {what}, got {shown}; there are {', '.join(names[:6])}, ...")

    def _keeping(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() not in (3, 4):
                got = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
                raise LayerError(f"layer {name} must give maps (N, K, h, w), got {got}; name one that does")
            if name in self._outputs:
                raise LayerError(f"layer {name} runs more than once in a forward; name one before it that runs once")
            # a copy, because an operation in place may follow
            self._outputs[name] = output.clone()

        return hook

    def gates(self, images: Tensor) -> dict[str, Tensor]:
        """One forward's gates, ``(N, K)`` by layer; empty without a decoupler."""
        self._outputs.clear()
        images = self._placement.move(images)
        if self.decoupler is None:
            self.model(images)
            return {}
        _, gates = self.decoupler.gates(images)
        return {name: gates[self.decoupler.layers.index(name)] for name in self.layers}

    def read(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One forward's ``(maps, gates)``: maps ``(N, K, h, w)`` by layer, at least float32."""
        gates = self.gates(images)
        maps_by_layer = {}
        for name in self.layers:
            if name not in self._outputs:
                raise LayerError(f"layer {name} did not run in this forward; it must run once in each")
            maps = self._as_maps(name, self._outputs.pop(name))
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32)).relu()
            # the map was kept before the decoupler's hook applied the gate
            maps = maps * gates[name].to(maps.dtype)[:, :, None, None] if gates else maps
            if not bool(torch.isfinite(maps).all()):
                raise NonFiniteError(f"the maps of layer {name} hold NaN or infinity; look at these images")
            maps_by_layer[name] = maps
        return maps_by_layer, gates

    def _as_maps(self, name: str, output: Tensor) -> Tensor:
        """A layer's output as ``(N, K, h, w)``."""
        if name in self._watches:
            watch = self._watches.pop(name)
            watch.close()
            layout = watch.layout(output)
            if layout is None or layout.read(output[:1]).dim() != 4:
                raise LayerError(
                    f"layer {name} must give maps (N, K, h, w), got {tuple(output.shape)}, of which nothing in the "
                    "forward pass says which axes are channels and which positions; name one that does"
                )
            self._layouts[name] = layout
        return self._layouts[name].read(output)

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The maps alone."""
        return self.read(images)[0]


def network_of(model: Any) -> nn.Module:
    """The module behind a wrapped model; a `PathDecoupler` is one."""
    inner = unwrap(model)
    if not isinstance(inner, nn.Module):
        raise OptionError(f"the model must be an nn.Module, got {type(model).__name__}; its layers are to be read")
    return inner


def _network(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, PathDecoupler) else model


def image_batches(loader: Iterable[Any], show_progress: bool = False, description: str = "") -> Iterator[Samples]:
    """The loader's batches, whose first input is images ``(N, c, H, W)``, all of one size."""
    size = None
    with samples(loader, read_labels=False, show_progress=show_progress, description=description) as stream:
        for batch in stream:
            images = batch.inputs[0]
            if not isinstance(images, Tensor) or images.dim() != 4:
                got = str(tuple(images.shape)) if isinstance(images, Tensor) else type(images).__name__
                raise ShapeError(
                    f"images must be a tensor (N, c, H, W), got {got} in batch {batch.place}; stack them in the "
                    "collate_fn"
                )
            size = size or images.shape[2:]
            if images.shape[2:] != size:
                raise ShapeError(
                    f"images must all have one size, got {tuple(images.shape[2:])} in batch {batch.place} after "
                    f"{tuple(size)}; resize them in the data set, with their masks"
                )
            yield batch
