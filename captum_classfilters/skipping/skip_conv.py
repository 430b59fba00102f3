"""A convolution that computes only what is open: closed outputs are left out, closed inputs were never computed.

`pieces.py` says in what shape maps come and go. `CostModel` says when skipping is worth it, from times measured once,
on this machine, for one convolution. A dense call takes ``a + b n`` for n images. A sliced one takes
``c + (d + e n) f``, f the share of weights that is used: d is for selecting them, which a recurring path saves; it
differs by whether inputs are selected too or whole rows.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.core.wide import full_precision
from captum_classfilters.skipping.pieces import Piece, Pieces, factors, full, images_in, pooled

_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
_VECTOR = 16
_SEEN = 1000  # paths that a convolution remembers to have met once
_KEPT_BYTES = 2**25  # of slices of recurring paths, for each convolution
# of what is kept: threads may share a network; not an attribute, since locks cannot be copied
_LOCK = threading.Lock()

# how it is timed: with so many images, so often
_MANY = 4
_REPEATS = 7
# numbers read between runs: in a network, the weights have left the near caches since the last image
_BETWEEN = 2**21
# skipping must promise this much: a wrong guess costs more than a small gain
_MARGIN = 0.95


@dataclass(frozen=True)
class CostModel:
    """Seconds that calls of one convolution take, from a handful of measurements."""

    dense_fixed: float
    dense_each: float
    fixed: float
    selecting_rows: float
    selecting: float
    each: float

    def dense(self, images: int) -> float:
        """Seconds for all channels of so many images."""
        return (self.dense_fixed + self.dense_each * images) * _MARGIN

    def sliced(self, images: int, inputs: float, outputs: float, kept: bool) -> float:
        """Seconds for the open shares of inputs and outputs, for images of one path."""
        selecting = 0.0 if kept else self.selecting if inputs < 1 else self.selecting_rows
        return self.fixed + inputs * outputs * (self.each * images + selecting)

    def gain(self, images: int, inputs: float) -> float:
        """Seconds saved here, with half of the outputs open, where only a share of the inputs comes."""
        dense = self.dense(images)
        return min(dense, self.sliced(images, 1.0, 0.5, False)) - min(dense, self.sliced(images, inputs, 0.5, False))


class SkipConv(nn.Module):
    """One convolution, its norm folded into it, with its gates.

    Args:
        conv: Ungrouped or depthwise, padded with zeros; its parameters are taken over.
        controller: Gives its gates; None: all outputs are open, and closed inputs are skipped all the same.
        closed: ``(K,)`` bool: outputs that no input can open; they are pruned away.
    """

    weight: Tensor
    bias: Tensor
    dense_weight: Tensor
    live: Tensor | None
    squeeze: Tensor
    squeeze_bias: Tensor
    excite: Tensor
    excite_bias: Tensor

    def __init__(self, conv: Any, controller: Any | None, closed: Tensor | None = None) -> None:
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
        self.gated = controller is not None
        live = None if closed is None or not closed.any() else (~closed).nonzero().flatten()
        # one stays where none is left: a convolution needs a filter
        self.register_buffer("live", live if live is None or len(live) else live.new_zeros(1))
        if self.live is not None:
            self.weight, self.bias = self.weight[self.live], self.bias[self.live]
        # in the memory format of the maps
        self.register_buffer("dense_weight", self.weight)
        if controller is not None:
            self._take(controller)
        self._gather()
        self.costs: CostModel | None = None  # None: always skip
        self.prefers_dense = False
        self.by_product: set[str] = set()  # of "dense" and "sliced": which are faster as a matrix product
        self.next: list[SkipConv] = []  # those that get this one's output, and work less for it
        self._kept: OrderedDict[tuple[bytes, bytes], Any] = OrderedDict()
        self._kept_bytes = 0
        self._seen: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()

    def _take(self, controller: Any) -> None:
        """The controller's weights as a product takes them, of the outputs that can open."""
        excite, bias = controller.excite.weight.detach(), controller.excite.bias.detach()
        if self.live is not None:
            excite, bias = excite[self.live], bias[self.live]
        self.register_buffer("squeeze", controller.squeeze.weight.detach().t().contiguous())
        self.register_buffer("squeeze_bias", controller.squeeze.bias.detach().clone())
        self.register_buffer("excite", excite.t().contiguous())
        self.register_buffer("excite_bias", bias.clone())

    def _apply(self, fn: Any, recurse: bool = True) -> "SkipConv":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._gather()
        self.forget()
        return self

    def _gather(self) -> None:
        """Keep the buffers that every call needs at hand: looking one up in a module takes as long as using it."""
        self._whole = (self.dense_weight, self.bias)
        if self.gated:
            self._gate = (self.squeeze, self.squeeze_bias, self.excite, self.excite_bias, self.weight.device.type)

    def forward(self, value: Tensor | Pieces) -> Tensor | Pieces:
        """Maps in; maps out, all channels of them if nothing is gated."""
        if not self.gated:
            return self._ungated(value)
        gates = self._gates(value)
        if self.prefers_dense or not len(gates):
            return self._dense(value, gates)
        groups = self._groups(value, gates)
        if self.costs is not None and not self._worth(groups, images_in(value)):
            return self._dense(value, gates)
        return [self._sliced(piece, rows, opened, key) for piece, rows, opened, key in groups]

    def look_at(self, value: Tensor | Pieces) -> None:
        """Whether such a batch is better computed whole: later ones are then not even looked at."""
        self.prefers_dense = False
        if self.gated and self.costs is not None:
            groups = self._groups(value, self._gates(value))
            self.prefers_dense = not self._worth(groups, images_in(value))

    def _gates(self, value: Tensor | Pieces) -> Tensor:
        """Which outputs are open, ``(N, K)`` bool: eq. 5, in as few calls as it takes."""
        squeeze, squeeze_bias, excite, excite_bias, device = self._gate
        if torch.is_autocast_enabled(device):
            with full_precision(device):
                return self._gates(value)
        hidden = torch.addmm(squeeze_bias, pooled(value, squeeze.dtype), squeeze).relu_()
        return torch.addmm(excite_bias, hidden, excite) > 0

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
            # a key has one byte for each gate, 0 or 1
            outputs = self._rounded(key.count(1)) / len(key)
            spent += costs.sliced(count, inputs, outputs, (piece.key, key) in self._kept)
            spent -= sum(other.costs.gain(count, outputs) for other in self.next if other.costs is not None)
        return bool(spent < costs.dense(images))

    def _sliced(self, piece: Piece, rows: list[int] | None, gates: Tensor, key: bytes) -> Piece:
        values = piece.values
        if rows is not None:
            values = values[rows[0] : rows[0] + 1] if len(rows) == 1 else values[rows]
        opened, weight, bias = self._slice(piece, gates, key)
        if self.depthwise:
            values = full([piece._replace(rows=None, values=values)]).index_select(1, opened)
        out = self._convolve("sliced", values, weight, bias)
        absolute = piece.rows if rows is None else tuple(row if piece.rows is None else piece.rows[row] for row in rows)
        return Piece(absolute, out, opened, self.channels, key)

    def _slice(self, piece: Piece, gates: Tensor, key: bytes) -> Any:
        """Open channels, their weights and biases; those of recurring paths are kept."""
        where = (piece.key, key)
        with _LOCK:
            if where in self._kept:
                self._kept.move_to_end(where)
                return self._kept[where]
        local = gates.nonzero().flatten()
        open_ones = len(local)
        if lacking := self._rounded(open_ones) - open_ones:
            local = torch.cat([local, (~gates).nonzero().flatten()[:lacking]])
        if piece.open is None or self.depthwise:
            weight = self.weight.index_select(0, local)
        else:
            # rows of one kernel each: contiguous, and one selection for both
            kernels = self.weight.view(len(self.weight) * self.inputs, -1)
            index = (local[:, None] * self.inputs + piece.open).flatten()
            weight = kernels.index_select(0, index).view(len(local), len(piece.open), *self._shape[1:])
        bias = self.bias.index_select(0, local)
        weight[open_ones:], bias[open_ones:] = 0, 0
        opened = local if self.live is None else self.live.index_select(0, local)
        selected = (opened, weight, bias)
        with _LOCK:
            self._keep(where, selected)
        return selected

    def _rounded(self, channels: int) -> int:
        """A multiple of what a vector instruction takes, filled up with zeros.

        Kernels pad to it anyway, and every new number of channels would need another compiled kernel.
        """
        step = _VECTOR if len(self.weight) >= 4 * _VECTOR else _VECTOR // 2
        return min(max(1, -(-channels // step)) * step, len(self.weight))

    def _convolve(self, which: str, values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if which in self.by_product:
            return _product(values, weight, bias, self._stride, self._padding, self._dilation)
        groups = len(weight) if self.depthwise else 1
        return self._function(values, weight, bias, self._stride, self._padding, self._dilation, groups)

    @property
    def can_be_product(self) -> bool:
        """Whether `_product` computes the same: in two dimensions, ungrouped."""
        return len(self._shape) == 3 and not self.depthwise and not isinstance(self._padding, str)

    def set_format(self, memory_format: torch.memory_format) -> None:
        """Lay the weights of whole calls out as the maps are."""
        self.dense_weight = self.weight
        if self.weight.dim() == 4:
            self.dense_weight = self.weight.contiguous(memory_format=memory_format)
        self._gather()
        self.forget()

    def forget(self) -> None:
        """Drop the slices of recurring paths."""
        with _LOCK:
            self._kept.clear()
            self._seen.clear()
            self._kept_bytes = 0

    def _keep(self, where: tuple[bytes, bytes], selected: Any) -> None:
        """Keep a slice from the second time on: keeping what never comes again costs more than it saves."""
        if where not in self._seen:
            self._seen[where] = None
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
            return
        size = selected[1].numel() * selected[1].element_size()
        if size > _KEPT_BYTES or where in self._kept:  # another thread's
            return
        self._kept[where] = selected
        self._kept_bytes += size
        while self._kept_bytes > _KEPT_BYTES:
            _, (_, weight, _) = self._kept.popitem(last=False)
            self._kept_bytes -= weight.numel() * weight.element_size()

    def _dense(self, value: Tensor | Pieces, gates: Tensor) -> Tensor | Pieces:
        values = full(value)
        if self.depthwise and self.live is not None:
            values = values.index_select(1, self.live)
        weight, bias = self._whole
        out = self._convolve("dense", values, weight, bias)
        out.mul_(factors(gates, out))
        return out if self.live is None else [Piece(None, out, self.live, self.channels, b"live")]

    def _ungated(self, value: Tensor | Pieces) -> Tensor:
        if isinstance(value, Tensor) or (self.costs is not None and not self._worth_ungated(value)):
            return self._convolve("dense", full(value), *self._whole)
        everything = self.weight.new_ones(len(self.weight), dtype=torch.bool)
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


def _product(values: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """A convolution as a matrix product: on small maps faster, since weights are not laid out anew for each call."""
    kernel = weight.shape[2:]
    if all(size == 1 for size in (*kernel, *stride)) and not any(padding):
        shape, columns = values.shape[2:], values.flatten(2)
    else:
        sizes = zip(values.shape[2:], kernel, stride, padding, dilation, strict=True)
        shape = torch.Size(
            (size + 2 * pad - step * (side - 1) - 1) // stride + 1 for size, side, stride, pad, step in sizes
        )
        columns = F.unfold(values, kernel, dilation, padding, stride)
    flat = weight.flatten(1)
    if len(values) == 1:
        out = torch.addmm(bias[:, None], flat, columns[0])
    else:
        out = torch.matmul(flat, columns) + bias[:, None]
    return out.view(len(values), len(weight), *shape)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The shortest of a few runs, with weights out of the near caches."""
    best, between = float("inf"), torch.zeros(_BETWEEN, device=device)
    function()
    for _ in range(_REPEATS):
        between.add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def measure(layer: Any, image: Tensor) -> CostModel:
    """Time a `skip_conv.SkipConv` on maps like ``image``, ``(1, K, ...)``; sets whether it runs as a product."""
    device = image.device
    images = image.expand(_MANY, *image.shape[1:]).contiguous()
    outputs = len(layer.weight)
    half_in = torch.arange(0, layer.inputs, 2, device=device)
    half_out = torch.zeros(outputs, dtype=torch.bool, device=device)
    half_out[::2] = True
    one_out = torch.zeros_like(half_out)
    one_out[0] = True
    gates = torch.ones(_MANY, outputs, dtype=torch.bool, device=device)

    def piece(images: Tensor, index: Tensor) -> Piece:
        return Piece(None, images.index_select(1, index), index, layer.inputs, b"half")

    def sliced(part: Piece, opened: Tensor, kept: bool) -> Callable[[], Any]:
        def run() -> None:
            if not kept:
                layer.forget()
            layer._sliced(part, None, opened, b"x")

        return run

    half = piece(image, half_in)
    layer.by_product = _faster_as_product(
        layer,
        device,
        dense=lambda: layer._dense(image, gates[:1]),
        sliced=sliced(half, half_out, False),
    )
    dense_one = seconds(lambda: layer._dense(image, gates[:1]), device)
    dense_many = seconds(lambda: layer._dense(images, gates), device)
    one = piece(image, half_in[:1])
    halves = piece(images, half_in)
    share = len(half_in) / layer.inputs * int(half_out.sum()) / outputs
    fixed = seconds(sliced(one, one_out, True), device)
    layer.forget()
    kept = seconds(sliced(half, half_out, True), device)
    kept_many = seconds(sliced(halves, half_out, True), device)
    fresh = seconds(sliced(half, half_out, False), device)
    whole = Piece(None, image, None, layer.inputs)
    rows_kept = seconds(sliced(whole, half_out, True), device)
    rows_fresh = seconds(sliced(whole, half_out, False), device)
    layer.forget()
    dense_each = max(dense_many - dense_one, 0.0) / (_MANY - 1)
    each = max(kept_many - kept, 0.0) / (_MANY - 1) / share
    # the time of one image beyond the fixed part, where a batch is cheaper per image
    each = max(each, (kept - fixed) / share)
    return CostModel(
        dense_fixed=max(dense_one - dense_each, 0.0),
        dense_each=dense_each,
        fixed=fixed,
        selecting_rows=max(rows_fresh - rows_kept, 0.0) / (int(half_out.sum()) / outputs),
        selecting=max(fresh - kept, 0.0) / share,
        each=each,
    )


def _faster_as_product(layer: Any, device: torch.device, **runs: Callable[[], Any]) -> set[str]:
    if not layer.can_be_product:
        return set()
    faster = set()
    for name, run in runs.items():
        times = []
        for layer.by_product in (set(), {name}):
            layer.forget()
            times.append(seconds(run, device))
        if times[1] < times[0]:
            faster.add(name)
    return faster
