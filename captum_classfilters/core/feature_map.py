"""The feature map behind a head: the module whose output, pooled over positions, the head reads.

It is looked for among the outputs that modules gave before the head ran, backwards from the head, and proved by value.
`layout.py` says which axes are positions. N samples, K features, h x w positions.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_classfilters.core.layout import Grids, Layout
from captum_classfilters.core.wide import wide

# Two images are enough to tell one feature map from another, and cost next to nothing to keep
PROBE = 2


@dataclass(frozen=True)
class FeatureMap:
    """The module whose output the head reads, after pooling over positions.

    Attributes:
        name: The module's name.
        module: The module.
        layout: Where its output has channels and positions.
        relu: A ReLU stands behind it.
        pooling: ``"mean"`` or ``"max"`` over positions; ``"token"``: the head reads a class token beside the positions;
            ``"other"``: something between the smallest and the largest value.
        norm: What normalises the pooled features, where something does: `read` applies it at each position.
        positions_at: Where no position is left: the last layer before it that has some, and how many.
    """

    name: str
    module: nn.Module
    layout: Layout
    relu: bool
    pooling: str
    norm: "Normalised | None" = None
    positions_at: str = ""

    @property
    def exact(self) -> bool:
        """Do the values at the positions give the feature, as their mean or their maximum?"""
        return self.pooling in ("mean", "max")

    def read(self, output: Tensor) -> Tensor:
        """The module's output as a map of shape ``(N, K, *positions)``."""
        maps = self.layout.read(output)
        maps = maps.relu() if self.relu else maps
        return maps if self.norm is None else self.norm.maps(maps)


