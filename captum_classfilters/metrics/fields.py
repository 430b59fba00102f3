"""Receptive fields: where on the image a filter responds. Maps of layers are read, enlarged and cut at a threshold.

`concepts.py` compares them with masks of concepts, `occlusion.py` covers these. N images, K filters of a layer, h x w
positions of a map, H x W pixels.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from captum_classfilters.core.borrow import Borrowed, borrowed, unwrap
from captum_classfilters.core.errors import EmptyLoaderError, LayerError, NonFiniteError, OptionError, ShapeError
from captum_classfilters.core.stream import refuse_iterator, unpack, value_to_model
from captum_classfilters.decoupling import PathDecoupler

# Numbers of enlarged maps that are held at once
CELLS = 2**24
Layers = Iterable[nn.Module | str] | None


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
        ShapeError: One threshold for each filter is not there.

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
        ShapeError: They are of other images or sizes.

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
    with torch.autocast(fields.device.type, enabled=False):
        shared = torch.bmm(fields.flatten(2).float(), masks.flatten(2).float().mT).double()
    union = fields.sum((2, 3))[:, :, None] + masks.sum((2, 3))[:, None] - shared
    return shared / union


def activation_thresholds(
    model: Any, loader: Iterable[Any], layers: Layers = None, *, quantile: float = 0.005, show_progress: bool = False
) -> dict[str, Tensor]:
    """For each filter the value that a share ``quantile`` of all its responses exceeds, over all images and positions.

    Exact: the highest values of each filter are kept, ``quantile`` of all that pass by, which is the memory it takes;
    to know how many, the loader is read once before without running the model. At least one response lies above
    (ties aside), however small the share. A filter that responds less often has threshold 0.

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
    if not 0 < quantile < 1:
        raise OptionError(f"quantile is a share of responses in (0, 1), got {quantile!r}")
    refuse_iterator(loader, "the loader")
    total = sum(len(images) for images in _images(loader))
    if not total:
        raise EmptyLoaderError("the loader gave no image; expected at least one batch")
    seen, highest = 0, dict[str, Tensor]()
    with borrowed(network_of(model)) as borrow:
        reader = MapReader(model, layers, borrow)
        for images in _images(loader, show_progress, "thresholds"):
            seen += len(images)
            for name, maps in reader.maps(images).items():
                values = maps.transpose(0, 1).flatten(1)
                kept = 1 + max(1, math.floor(quantile * total * maps[0, 0].numel() + 1e-9))
                values = torch.cat([highest[name], values], 1) if name in highest else values
                highest[name] = values.topk(min(kept, values.shape[1])).values
    if seen != total:
        raise OptionError(
            f"the loader gave {total} images, and {seen} when read again; it must give the same each time"
        )
    return {name: values[:, -1].clone() for name, values in highest.items()}


