"""Which axis of a layer's tensor holds the channels, which the positions, and how positions lie in the image.

A layer's tensor says nothing of this itself: (N, 7, 7, 768) of a Swin transformer looks like 7 channels of 7 x 768
positions. `LayoutWatch` looks at what gives and takes the tensor in a forward pass: a convolution reads its channels
from the second axis, a Linear and a LayerNorm from the last one. `Grids` says how tokens lie in the image.
N samples, K channels, h x w positions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.core.borrow import Borrowed
from captum_classfilters.core.calls import CONVS
from captum_classfilters.core.errors import LayerError, ShapeError

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What has its channels second by definition, and how many axes its input then has
_POOLING: dict[type, int] = {
    kind: axes
    for axes in (3, 4, 5)
    for name in ("AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "MaxPool")
    if (kind := getattr(nn, f"{name}{axes - 2}d"))
}
# Class, distillation and register tokens before those of the image
_MOST_OTHER_TOKENS = 16


@dataclass(frozen=True)
class Layout:
    """Where a tensor has its channels and its positions.

    Attributes:
        last: Channels are the last axis, not the second.
        others: So many tokens before the positions belong to no position: class, distillation, register tokens.
        grid: How the tokens lie in the image; empty: the positions are axes of their own.
        total: How many tokens there are; what stands behind the grid belongs to no position either.
    """

    last: bool = False
    others: int = 0
    grid: tuple[int, ...] = ()
    total: int = 0

    @property
    def name(self) -> str:
        """In letters: ``"NCHW"``, ``"NHWC"``, ``"NLC"`` for tokens in a grid."""
        return "NLC" if self.grid else "NHWC" if self.last else "NCHW"

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(N, K, *positions)``.

        Raises:
            ShapeError: There is another number of tokens than the grid has.
        """
        if self.last:
            tensor = tensor.movedim(-1, 1)
        if not self.grid:
            return tensor
        tokens = tensor[:, :, self.others : self.others + math.prod(self.grid)]
        if tensor.shape[2] != self.total:
            raise ShapeError(
                f"expected {' x '.join(map(str, self.grid))} tokens, as in the first batch, got {tokens.shape[2]}; "
                "pass images of one size"
            )
        return tokens.reshape(*tokens.shape[:2], *self.grid)

    def beside(self) -> list[int]:
        """The tokens that belong to no position."""
        return [*range(self.others), *range(self.others + math.prod(self.grid), self.total)] if self.grid else []


