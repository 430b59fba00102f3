"""The feature map behind a head: the module whose output, pooled over positions, the head reads.

It is looked for among the outputs that modules gave before the head ran, backwards from the head, and proved by value.
N samples, K features, h x w positions.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Two images are enough to tell one feature map from another, and cost next to nothing to keep
PROBE = 2


@dataclass(frozen=True)
class FeatureMap:
    """The module whose output, pooled over positions, is the head's input.

    ``exact`` is False where something stands between pooling and head (the LayerNorm of ConvNeXt): the channels are
    the same, their values are not.
    """

    name: str
    module: nn.Module
    layout: str
    relu: bool
    exact: bool

    def read(self, output: Tensor) -> Tensor:
        """The module's output as a map of shape ``(N, K, h, w)``."""
        maps = _as_nchw(output, self.layout)
        return maps.relu() if self.relu else maps


class MapSearch:
    """What modules gave in one forward pass, of the first images, and the map behind a head among it."""

    def __init__(self) -> None:
        self._snapshots: list[tuple[nn.Module, Tensor | None]] = []

    def __len__(self) -> int:
        return len(self._snapshots)

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook behind each module."""
        if isinstance(output, Tensor) and output.dim() in (3, 4):
            # a copy: an in-place activation may follow
            self._snapshots.append((module, output[:PROBE].detach().clone()))
        elif has_matrix(module):
            self._snapshots.append((module, None))

    def found(
        self, features: Tensor, position: int, inside: Iterable[nn.Module], name: Callable[[nn.Module], str]
    ) -> FeatureMap | None:
        """Walk back from the head to the nearest map; a convolution or a Linear is as far as it can be.

        Args:
            features: What the head reads, ``(N, K)``.
            position: How much had been kept when the head had run.
            inside: The head and its parts, which are no maps behind it.
            name: Gives a module's name.
        """
        wanted, small, normalised = features[:PROBE], None, None
        inside = set(inside)
        for module, snapshot in reversed(self._snapshots[:position]):
            if module in inside:
                continue
            for layout in _layouts(snapshot, features.shape[1]):
                maps = _as_nchw(snapshot, layout)  # type: ignore[arg-type]  # None has no layout
                relu = _pools_to(maps, wanted)
                has_positions = maps[0, 0].numel() > 1
                candidate = FeatureMap(name(module), module, layout, bool(relu), relu is not None)
                if relu is not None and has_positions:
                    return candidate
                if relu is not None:
                    small = small or candidate
                elif has_positions:
                    normalised = normalised or candidate
            if has_matrix(module):
                break
        return normalised or small


def shows_features(output: Any, features: Tensor) -> bool:
    """Do the channels of a layer's output, averaged (or maximised) over positions, give the head's input ``(N, K)``?"""
    if not isinstance(output, Tensor) or len(output) != len(features):
        return False
    if output.shape == features.shape:
        return close(output, features)
    layouts = _layouts(output if output.dim() in (3, 4) else None, features.shape[1])
    return any(_pools_to(_as_nchw(output, layout), features) is not None for layout in layouts)


def has_matrix(module: nn.Module) -> bool:
    """Does the module have a matrix of weights, as a convolution or a Linear?"""
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def close(a: Tensor, b: Tensor) -> bool:
    """Are the numbers equal, but for the rounding of their type?"""
    half = min(torch.finfo(a.dtype).bits, torch.finfo(b.dtype).bits) < 32
    # what is not finite is no reason to look elsewhere: `head_pass.py` refuses it and names the batch
    a, b = (tensor.double().nan_to_num(0.0, 0.0, 0.0) for tensor in (a, b))
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-30)
    # 1e-3: a GPU's convolutions round float32 to TF32 unless told otherwise, its matrix products do not
    return bool(((a - b).abs().max() <= (3e-2 if half else 1e-3) * scale).item())


def _layouts(snapshot: Tensor | None, channels: int) -> list[str]:
    if snapshot is None:
        return []
    if snapshot.dim() == 4:
        return [layout for layout, axis in (("NCHW", 1), ("NHWC", 3)) if snapshot.shape[axis] == channels]
    # one token alone is a class token, not a map
    square = snapshot.shape[1] > 1 and round(snapshot.shape[1] ** 0.5) ** 2 == snapshot.shape[1]
    return ["NLC"] if snapshot.shape[2] == channels and square else []


def _as_nchw(tensor: Tensor, layout: str) -> Tensor:
    if layout == "NHWC":
        return tensor.permute(0, 3, 1, 2)
    if layout == "NLC":
        side = round(tensor.shape[1] ** 0.5)
        return tensor.transpose(1, 2).reshape(len(tensor), -1, side, side)
    return tensor


def _pools_to(maps: Tensor, features: Tensor) -> bool | None:
    """Does the map's average (or maximum) give the features? False: as it is; True: after a ReLU; None: no."""
    maps = maps.flatten(2)
    for relu in (False, True):
        values = maps.relu() if relu else maps
        if any(p.shape == features.shape and close(p, features) for p in (values.double().mean(2), values.amax(2))):
            return relu
    return None