@dataclass(frozen=True)
class Normalised:
    """A normalisation of pooled features: of each sample or of each channel it is affine, so it can be applied to maps.

    The mean of the normalised map is then the normalised mean.
    """

    kind: str  # "layer", "rms", "l2", "batch"
    module: nn.Module | None

    def maps(self, maps: Tensor) -> Tensor:
        """``(N, K, *positions)``, normalised by what normalises their mean over positions."""
        pooled = maps.flatten(2).mean(2)
        shift, scale = self._statistics(pooled)
        shape = (1, -1) + (1,) * (maps.dim() - 2)
        weight, bias = self._weights()
        # what a LayerNorm takes off is the mean over channels, which at each position is another one
        maps = maps - (maps.mean(1, keepdim=True) if self.kind == "layer" else shift.view(shape))
        maps = maps * scale.view(*scale.shape, *[1] * (maps.dim() - 2))
        maps = maps if weight is None else maps * weight.view(shape)
        return maps if bias is None else maps + bias.view(shape)

    def _statistics(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """What is taken off each channel, ``(K,)``, and the factor, ``(N, 1)`` or ``(1, K)``."""
        eps = float(getattr(self.module, "eps", None) or 0)
        zero = pooled.new_zeros(pooled.shape[1])
        if self.kind == "batch":
            mean, variance = (getattr(self.module, name) for name in ("running_mean", "running_var"))
            return mean, (variance + eps).rsqrt()[None]
        if self.kind == "layer":
            return zero, (pooled.var(1, correction=0, keepdim=True) + eps).rsqrt()
        if self.kind == "rms":
            return zero, (pooled.square().mean(1, keepdim=True) + eps).rsqrt()
        return zero, 1 / pooled.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def _weights(self) -> tuple[Tensor | None, Tensor | None]:
        values = [getattr(self.module, name, None) for name in ("weight", "bias")]
        weight, bias = (value.detach() if isinstance(value, Tensor) else None for value in values)
        return weight, bias

    @classmethod
    def of(cls, module: nn.Module | None, pooled: Tensor, features: Tensor) -> "Normalised | None":
        """The normalisation that makes ``features`` of ``pooled``, both ``(N, K)``; None where it is none of these."""
        size = pooled.shape[1:]
        weights = cls("l2", module)._weights()
        if module is None:
            kinds: tuple[str, ...] = ("l2",)
        elif any(value is not None and value.shape != size for value in weights):
            return None
        else:
            kinds = ("batch",) if isinstance(getattr(module, "running_mean", None), Tensor) else ("layer", "rms", "l2")
        for kind in kinds:
            norm = cls(kind, module)
            if close(norm.maps(pooled[:, :, None]).squeeze(2), features):
                return norm
        return None


class Behind(NamedTuple):
    """What stands behind a head."""

    feature_map: FeatureMap | None
    # why there is no map
    reason: str


class _Kept(NamedTuple):
    module: nn.Module
    output: Tensor | None
    given: Tensor | None  # the input, where a module without weights gives one vector for each sample


class MapSearch:
    """What modules gave in one forward pass, of the first images, and the map behind a head among it."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._grids = Grids()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook behind each module."""
        self._grids.see(module, args, output)
        if not isinstance(output, Tensor):
            if has_matrix(module):
                self._kept.append(_Kept(module, None, None))
            return
        if output.dim() in (3, 4, 5) or (output.dim() == 2 and not has_matrix(module)):
            given = args[0] if args and isinstance(args[0], Tensor) and not _mixes(module) else None
            if given is not None and (given.dim() < 2 or given.numel() != output.numel() or not _is_vector(output)):
                given = None
            # copies: an in-place activation may follow
            copies = [None if value is None else value[:PROBE].detach().clone() for value in (output, given)]
            self._kept.append(_Kept(module, *copies))
        elif has_matrix(module):
            self._kept.append(_Kept(module, None, None))

    def found(
        self, features: Tensor, position: int, inside: Iterable[nn.Module], name: Callable[[nn.Module], str]
    ) -> Behind:
        """Walk back from the head to the nearest map; a convolution or a Linear is as far as it can be.

        Args:
            features: What the head reads, ``(N, K)``.
            position: How much had been kept when the head had run.
            inside: The head and its parts, which are no maps behind it.
            name: Gives a module's name.
        """
        kept = self._kept[:position]
        # what the head reads, and what it was made of by modules that mix no channels, each with that module
        wanted: list[tuple[Tensor, nn.Module | None]] = [(features[:PROBE], None)]
        small: FeatureMap | None = None
        inexact: FeatureMap | None = None
        reason = f"no layer before it gives {features.shape[1]} channels at several positions that pool to its input"
        passed = set(inside)
        for place in range(len(kept) - 1, -1, -1):
            module, output, given = kept[place]
            if module in passed:
                continue
            # of a module that ran before and again, only the last output can be read
            passed.add(module)
            if given is not None and output is not None:
                vector, source = output.flatten(1), given.flatten(1)
                if _same(vector, wanted[-1][0]) and not _same(source, vector):
                    wanted.append((source, module))
            if output is not None:
                for layout, maps in self._maps(output, features.shape[1]):
                    reading = _pooled_to(maps, output, layout, wanted)
                    if reading is None:
                        continue
                    candidate = FeatureMap(name(module), module, layout, *reading)
                    if maps[0, 0].numel() == 1:
                        small = small or candidate
                    elif candidate.exact:
                        return Behind(candidate, "")
                    else:
                        inexact = inexact or candidate
                if not reason.startswith("the tokens") and (
                    told := self._unread(output, features.shape[1], name(module))
                ):
                    reason = told
            if has_matrix(module):
                if (output is None or output.dim() < 3) and not reason.startswith("the tokens"):
                    reason = f"layer {name(module)} stands between the head and the last map, and mixes channels"
                break
        if inexact is not None:
            return Behind(inexact, "")
        if small is not None:
            return Behind(replace(small, positions_at=_last_with_positions(kept, name)), "")
        return Behind(None, reason)

    def _maps(self, output: Tensor, channels: int) -> Iterator[tuple[Layout, Tensor]]:
        """How an output can be read as a map of so many channels."""
        if output.dim() < 3:
            return
        # (N, K, L) is a signal; of images three axes are tokens
        flat = output.dim() == 3 and len(self._grids.image or ()) > 1
        layouts = [Layout()] if output.shape[1] == channels and not flat else []
        if output.shape[-1] == channels:
            if output.dim() > 3:
                layouts.append(Layout(last=True))
            elif output.shape[1] > 1 and (layout := self._tokens(output.shape[1])) is not None:
                layouts.append(layout)
        for layout in layouts:
            yield layout, layout.read(output)

    def _tokens(self, count: int) -> Layout | None:
        image = self._grids.image
        if image is not None and len(image) == 1:
            return Layout(last=True)
        return self._grids.of(count)

    def _unread(self, output: Tensor, channels: int, name: str) -> str:
        if output.dim() != 3 or output.shape[2] != channels or output.shape[1] < 2 or self._tokens(output.shape[1]):
            return ""
        return f"the tokens of {name}, {tuple(output.shape[1:])}, lie in no grid that is known"


def shows_features(output: Any, features: Tensor) -> bool:
    """Do the channels of a layer's output, averaged (or maximised) over positions, give the head's input ``(N, K)``?"""
    if not isinstance(output, Tensor) or len(output) != len(features):
        return False
    if output.shape == features.shape:
        return close(output, features)
    axes = [axis for axis in (1, -1) if 2 < output.dim() < 6 and output.shape[axis] == features.shape[1]]
    return any(_pools_to(output.movedim(axis, 1).flatten(2), features) is not None for axis in axes)


def has_matrix(module: nn.Module) -> bool:
    """Does the module have a matrix of weights, as a convolution or a Linear?"""
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def close(a: Tensor, b: Tensor) -> bool:
    """Are the numbers equal, but for the rounding of their type?"""
    half = min(torch.finfo(a.dtype).bits, torch.finfo(b.dtype).bits) < 32
    # what is not finite is no reason to look elsewhere: `head_pass.py` refuses it and names the batch
    a, b = (wide(tensor).nan_to_num(0.0, 0.0, 0.0) for tensor in (a, b))
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-30)
    # 1e-3: a GPU's convolutions round float32 to TF32 unless told otherwise, its matrix products do not
    return bool(((a - b).abs().max() <= (3e-2 if half else 1e-3) * scale).item())


