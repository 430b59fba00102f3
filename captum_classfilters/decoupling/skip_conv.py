"""A convolution that computes only what is open: closed outputs are left out, closed inputs were never made.

`pieces.py` says in what shape maps come and go, `skip_cost.py` when all channels at once are faster.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.decoupling.controller import Controller
from captum_classfilters.decoupling.pieces import Piece, Pieces, full, images_in, pooled
from captum_classfilters.decoupling.skip_cost import CostModel

_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
_KEPT_BYTES = 2**25  # of slices of recurring paths, for each convolution


class SkipConv(nn.Module):
    """One convolution, its norm folded into it, with its gates.

    Args:
        conv: Ungrouped or depthwise, padded with zeros; its parameters are taken over.
        controller: Of its gates; None: all outputs are open, closed inputs are skipped all the same.
        closed: ``(K,)`` bool: outputs that no input can open; they are pruned away.
    """

    weight: Tensor
    bias: Tensor
    live: Tensor | None

    def __init__(self, conv: Any, controller: Controller | None, closed: Tensor | None = None) -> None:
        super().__init__()
        dims = len(conv.kernel_size)
        self.channels, self.inputs = conv.out_channels, conv.in_channels
        self.depthwise = conv.groups > 1
        self._function = _FUNCTIONS[dims - 1]
        self._stride, self._padding, self._dilation = conv.stride, conv.padding, conv.dilation
        self._shape = conv.weight.shape[1:]
        bias = conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)
        self.register_buffer("weight", conv.weight.detach().contiguous())
        self.register_buffer("bias", bias.detach().contiguous())
        self.controller = controller
        self.register_buffer("live", None if closed is None or not closed.any() else (~closed).nonzero().flatten())
        if self.live is not None:
            self.weight, self.bias = self.weight[self.live], self.bias[self.live]
        self.costs: CostModel | None = None  # None: always skip
        self._kept: OrderedDict[tuple[bytes, bytes], Any] = OrderedDict()
        self._kept_bytes = 0

    def forward(self, value: Tensor | Pieces) -> Tensor | Pieces:
        """Maps in; maps out, all channels of them if nothing is gated."""
        if self.controller is None:
            return self._ungated(value)
        gates = self._gates(value)
        if self.costs is not None and self.costs.dense_always:
            return self._dense(value, gates)
        groups = self._groups(value, gates)
        if self.costs is not None and not self._worth(groups, images_in(value)):
            return self._dense(value, gates)
        return [self._sliced(piece, rows, opened, key) for piece, rows, opened, key in groups]

    def _gates(self, value: Tensor | Pieces) -> Tensor:
        """Which of the live outputs are open, ``(N, K)`` bool."""
        controller: Any = self.controller
        with torch.autocast(self.weight.device.type, enabled=False):
            hidden = controller.squeeze(pooled(value, controller.squeeze.weight.dtype)).relu_()
            logits = controller.excite(hidden)
        return logits > 0  # type: ignore[no-any-return]

    def _groups(self, value: Tensor | Pieces, gates: Tensor) -> list[Any]:
        """Images of one piece with the same gates: ``(piece, rows within it, their gates, key)``."""
        pieces = value if isinstance(value, list) else [Piece(None, value, None, self.inputs)]
        rows = gates.cpu().numpy()
        if len(rows) == 1:
            return [(pieces[0], None, gates[0], rows.tobytes())]
        groups = []
        for piece in pieces:
            by_key: dict[bytes, list[int]] = {}
            where = range(len(rows)) if piece.rows is None else piece.rows
            for local, row in enumerate(where):
                by_key.setdefault(rows[row].tobytes(), []).append(local)
            for key, local_rows in by_key.items():
                whole = None if len(local_rows) == len(piece.values) else local_rows
                groups.append((piece, whole, gates[where[local_rows[0]]], key))
        return groups

    def _worth(self, groups: list[Any], images: int) -> bool:
        costs: Any = self.costs
        spent = 0.0
        for piece, rows, _, key in groups:
            count = len(piece.values) if rows is None else len(rows)
            inputs = 1.0 if piece.open is None else len(piece.open) / self.inputs
            # gates are bytes of 0 and 1
            spent += costs.sliced(count, inputs, key.count(1) / len(key), (piece.key, key) in self._kept)
        return bool(spent < costs.dense(images))

    def _sliced(self, piece: Piece, rows: list[int] | None, gates: Tensor, key: bytes) -> Piece:
        values = piece.values
        if rows is not None:
            values = values[rows[0] : rows[0] + 1] if len(rows) == 1 else values[rows]
        opened, weight, bias, empty = self._slice(piece, gates, key)
        if self.depthwise:
            values = full([piece._replace(rows=None, values=values)]).index_select(1, opened)
        out = self._function(
            values, weight, bias, self._stride, self._padding, self._dilation, len(weight) if self.depthwise else 1
        )
        if empty:
            out = torch.zeros_like(out)
        absolute = piece.rows if rows is None else tuple(row if piece.rows is None else piece.rows[row] for row in rows)
        return Piece(absolute, out, opened, self.channels, key)

    def _slice(self, piece: Piece, gates: Tensor, key: bytes) -> Any:
        """Open channels, their weights and biases; those of recurring paths are kept."""
        where = (piece.key, key)
        if where in self._kept:
            self._kept.move_to_end(where)
            return self._kept[where]
        local = gates.nonzero().flatten()
        empty = not len(local)
        if empty:  # one channel of zeros stands for none
            local = torch.zeros(1, dtype=torch.int64, device=gates.device)
        weight = self.weight.index_select(0, local)
        if piece.open is not None and not self.depthwise:
            # rows of one kernel each: contiguous, and one selection for both
            kernels = self.weight.view(len(self.weight) * self.inputs, -1)
            index = (local[:, None] * self.inputs + piece.open).flatten()
            weight = kernels.index_select(0, index).view(len(local), len(piece.open), *self._shape[1:])
        opened = local if self.live is None else self.live.index_select(0, local)
        found = (opened, weight, self.bias.index_select(0, local), empty)
        self._keep(where, found)
        return found

    def forget(self) -> None:
        """Drop the slices of recurring paths."""
        self._kept.clear()
        self._kept_bytes = 0

    def _keep(self, where: tuple[bytes, bytes], found: Any) -> None:
        size = found[1].numel() * found[1].element_size()
        if size > _KEPT_BYTES:
            return
        self._kept[where] = found
        self._kept_bytes += size
        while self._kept_bytes > _KEPT_BYTES:
            _, (_, weight, _, _) = self._kept.popitem(last=False)
            self._kept_bytes -= weight.numel() * weight.element_size()

    def _dense(self, value: Tensor | Pieces, gates: Tensor) -> Pieces:
        values = full(value)
        if self.depthwise and self.live is not None:
            values = values.index_select(1, self.live)
        groups = len(self.weight) if self.depthwise else 1
        out = self._function(values, self.weight, self.bias, self._stride, self._padding, self._dilation, groups)
        out = out * gates.to(out.dtype).reshape(*gates.shape, *(1,) * (out.dim() - 2))
        return [Piece(None, out, self.live, self.channels, b"" if self.live is None else b"live")]

    def _ungated(self, value: Tensor | Pieces) -> Tensor:
        everything = self.weight.new_ones(len(self.weight), dtype=torch.bool)
        if isinstance(value, Tensor) or self.costs is None or not self._worth_ungated(value):
            values = full(value)
            return self._function(values, self.weight, self.bias, self._stride, self._padding, self._dilation)
        pieces = [self._sliced(piece, None, everything, b"") for piece in value]
        if len(pieces) == 1:
            return pieces[0].values
        return full([piece._replace(open=None) for piece in pieces])

    def _worth_ungated(self, value: Pieces) -> bool:
        costs: Any = self.costs
        spent = sum(
            costs.sliced(len(piece.values), len(piece.open) / self.inputs, 1.0, (piece.key, b"") in self._kept)
            for piece in value
            if piece.open is not None
        )
        return bool(0 < spent < costs.dense(images_in(value)))
