"""When skipping is worth it: times measured once, on this machine, for one convolution.

A dense call takes ``a + b n`` for n images. A sliced one takes ``c + (d + e n) f``, f the share of weights that is
used: d is for selecting them, which a recurring path saves; it differs by whether inputs are selected too or whole
rows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MANY = 4
_REPEATS = 7
# read between runs: in a network, the weights have left the near caches since the last image
_BETWEEN = 2**21
# skipping must promise this much: a guess that is wrong costs more than a small gain
_MARGIN = 0.95


@dataclass(frozen=True)
class CostModel:
    """Seconds, from a handful of measurements."""

    dense_fixed: float
    dense_each: float
    fixed: float
    selecting_rows: float
    selecting: float
    each: float

    def dense(self, images: int) -> float:
        """All channels of so many images."""
        return (self.dense_fixed + self.dense_each * images) * _MARGIN

    def sliced(self, images: int, inputs: float, outputs: float, kept: bool) -> float:
        """The open shares of inputs and outputs for images of one path."""
        selecting = 0.0 if kept else self.selecting if inputs < 1 else self.selecting_rows
        return self.fixed + inputs * outputs * (self.each * images + selecting)

    def gain(self, images: int, inputs: float) -> float:
        """What is saved here, with half of the outputs open, where only a share of the inputs comes."""
        dense = self.dense(images)
        return min(dense, self.sliced(images, 1.0, 0.5, False)) - min(dense, self.sliced(images, inputs, 0.5, False))


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
    from captum_classfilters.decoupling.pieces import Piece

    device = image.device
    several = image.expand(_MANY, *image.shape[1:]).contiguous()
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
    dense_many = seconds(lambda: layer._dense(several, gates), device)
    one = piece(image, half_in[:1])
    halves = piece(several, half_in)
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
    # what one image takes beyond the fixed part, where several are cheaper by the piece
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