def _mixes(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _is_vector(output: Tensor) -> bool:
    return output.dim() == 2 or max(output.shape[2:]) == 1 or max(output.shape[1:-1]) == 1


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and close(a, b)


def _pooled_to(
    maps: Tensor, output: Tensor, layout: Layout, wanted: list[tuple[Tensor, nn.Module | None]]
) -> tuple[bool, str, Normalised | None] | None:
    """How a map becomes the head's input: ``(relu, pooling, norm)`` of `FeatureMap`; None: it does not."""
    flat, features = maps.flatten(2), wanted[0][0]
    for target, _ in wanted[:1]:
        if (reading := _pools_to(flat, target)) is not None:
            return *reading, None
    if layout.grid:
        beside = layout.beside()
        apart = wide(output) - wide(features)[:, None]
        nearest = int(apart.abs().amax((0, 2)).argmin())
        if close(output[:, nearest], features):
            # the head reads one token: beside the image's, or the image's order is not the one that was thought
            return (False, "token", None) if nearest in beside else None
    for target, module in wanted[1:]:
        if (reading := _pools_to(flat, target)) is not None:
            relu, pooling = reading
            # one normalisation alone: of what was normalised twice the map has the right channels, not the values
            norm = Normalised.of(module, target, features) if pooling == "mean" and len(wanted) == 2 else None
            return relu, pooling if norm is not None else "other", norm
    mean = flat.to(torch.promote_types(flat.dtype, torch.float32)).mean(2)
    if (norm := Normalised.of(None, mean, features)) is not None:
        return False, "mean", norm
    if flat.shape[2] > 1 and any(_between(flat, target) for target, _ in wanted):
        return False, "other", None
    return None


def _pools_to(flat: Tensor, features: Tensor) -> tuple[bool, str] | None:
    """Does the average (or maximum) over the positions of ``(N, K, P)`` give the features, as it is or after a ReLU?"""
    for relu in (False, True):
        values = flat.relu() if relu else flat
        for pooling, pooled in (("mean", wide(values).mean(2)), ("max", values.amax(2))):
            if pooled.shape == features.shape and close(pooled, features):
                return relu, pooling
    return None


def _between(flat: Tensor, features: Tensor) -> bool:
    """Does each feature lie between the smallest and the largest value of its channel, as of any mean?"""
    low, high = (wide(bound) for bound in flat.aminmax(dim=2))
    room = 1e-3 * float(flat.abs().max())
    features = wide(features)
    return bool(((features >= low - room) & (features <= high + room)).all()) and bool((high > low).any())


def _last_with_positions(kept: list[_Kept], name: Callable[[nn.Module], str]) -> str:
    for module, output, _ in reversed(kept):
        if output is not None and output.dim() > 3 and math.prod(output.shape[2:]) > 1:
            return f"{name(module)} ({' x '.join(map(str, output.shape[2:]))})"
    return ""
