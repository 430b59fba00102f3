"""What both maps share: read the layer through Captum, weigh and sum chosen channels, refuse bad input.

`grad_cam_plus_plus.py` computes the weights. N samples, K channels.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from captum.attr import GradientAttribution, LayerAttribution
from torch import Tensor, nn

from captum_classfilters.core.batches import image_errors
from captum_classfilters.core.borrow import borrowed, outermost, unwrap
from captum_classfilters.core.errors import (
    LayerError,
    NonFiniteError,
    NoPositionsWarning,
    OptionError,
    ShapeError,
    ZeroMapWarning,
)
from captum_classfilters.core.feature_map import shows_features
from captum_classfilters.core.head_pass import single_batch
from captum_classfilters.core.layers import find_module
from captum_classfilters.core.layout import Layout, LayoutWatch
from captum_classfilters.core.outputs import LogitReader, logits_of, two_logits
from captum_classfilters.core.stream import Placement
from captum_classfilters.core.targets import classes_of
from captum_classfilters.core.wide import wide

Channels = Any  # indices or a mask, for all samples or for each


class LayerCam(GradientAttribution, LayerAttribution):
    """A class activation map: a layer's channels, weighed and summed. Its subclasses find the weights.

    Args:
        forward_func: The model, or a function.
        layer: A module of it, or its dotted name.
        device_ids: As for Captum's ``LayerGradCam``.
        reshape: Makes ``(N, K, h, w)`` of the layer's output, for tokens or channels last. It may only move numbers,
            because gradients are moved the same way.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str,
        device_ids: list[int] | None = None,
        *,
        reshape: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        inner = unwrap(forward_func)
        model = inner if isinstance(inner, nn.Module) else None
        LayerAttribution.__init__(self, forward_func, find_module(model, layer), device_ids)
        GradientAttribution.__init__(self, forward_func)
        if reshape is not None and not callable(reshape):
            raise OptionError(f"reshape must be a function of the layer's output, got {type(reshape).__name__}")
        self.reshape = reshape

    @property
    def multiplies_by_inputs(self) -> bool:
        """The map is of activations, not of inputs."""
        return False

    # -- the model -------------------------------------------------------------------------------------------------

    @contextmanager
    def _running(self, of_input: bool) -> Iterator[LayoutWatch]:
        """The model borrowed, and what a forward pass tells of the layer's layout."""
        if torch.is_inference_mode_enabled():
            raise OptionError("gradients are needed, which torch.inference_mode() forbids; call it outside, or no_grad")
        model = outermost(self.forward_func)
        with borrowed(model, grad=True) as borrow:
            watch = LayoutWatch(model, self.layer, borrow, of_input)
            try:
                yield watch
            except RuntimeError as error:
                if _no_path(error):
                    raise self._no_gradient() from error
                raise

    def _moved(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs where the model is, floating ones in its dtype."""
        model = outermost(self.forward_func)
        owner = self.layer if model is None else model
        if not any(parameter.is_floating_point() for parameter in owner.parameters()):
            return inputs
        placement = Placement.of(owner)
        return tuple(placement.move(value) for value in inputs)

    def _name(self) -> str:
        model = outermost(self.forward_func)
        names = {module: name for name, module in model.named_modules()} if model is not None else {}
        return f"layer {names[self.layer]}" if names.get(self.layer) else f"the {type(self.layer).__name__} layer"

    def _no_gradient(self) -> LayerError:
        return LayerError(
            f"the model's output has no gradient with respect to {self._name()}: the layer is not used for it, or the "
            "forward pass runs under torch.no_grad() or detaches. Choose another layer, take no_grad out of the "
            'model\'s forward, or pass channel_weights="ones" or "head", which need no gradients'
        )

    def _devices(self) -> list[int] | None:
        # the devices of DataParallel, which `_forward` hides from Captum
        return self.device_ids or getattr(self.forward_func, "device_ids", None)

    def _forward(self, target: Any, watch: LayoutWatch) -> Callable[..., Any]:
        """The forward function; it checks layer and target before Captum picks them."""

        def forward(*args: Any) -> Any:
            with image_errors(args, unwrap(self.forward_func)), LogitReader() as reader:
                logits = logits_of(result := self.forward_func(*args))
                # of many classes the user's own softmax stays what is explained
                logits = reader.logits(result) if logits.dim() == 2 and logits.shape[1] == 1 else logits
                output = _two_axes(logits, target)
            if not watch.ran:
                raise LayerError(f"{self._name()} did not run in this forward pass; choose one that does")
            if output.dim() == 2:
                check_target(target, output)
            if torch.is_grad_enabled() and not output.requires_grad:
                raise self._no_gradient()
            return output

        return forward

    def _reading(
        self, tensors: tuple[Tensor, ...], watch: LayoutWatch, samples: int
    ) -> Callable[[tuple[Tensor, ...]], Tensor]:
        """What makes ``(N, K, *positions)`` of the layer's activation or gradient, from the activation."""
        if len(tensors) != 1:
            raise LayerError(f"the layer's activation must be one tensor, got {len(tensors)}; choose another layer")
        tensor, reshape = tensors[0], self.reshape
        if reshape is None and len(tensor) != samples:
            raise LayerError(
                f"{self._name()} gives {len(tensor)} rows for {samples} samples, as layers do that run on windows or "
                "parts of an image; choose the layer around it, or pass reshape= that puts the parts together"
            )
        if reshape is None:
            how = "pass the layer of a convolution, or reshape= for tokens"
            layout = watch.layout(tensor) if tensor.dim() > 2 else Layout()
            if layout is None and watch.has_channels_last(tensor):
                raise ShapeError(
                    f"{self._name()} gives {tuple(tensor.shape)}, tokens that lie in no grid that is known; pass "
                    "reshape=, a function that makes (N, K, h, w) of it (for h x w tokens, row by row: "
                    "lambda t: t.transpose(1, 2).unflatten(2, (h, w)))"
                )
            if layout is None:
                raise ShapeError(
                    f"{self._name()} gives {tuple(tensor.shape)}, of which nothing in the forward pass says which "
                    "axes are channels and which positions; pass reshape=, a function that makes (N, K, h, w) of it "
                    "(for channels last: lambda t: t.movedim(-1, 1); for what is (N, K, *) already: lambda t: t)"
                )
            reshape = layout.read
        else:
            how = "it is what reshape= gave"
        maps = reshape(tensor)
        if not isinstance(maps, Tensor) or maps.dim() < 3:
            got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ShapeError(f"the layer's activation must have positions, (N, K, h, w), got {got}; {how}")
        if len(maps) != samples:
            raise ShapeError(f"reshape must keep the {samples} samples, it gave {len(maps)}")
        watch.close()
        if maps[0, 0].numel() == 1:
            where = watch.positions_at
            last = f"the last one with positions is {where[0]} ({' x '.join(map(str, where[1]))}); " if where else ""
            warnings.warn(
                f"no position is left at this layer: {self._name()} gives {tuple(tensor.shape)}; {last}choose an "
                "earlier layer, or pass larger inputs",
                NoPositionsWarning,
                stacklevel=4,
            )
        return lambda values: reshape(values[0])

    # -- the map ---------------------------------------------------------------------------------------------------

    def _map(
        self,
        activations: Tensor,
        weigh: Callable[[], Tensor],
        channels: Channels,
        replacement: Any,
        relu: bool,
        summed: bool,
    ) -> Tensor:
        """The weighed map; ``weigh`` gives Grad-CAM++'s weights ``(N, K)``, unless there is a ``replacement``."""
        samples, size = activations.shape[:2]
        # channels first, so that a wrong one is refused before anything is computed
        mask = None if channels is None else channel_mask(channels, samples, size, activations.device)
        weights = weigh() if replacement is None else replacing_weights(replacement, samples, size)
        if mask is not None:
            weights = weights * mask.to(weights.device)
            if replacement is None and not bool((weights != 0).any(1).all()):
                _warn_zero(int((weights == 0).all(1).sum()), samples)
        weights = weights.expand(samples, -1).view(samples, size, *[1] * (activations.dim() - 2))
        # its dtype first: the device may have no float64
        result = weights.to(_at_least_float(activations.dtype)).to(activations.device) * activations
        result = result.sum(1, keepdim=True) if summed else result
        result = result.relu() if relu else result
        if not bool(torch.isfinite(result).all()):
            raise NonFiniteError(
                "expected finite activations and gradients, got NaN or infinity in the map; look at the inputs, and at "
                "the model's weights"
            )
        return result.to(activations.dtype).detach()

    def _head_weights(self, inputs: Any, target: Any, forward_args: Any, maps: Tensor) -> Tensor:
        """The head's weights for the target, ``(N, K)``; the head is found with the first sample."""
        first = tuple(value[:1] for value in inputs)
        args = tuple(rows_of(value, slice(0, 1), len(inputs[0])) for value in forward_args)
        batch = single_batch(self.forward_func, first, additional_forward_args=args)
        head, behind = batch.head, batch.head.feature_map
        is_behind = behind is not None and behind.module is self.layer
        if not is_behind and not shows_features(maps[:1], batch.features):
            raise ShapeError(
                f'channel_weights="head" are of the {head.num_features} features that the head reads, which are not '
                f"the average of this layer's {maps.shape[1]} channels; pass the layer behind the head"
                + (f", {behind.name!r}" if behind is not None else "")
            )
        return wide(head.weight[classes_of(target, len(maps), head.num_classes, head.weight.device)])


def check_target(target: Any, output: Tensor) -> None:
    """Refuse a target that is missing or out of range."""
    classes = output.shape[1]
    if target is None and classes > 1:
        raise OptionError(f"the model gives {classes} outputs: pass target=, the class, or one for each sample")
    if target is not None and not _picks_by_tuple(target):
        classes_of(target, len(output), classes, output.device)


def check_against(against: bool, channel_weights: Any) -> None:
    """Refuse ``against`` together with weights of the caller, which have no gradient to negate."""
    if against and channel_weights is not None:
        raise OptionError(
            "against= changes the sign of Grad-CAM++'s gradients, and channel_weights= takes their place; pass only one"
        )


def as_target(target: Any) -> Any:
    """The target as Captum takes it: without numpy numbers, and without a list of one class for several samples."""
    if isinstance(target, Tensor) and not target.is_floating_point():
        return target.long()  # until torch 2.5, gather takes no other integers
    if not isinstance(target, np.generic | np.ndarray | list) or _picks_by_tuple(target):
        return target
    try:
        numbers = torch.as_tensor(target).tolist()
    except (TypeError, ValueError, RuntimeError):
        return target  # `check_target` refuses it later, when the outputs are known
    return numbers[0] if isinstance(numbers, list) and len(numbers) == 1 else numbers


def _picks_by_tuple(target: Any) -> bool:
    # a tuple picks from outputs of more axes, which Captum checks
    return isinstance(target, tuple) or (isinstance(target, list) and any(isinstance(t, tuple) for t in target))


def rows_of(value: Any, rows: Any, samples: int) -> Any:
    """The samples ``rows`` of an argument with one entry for each sample; any other argument is unchanged."""
    return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == samples else value


def as_tuple(value: Any) -> tuple[Any, ...]:
    """The value as a tuple; None is empty."""
    return () if value is None else value if isinstance(value, tuple) else (value,)


def as_inputs(value: Any) -> tuple[Tensor, ...]:
    """The inputs as a tuple of tensors of at least one sample."""
    inputs = as_tuple(value)
    wrong = next((value for value in inputs if not isinstance(value, Tensor)), None)
    if wrong is not None or not inputs:
        raise ShapeError(f"inputs must be a tensor (N, ...) or a tuple of them, got {type(wrong).__name__}")
    if not inputs[0].dim() or not len(inputs[0]):
        raise ShapeError(f"inputs must hold at least one sample, (N, ...), got shape {tuple(inputs[0].shape)}")
    return inputs


def _two_axes(output: Tensor, target: Any) -> Tensor:
    """The output as ``(N, C)``, unless the target picks by a tuple; without a target one logit stays as it is."""
    if target is None and (output.dim() < 3 or output[0].numel() == 1):
        return output.flatten(1) if output.dim() > 2 else output
    if output.dim() < 3 or _picks_by_tuple(target):
        return two_logits(output)
    if output[0, 0].numel() != 1:
        raise ShapeError(
            f"the model must give one score for each class, (N, C), got {tuple(output.shape)}; pass target=(class, "
            "row, column), which picks one of them, or a function that averages over the positions"
        )
    return two_logits(output.flatten(1))


def _no_path(error: RuntimeError) -> bool:
    text = str(error)
    return "not have been used in the graph" in text or "does not require grad" in text


def _at_least_float(dtype: torch.dtype) -> torch.dtype:
    return dtype if torch.finfo(dtype).bits >= 32 else torch.float32


def warn_flat(gradient: Tensor) -> None:
    """Say so where the target depends on no position of the layer."""
    if not bool((gradient != 0).any()):
        warnings.warn(
            "the target does not depend on any position of this layer, so the maps are zero. Where the head reads a "
            "class token alone, choose a layer before the last attention, such as the last block's first norm, or pass "
            'channel_weights="head" for what the head would read at each position',
            ZeroMapWarning,
            stacklevel=5,
        )


def _warn_zero(zero: int, samples: int) -> None:
    warnings.warn(
        f"Grad-CAM++ counts positive gradients, and the chosen channels have none in {zero} of {samples} samples: the "
        "maps of these are zero. Pass against=True for what speaks against the target, or "
        'channel_weights="ones" for where the channels are active',
        ZeroMapWarning,
        stacklevel=5,
    )


# -- channels and their weights ----------------------------------------------------------------------------------------


def channel_mask(channels: Channels, samples: int, size: int, device: torch.device) -> Tensor:
    """The chosen channels as a mask, ``(N, K)`` bool.

    Args:
        channels: For all samples, 1-D indices or a mask ``(K,)``; for each sample, a mask ``(N, K)``, indices
            ``(N, k)`` (-1 fills up rows), or a list of N index tensors.
        samples: N.
        size: K.
        device: Device of the mask.

    Raises:
        OptionError: No channel is chosen, or one is out of range.
        ShapeError: The channels are not for N samples, or a mask is not of K channels.
    """
    if isinstance(channels, list | tuple) and channels and _is_row(channels[0]):
        rows = [_one(row, size) for row in channels]
        mask = torch.stack(rows)
    else:
        values = _tensor(channels)
        if values.dim() == 2 and values.dtype != torch.bool:
            mask = torch.stack([_one(row[row != -1], size) for row in values])
        elif values.dim() == 2:
            mask = torch.stack([_one(row, size) for row in values]) if len(values) else values
        else:
            mask = _one(values, size).expand(samples, -1)
    if len(mask) != samples:
        raise ShapeError(
            f"channels for each sample must be {samples} rows, one for each; got {len(mask)}. For the same channels in "
            "all samples pass a 1-D tensor"
        )
    return mask.to(device)


def replacing_weights(replacement: Any, samples: int, size: int) -> Tensor:
    """Weights that replace those of Grad-CAM++, ``(N, K)`` or ``(1, K)`` float64: ones, or the caller's tensor."""
    if isinstance(replacement, str) and replacement == "ones":
        return torch.ones(1, size, dtype=torch.float64)
    if not isinstance(replacement, Tensor) or not replacement.is_floating_point():
        raise OptionError(
            f'channel_weights must be None (Grad-CAM++), "ones", "head", or a floating tensor (K,) or (N, K); got '
            f"{replacement.dtype if isinstance(replacement, Tensor) else repr(replacement)}"
        )
    weights = wide(replacement.detach())
    weights = weights[None] if weights.dim() == 1 else weights
    if weights.dim() != 2 or weights.shape[1] != size or len(weights) not in (1, samples):
        raise ShapeError(
            f"channel_weights must have shape ({size},) or ({samples}, {size}), got {tuple(replacement.shape)}: the "
            f"layer has {size} channels"
        )
    if not bool(torch.isfinite(weights).all()):
        raise NonFiniteError("channel_weights must be finite, got NaN or infinity; look at where they come from")
    return weights


def _one(channels: Any, size: int) -> Tensor:
    """One set of channels as a mask, ``(K,)``."""
    values = _tensor(channels)
    if values.dtype == torch.bool:
        if values.shape != (size,):
            raise ShapeError(f"a mask of channels must have {size} entries, one for each channel; got {len(values)}")
        mask = values
    else:
        if values.dim() != 1:
            raise ShapeError(f"channels of one sample must be 1-D, got shape {tuple(values.shape)}")
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < size:
            wrong = int(values.min()) if int(values.min()) < 0 else int(values.max())
            raise OptionError(f"channels must lie in [0, {size}), the channels of the layer; got {wrong}")
        mask = torch.zeros(size, dtype=torch.bool, device=values.device)
        mask[values] = True
    if not bool(mask.any()):
        raise OptionError("channels are empty: there is nothing to show; choose at least one, or None for all")
    return mask


def _tensor(channels: Any) -> Tensor:
    try:
        values = torch.as_tensor(channels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"channels must be indices or a mask, got {type(channels).__name__} ({error})") from error
    if not values.numel():
        return values if values.dtype == torch.bool else values.long()
    if values.is_floating_point() or values.is_complex() or values.dim() == 0:
        raise OptionError(
            f"channels must be a sequence of indices, or a mask; got {values.dtype} of shape {tuple(values.shape)}"
        )
    return values if values.dtype == torch.bool else values.long()


def _is_row(value: Any) -> bool:
    """Is this one sample's channels, rather than a channel?"""
    return isinstance(value, list | tuple | range) or getattr(value, "ndim", 0) > 0