class MapReader:
    """Runs a model and reads the maps of some layers, behind the gates where there are any; negative ones are 0."""

    def __init__(self, model: Any, layers: Layers, borrow: Borrowed) -> None:
        self.model = network_of(model)
        self.decoupler = self.model if isinstance(self.model, PathDecoupler) else None
        self._modules = {name: module for name, module in _network(self.model).named_modules() if name}
        self.layers = tuple(dict.fromkeys(self._name(layer) for layer in self._asked(layers)))
        if not self.layers:
            raise LayerError("layers= is empty; name at least one layer")
        self._seen: dict[str, Tensor] = {}
        sites = {unit.conv: unit.site for unit in self.decoupler.units} if self.decoupler else {}
        for name in self.layers:
            borrow.after(self._modules[sites.get(name, name)], self._keeping(name))
        first = next((each for each in self.model.parameters() if each.is_floating_point()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self._dtype = torch.get_default_dtype() if first is None else first.dtype

    def _asked(self, layers: Layers) -> list[Any]:
        if layers is None and self.decoupler is not None:
            return list(self.decoupler.layers)
        if layers is None or isinstance(layers, str | nn.Module) or not isinstance(layers, Iterable):
            got = "none" if layers is None else type(layers).__name__
            raise LayerError(f"layers must be a list of names or modules, got {got}; say whose maps are to be read")
        return list(layers)

    def _name(self, layer: Any) -> str:
        known = (
            self._modules if self.decoupler is None else {name: self._modules[name] for name in self.decoupler.layers}
        )
        for name, module in known.items():
            if layer is module or layer == name:
                return name
        what = "a layer of the model" if self.decoupler is None else "a gated convolution of the decoupler"
        shown = repr(layer) if isinstance(layer, str) else f"a {type(layer).__name__}"
        raise LayerError(f"expected {what}, got {shown}; there are {', '.join(list(known)[:6])}, ...")

    def _keeping(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4:
                got = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
                raise LayerError(f"layer {name} must give maps (N, K, h, w), got {got}; name one that does")
            if name in self._seen:
                raise LayerError(f"layer {name} runs more than once in a forward; name one before it that runs once")
            # a new tensor: an operation in place may follow
            self._seen[name] = output.clone()

        return hook

    def to_model(self, images: Tensor) -> Tensor:
        """Images where the model is, and of its dtype if they are floating."""
        moved: Tensor = value_to_model(images, self.device, self._dtype)
        return moved

    def gates(self, images: Tensor) -> dict[str, Tensor]:
        """One forward's gates, ``(N, K)`` by layer; empty without a decoupler."""
        self._seen.clear()
        if self.decoupler is None:
            self.model(self.to_model(images))
            return {}
        _, gates = self.decoupler.gates(self.to_model(images))
        return {name: gates[self.decoupler.layers.index(name)] for name in self.layers}

    def read(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One forward's ``(maps, gates)``: maps ``(N, K, h, w)`` by layer, at least float32."""
        gates = self.gates(images)
        found = {}
        for name in self.layers:
            if name not in self._seen:
                raise LayerError(f"layer {name} did not run in this forward; it must run once in each")
            maps = self._seen.pop(name)
            maps = maps.to(torch.promote_types(maps.dtype, torch.float32)).relu()
            # the decoupler's own hook comes after the one that kept this
            found[name] = maps * gates[name].to(maps.dtype)[:, :, None, None] if gates else maps
            if not bool(torch.isfinite(found[name]).all()):
                raise NonFiniteError(f"the maps of layer {name} hold NaN or infinity; look at these images")
        return found, gates

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """The maps alone."""
        return self.read(images)[0]


def network_of(model: Any) -> nn.Module:
    """The module behind what was given, a `PathDecoupler` or a plain one."""
    inner = unwrap(model)
    if not isinstance(inner, nn.Module):
        raise OptionError(f"the model must be an nn.Module, got {type(model).__name__}; its layers are to be read")
    return inner


def _network(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, PathDecoupler) else model


def passed(loader: Iterable[Any], show_progress: bool, description: str) -> Iterator[Any]:
    """The batches, under a tqdm bar."""
    if not isinstance(loader, Iterable):
        raise OptionError(f"expected a DataLoader or a list of batches, got {type(loader).__name__}")
    # iter: of a loader tqdm.auto makes two iterators, each with its workers
    with tqdm(iter(loader), desc=description, disable=not show_progress) as bar:
        yield from bar


def check_images(images: Any, size: tuple[int, int] | None, index: int) -> tuple[int, int]:
    """H and W of a batch of images; all batches must have the same."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = str(tuple(images.shape)) if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(
            f"images must be a tensor (N, c, H, W), got {got} in batch {index}; stack them in the collate_fn"
        )
    found = (images.shape[2], images.shape[3])
    if size is not None and found != size:
        raise ShapeError(
            f"images must all have one size, got {found} in batch {index} after {size}; resize them in the data set, "
            "with their masks"
        )
    return found


def _images(loader: Iterable[Any], show_progress: bool = False, description: str = "") -> Iterator[Tensor]:
    size = None
    for index, raw in enumerate(passed(loader, show_progress, description)):
        (images, *_), _ = unpack(raw, False, index)
        size = check_images(images, size, index)
        if len(images):
            yield images
