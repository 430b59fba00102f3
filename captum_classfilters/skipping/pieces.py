"""A batch of maps of which only the open channels are kept: what flows between skipping convolutions.

Images with the same path stay together in one piece. N images, K channels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Some images of a batch, and their open channels."""

    rows: tuple[int, ...] | None  # which images; None: all
    values: Tensor  # (n, k, ...)
    open: Tensor | None  # (k,) int64: which channels; None: all
    channels: int  # K
    key: bytes = b""  # tells open sets apart; empty: all


Pieces: TypeAlias = list[Piece]


def factors(gates: Tensor, maps: Tensor) -> Tensor:
    """Gates ``(N, K)`` in the dtype of maps ``(N, K, ...)``, with as many dimensions."""
    return gates.to(maps.dtype).view(*gates.shape, *(1,) * (maps.dim() - 2))


def images_in(value: Tensor | Pieces) -> int:
    """N."""
    if isinstance(value, Tensor):
        return len(value)
    return sum(len(piece.values) for piece in value)


def full(value: Tensor | Pieces) -> Tensor:
    """All channels of all images; closed ones are zero."""
    if isinstance(value, Tensor):
        return value
    if len(value) == 1 and value[0].rows is None and value[0].open is None:
        return value[0].values
    first = value[0]
    out = first.values.new_zeros(images_in(value), first.channels, *first.values.shape[2:])
    for piece in value:
        _add_into(out, piece)
    return out


def each(function: Callable[..., Tensor], value: Tensor | Pieces, *args: Any, **kwargs: Any) -> Tensor | Pieces:
    """An operation that works on each channel alone and leaves zeros zero, such as ReLU and pooling."""
    if isinstance(value, Tensor):
        return function(value, *args, **kwargs)
    return [piece._replace(values=function(piece.values, *args, **kwargs)) for piece in value]


def plus(first: Tensor | Pieces, second: Tensor | Pieces) -> Tensor:
    """The sum of two, with all channels."""
    if isinstance(first, Tensor):
        first, second = second, first
    base = full(second)
    if isinstance(first, Tensor):
        return first + base
    values = first[0].values
    shape = (images_in(first), first[0].channels, *values.shape[2:])
    if (len(first) == 1 and first[0].open is None) or base.shape != shape or base.dtype != values.dtype:
        return full(first) + base  # as torch adds: of other shapes, too
    out = base.clone() if isinstance(second, Tensor) or base is second[0].values else base
    for piece in first:
        _add_into(out, piece)
    return out


def concatenated(values: Sequence[Tensor | Pieces]) -> Tensor | Pieces:
    """Channels of one behind those of the other; kept in one piece where all have just one."""
    single = [value if isinstance(value, Tensor) else value[0] for value in values]
    if any(not isinstance(value, Tensor) and (len(value) > 1 or value[0].rows is not None) for value in values):
        return torch.cat([full(value) for value in values], 1)
    if all(isinstance(value, Tensor) or value.open is None for value in single):
        return torch.cat([value if isinstance(value, Tensor) else value.values for value in single], 1)
    start, parts, opens, keys = 0, [], [], []
    for value in single:
        piece = value if isinstance(value, Piece) else Piece(None, value, None, value.shape[1])
        parts.append(piece.values)
        device = piece.values.device
        opened = torch.arange(piece.channels, device=device) if piece.open is None else piece.open
        opens.append(opened + start)
        keys.append(piece.key or b"all %d" % piece.channels)
        start += piece.channels
    return [Piece(None, torch.cat(parts, 1), torch.cat(opens), start, b"|".join(keys))]


def pooled(value: Tensor | Pieces, dtype: torch.dtype) -> Tensor:
    """Means over positions, ``(N, K)``; 0 for a closed channel."""
    if isinstance(value, Tensor):
        return _mean(value, dtype)
    first = value[0]
    if len(value) == 1 and first.rows is None and first.open is None:
        return _mean(first.values, dtype)
    out = first.values.new_zeros(images_in(value), first.channels, dtype=dtype)
    for piece in value:
        _add_into(out, piece._replace(values=_mean(piece.values, dtype)))
    return out


def _mean(values: Tensor, dtype: torch.dtype) -> Tensor:
    positions = (2, 3) if values.dim() == 4 else tuple(range(2, values.dim()))
    return values.mean(positions) if values.dtype == dtype else values.mean(positions, dtype=dtype)


def _add_into(out: Tensor, piece: Piece) -> None:
    rows, opened = piece.rows, piece.open
    if rows is not None and len(rows) > 1:
        index = torch.tensor(rows, device=out.device)
        if opened is None:
            out.index_add_(0, index, piece.values)
        else:
            out.index_put_((index[:, None], opened[None]), piece.values, accumulate=True)
        return
    target = out if rows is None else out[rows[0] : rows[0] + 1]  # a view
    if opened is None:
        target.add_(piece.values)
    else:
        target.index_add_(1, opened, piece.values)
