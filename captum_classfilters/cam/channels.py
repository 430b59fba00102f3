"""Which channels a map is of, and with what weights: reads the arguments ``channels`` and ``channel_weights``."""

from typing import Any

import torch
from torch import Tensor

from captum_classfilters.core.errors import NonFiniteError, OptionError, ShapeError

Channels = Any  # indices or a mask, for all samples or for each


def channel_mask(channels: Channels, samples: int, size: int, device: torch.device) -> Tensor:
    """The chosen channels as a mask, ``(N, K)`` bool.

    Args:
        channels: Indices, 1-D, or a mask ``(K,)``, for all samples; a mask ``(N, K)``, indices ``(N, k)`` (-1 fills up
            rows), or a list of N index tensors, for each.
        samples: N.
        size: K.
        device: Where the mask is wanted.

    Raises:
        OptionError: None chosen, out of range, or no channels at all.
        ShapeError: Not for N samples, or a mask not of K channels.
    """
    if isinstance(channels, list | tuple) and channels and _is_row(channels[0]):
        rows = [_one(row, size) for row in channels]
        mask = torch.stack(rows)
    else:
        given = _tensor(channels)
        if given.dim() == 2 and given.dtype != torch.bool:
            mask = torch.stack([_one(row[row != -1], size) for row in given])
        elif given.dim() == 2:
            mask = torch.stack([_one(row, size) for row in given]) if len(given) else given
        else:
            mask = _one(given, size).expand(samples, -1)
    if len(mask) != samples:
        raise ShapeError(
            f"channels for each sample must be {samples} rows, one for each; got {len(mask)}. For the same channels in "
            "all samples pass a 1-D tensor"
        )
    return mask.to(device)


def own_weights(given: Any, samples: int, size: int, device: torch.device) -> Tensor:
    """Weights that take the place of Grad-CAM++'s, ``(N, K)`` or ``(1, K)`` float64: ones, or the caller's tensor."""
    if isinstance(given, str) and given == "ones":
        return torch.ones(1, size, dtype=torch.float64, device=device)
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise OptionError(
            f'channel_weights must be None (Grad-CAM++), "ones", "head", or a floating tensor (K,) or (N, K); got '
            f"{given.dtype if isinstance(given, Tensor) else repr(given)}"
        )
    weights = given.detach().to(device, torch.float64)
    weights = weights[None] if weights.dim() == 1 else weights
    if weights.dim() != 2 or weights.shape[1] != size or len(weights) not in (1, samples):
        raise ShapeError(
            f"channel_weights must have shape ({size},) or ({samples}, {size}), got {tuple(given.shape)}: the layer "
            f"has {size} channels"
        )
    if not bool(torch.isfinite(weights).all()):
        raise NonFiniteError("channel_weights must be finite, got NaN or infinity; look at where they come from")
    return weights


def _one(channels: Any, size: int) -> Tensor:
    """One set of channels as a mask, ``(K,)``."""
    given = _tensor(channels)
    if given.dtype == torch.bool:
        if given.shape != (size,):
            raise ShapeError(f"a mask of channels must have {size} entries, one for each channel; got {len(given)}")
        mask = given
    else:
        if given.dim() != 1:
            raise ShapeError(f"channels of one sample must be 1-D, got shape {tuple(given.shape)}")
        if len(given) and not 0 <= int(given.min()) <= int(given.max()) < size:
            wrong = int(given.min()) if int(given.min()) < 0 else int(given.max())
            raise OptionError(f"channels must lie in [0, {size}), the channels of the layer; got {wrong}")
        mask = torch.zeros(size, dtype=torch.bool, device=given.device)
        mask[given] = True
    if not bool(mask.any()):
        raise OptionError("channels are empty: there is nothing to show; choose at least one, or None for all")
    return mask


def _tensor(channels: Any) -> Tensor:
    try:
        given = torch.as_tensor(channels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"channels must be indices or a mask, got {type(channels).__name__} ({error})") from error
    if not given.numel():
        return given if given.dtype == torch.bool else given.long()
    if given.is_floating_point() or given.is_complex() or given.dim() == 0:
        raise OptionError(
            f"channels must be a sequence of indices, or a mask; got {given.dtype} of shape {tuple(given.shape)}"
        )
    return given if given.dtype == torch.bool else given.long()


def _is_row(value: Any) -> bool:
    """Is this one sample's channels, rather than a channel?"""
    return isinstance(value, list | tuple | range) or getattr(value, "ndim", 0) > 0