class Grids:
    """How tokens lie in the image, from what a forward pass shows: the image's size, and maps of convolutions."""

    def __init__(self) -> None:
        self.image: tuple[int, ...] | None = None
        self._maps: list[tuple[int, ...]] = []
        # of the last convolution's map the difference of two images, (h w, C): positions added to it cancel out
        self._difference: tuple[tuple[int, ...], Tensor] | None = None
        # by number of tokens: where those of the map begin, as their values say; None: they lie in another order
        self._proved: dict[int, tuple[int, tuple[int, ...]] | None] = {}

    def see(self, module: nn.Module, args: Any, output: Any) -> None:
        """A hook behind each module."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if self.image is None and first is not None:
            # the first module to be through was given the images, or what was made of them
            self.image = tuple(first.shape[2:]) if first.dim() > 2 and first.is_floating_point() else ()
        if isinstance(module, CONVS) and isinstance(output, Tensor) and output.dim() > 3:
            size = tuple(output.shape[2:])
            if size not in self._maps[-1:]:
                self._maps.append(size)
            if len(output) > 1:
                self._difference = size, (output[0] - output[1]).detach().flatten(1).T
        if first is not None and first.dim() == 3 and len(first) > 1 and first.is_floating_point():
            self._prove(first[0].detach() - first[1].detach())

    def _prove(self, tokens: Tensor) -> None:
        """Look for the last convolution's map among tokens, ``(L, C)``, both as differences of two images."""
        if self._difference is None or len(tokens) in self._proved:
            return
        size, rows = self._difference
        if tokens.shape[1] != rows.shape[1] or len(tokens) < len(rows) or tokens.dtype != rows.dtype:
            return
        # what is counted row by row, and column by column
        turned = rows.T.reshape(-1, *size).transpose(1, -1).flatten(1).T
        for start in range(min(len(tokens) - len(rows), _MOST_OTHER_TOKENS) + 1):
            part = tokens[start : start + len(rows)]
            if torch.allclose(part, rows, rtol=1e-3, atol=1e-5):
                self._proved[len(tokens)] = start, size
                return
            if torch.allclose(part, turned, rtol=1e-3, atol=1e-5):
                self._proved[len(tokens)] = None
                return

    def of(self, count: int) -> Layout | None:
        """The layout of ``count`` tokens, channels last; None where it is not known."""
        if count in self._proved:
            proof = self._proved[count]
            return None if proof is None else Layout(True, *proof, count)
        # more than half of the tokens are positions, and not a single one
        most = min(_MOST_OTHER_TOKENS, (count - 1) // 2, count - 2)
        for others in range(most + 1):
            for size in reversed(self._maps):
                # a transformer may merge tokens of 2 x 2 places to one
                if (factor := _shrunk(size, count - others)) and (not others or factor == 1):
                    return Layout(True, others, tuple(side // factor for side in size), count)
        if self._maps or self.image is None or len(self.image) < 2:
            return None
        for others in range(most + 1):
            if factor := _shrunk(self.image, count - others):
                return Layout(True, others, tuple(side // factor for side in self.image), count)
        return None


def _shrunk(size: Sequence[int], count: int) -> int:
    """By which whole number each side is to be divided so that ``count`` places are left; 0: by none."""
    factor = round((math.prod(size) / count) ** (1 / len(size)))
    fits = factor > 0 and all(side % factor == 0 for side in size) and math.prod(size) == count * factor ** len(size)
    return factor if fits else 0


class LayoutWatch:
    """Hooks for one forward pass that learn how the tensor of one layer is laid out.

    Args:
        model: What runs; None: only the layer is known.
        layer: The layer.
        borrow: Takes the hooks.
        of_input: The layer's input, not its output.
    """

    def __init__(self, model: nn.Module | None, layer: nn.Module, borrow: Borrowed, of_input: bool = False) -> None:
        self._layer, self._of_input = layer, of_input
        self.ran = False
        self._removers: list[Callable[[], None]] = []
        self._inside = set(layer.modules())
        self._tensor: Tensor | None = None
        # axis of the channels, by shape, of what runs inside of the layer
        self._shapes: list[tuple[tuple[int, ...], bool]] = []
        self._certain: list[bool] = []
        self._any_last: set[int] = set()  # axes of tensors with channels last anywhere in the model
        self._any_second: set[int] = set()
        self.grids = Grids()
        self.positions_at: tuple[str, tuple[int, ...]] | None = None
        modules = dict(model.named_modules()) if model is not None else {}
        names = {module: name for name, module in modules.items()} or dict.fromkeys(layer.modules(), "")
        if of_input:
            self._removers.append(borrow.before(layer, self._keep))
        for module in dict.fromkeys([*names, *layer.modules()]):
            if module is not model:
                self._removers.append(borrow.after(module, self._hook(names.get(module, ""))))
        if not of_input:
            # after the hook above, so that the layer's own parts are not taken for what reads its output
            self._removers.append(borrow.after(layer, self._keep))

    def _keep(self, module: nn.Module, args: Any, output: Any = None) -> None:
        self.ran = True
        value = args if self._of_input else output
        values = value if isinstance(value, tuple | list) else (value,)
        if not values or not all(isinstance(value, Tensor) for value in values):
            kinds = [type(value).__name__ for value in values]
            raise LayerError(
                f"the layer must {'take' if self._of_input else 'give'} tensors, got {', '.join(kinds[:3]) or 'none'}; "
                "choose one of the layers inside of it"
            )
        self._tensor = values[0]

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            self.grids.see(module, args, output)
            given = args[0] if args and isinstance(args[0], Tensor) else None
            if isinstance(output, Tensor):
                self._see_positions(name, output)
            for tensor, out in ((given, False), (output if isinstance(output, Tensor) else None, True)):
                last = None if tensor is None else channels_last(module, tensor, out)
                if tensor is None or last is None:
                    continue
                (self._any_last if last else self._any_second).add(tensor.dim())
                if (module is self._layer and out is not self._of_input) or (not out and self._is_it(tensor)):
                    self._certain.append(last)
                elif module in self._inside:
                    self._shapes.append((tuple(tensor.shape[1:]), last))

        return see

    def _see_positions(self, name: str, output: Tensor) -> None:
        if self._tensor is None and output.dim() > 3 and math.prod(output.shape[2:]) > 1:
            self.positions_at = name, tuple(output.shape[2:])

    def _is_it(self, tensor: Tensor) -> bool:
        """Is this the layer's tensor, or the copy of it that Captum passes on?"""
        known = self._tensor
        if known is None or tensor is known or self._certain:
            return tensor is known
        alike = (tensor.shape, tensor.dtype, tensor.device) == (known.shape, known.dtype, known.device)
        return alike and bool(torch.equal(tensor, known))

    def close(self) -> None:
        """Take the hooks off: enough is known."""
        for remove in self._removers:
            remove()

    def has_channels_last(self, tensor: Tensor) -> bool | None:
        """Are the channels of the layer's tensor on its last axis, or on the second? None where it is not known."""
        self._tensor = None
        evidence = self._certain or [last for shape, last in self._shapes if shape == tuple(tensor.shape[1:])]
        if evidence:
            return evidence[0] if len(set(evidence)) == 1 else None
        axes = tensor.dim()
        # where any part of the model has channels last, nothing is known of a tensor that nothing reads
        unknown = bool(self._any_last) or (axes == 3 and axes not in self._any_second)
        return None if unknown else False

    def layout(self, tensor: Tensor) -> Layout | None:
        """The layout of the layer's tensor; None where it is not known."""
        last = self.has_channels_last(tensor)
        if last is None:
            return None
        if last and tensor.dim() == 3:
            image = self.grids.image
            if image is not None and len(image) == 1:
                return Layout(True)  # a signal: tokens are its positions
            return self.grids.of(tensor.shape[1])
        return Layout(last)


def channels_last(module: nn.Module, tensor: Tensor, is_output: bool) -> bool | None:
    """Does a module with weights have the channels of its input (or output) on the last axis? None: it does not say."""
    axes = tensor.dim()
    if axes < 3:
        return None
    if type(module) in _POOLING:
        return False if axes == _POOLING[type(module)] else None
    if isinstance(module, CONVS + _TRANSPOSED):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        size = module.out_features if is_output else module.in_features
    elif isinstance(weight, Tensor) and weight.dim() == 1:
        size = len(weight)
    else:
        return None
    second, last = tensor.shape[1] == size, tensor.shape[-1] == size
    if second and last:
        # both axes have the size of the weights: what the module is by its name
        if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm:
            return True
        return False if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm) else None
    return last if second or last else None
