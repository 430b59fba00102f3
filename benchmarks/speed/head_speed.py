"""The smaller head against ``nn.Linear``, at every size, batch and k of a grid; and each form by itself.

Run it with ``--threads 1``: the rules of ``backend="auto"`` were measured so.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lib.report import Table
from benchmarks.lib.workload import Settings
from captum_classfilters import ClassFilters, DecomposedLinear, decompose
from captum_classfilters.heads.decomposed_linear import transposed

CLASSES, CHANNELS, KEPT, BATCHES = (10, 100, 1000, 10000), (64, 512, 2048), (1, 5, 50), (1, 8, 64, 256)
TARGETS = {1: 2.5, 8: 9.0, 64: 18.0, 256: 14.0}  # 2048 -> 1000, k = 50
FLOOR = 0.95
ROUNDS = 11
# Long enough that the clock's own steps do not show
SECONDS = 0.003


def run(settings: Settings) -> Table:
    table = Table("heads: decompose(..., backend='auto') and its forms, against nn.Linear")
    forms(table, settings.device, 1000, 2048, 50, TARGETS)
    # why so small a head stays dense
    forms(table, settings.device, 10, 64, 5, dict.fromkeys(BATCHES))
    if settings.device == "cpu":
        pieces(table)
    grid(table, settings.device)
    table.notes = [
        f"how many times as fast as nn.Linear: median over {ROUNDS} rounds in turn (least to most); inference_mode",
        "csr, bag: as DecomposedLinear(backend=...); gather: the plain indexing of the published code",
        "grid: C x K, k kept; where auto returns a plain nn.Linear with zeros the ratio is that of two such layers",
    ]
    return table


def forms(
    table: Table, device: str, classes: int, channels: int, kept: int, targets: Mapping[int, float | None]
) -> None:
    """What each form gives at each batch size, and what was asked of the chosen one."""
    linear, filters = random_head(classes, channels, device)
    heads: dict[str, nn.Module] = {
        name: _small(linear, filters, kept, backend=name) for name in ("auto", "csr", "bag", "gather")
    }
    # the rule chooses dense on a GPU; its forms are shown all the same
    for size, target in targets.items():
        inputs = torch.rand(size, channels, device=device)
        found = faster(linear, heads, inputs, device)
        for name, ratios in found.items():
            shown = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            asked = target if name == "auto" and device == "cpu" else None
            what = f"{channels} -> {classes}, k {kept}, B {size}: {name}"
            table.add(what, shown, median(ratios), asked, at_least=True)


@torch.inference_mode()
def pieces(table: Table) -> None:
    """Where the bag's time goes, 2048 -> 1000, k = 50."""
    linear, filters = random_head(1000, 2048, "cpu")
    small = _small(linear, filters, 50, backend="bag")
    for size in (64, 256):
        inputs = torch.rand(size, 2048)
        turned = transposed(inputs)
        work: dict[str, Callable[[Any], Any]] = {
            "whole": small,
            "transposing the batch": transposed,
            "... by torch's contiguous()": lambda x: x.T.contiguous(),
            "the bag alone": lambda x, turned=turned: F.embedding_bag(
                small.indices, turned, small.offsets, mode="sum", per_sample_weights=small.weight,
                include_last_offset=True,
            ),
        }  # fmt: skip
        for name, function in work.items():
            times = _times(function, inputs, "cpu")
            micro = 1e6 * median(_each(function, inputs, times, "cpu") for _ in range(ROUNDS))
            table.add(f"bag, B {size}: {name}", f"{micro:.0f} us")


def grid(table: Table, device: str) -> None:
    """A row for each C, K and k: what auto chose, and how much faster it is at each batch size."""
    for classes, channels, kept in itertools.product(CLASSES, CHANNELS, KEPT):
        linear, filters = random_head(classes, channels, device)
        small = _small(linear, filters, kept, backend="auto")
        ratios = []
        for size in BATCHES:
            inputs = torch.rand(size, channels, device=device)
            ratios.append(median(faster(linear, {"auto": small}, inputs, device)["auto"]))
        chosen = "sparse" if isinstance(small, DecomposedLinear) else "dense"
        shown = "  ".join(f"B {size} {value:.2f}" for size, value in zip(BATCHES, ratios, strict=True))
        table.add(f"{classes} x {channels}, k {kept} ({chosen})", shown, min(ratios), FLOOR, at_least=True)


def random_head(classes: int, channels: int, device: str) -> tuple[nn.Linear, ClassFilters]:
    torch.manual_seed(0)
    linear = nn.Linear(channels, classes, device=device)
    scores = torch.rand(classes, channels, dtype=torch.float64)
    names = tuple(map(str, range(classes)))
    return linear, ClassFilters(scores, scores, torch.ones(classes, dtype=torch.int64), "random", "0", names)


def _small(linear: nn.Linear, filters: ClassFilters, kept: int, backend: str) -> nn.Module:
    return decompose(nn.Sequential(linear), filters, kept, backend=backend)[0]  # type: ignore[index]


@torch.inference_mode()
def faster(linear: nn.Linear, heads: dict[str, nn.Module], inputs: Any, device: str) -> dict[str, list[float]]:
    """How many times as fast as the dense layer each head is, in each round."""
    times = {name: _times(head, inputs, device) for name, head in heads.items()}
    dense = _times(linear, inputs, device)
    rounds: dict[str, list[float]] = {name: [] for name in heads}
    for number in range(ROUNDS):
        order = list(heads)[:: -1 if number % 2 else 1]
        seconds = {name: _each(heads[name], inputs, times[name], device) for name in order}
        base = _each(linear, inputs, dense, device)
        for name in heads:
            rounds[name].append(base / seconds[name])
    return rounds


def _times(head: Callable[[Any], Any], inputs: Any, device: str) -> int:
    """Calls that fill the time of one measurement; the first warm up."""
    for _ in range(3):
        head(inputs)
    return max(3, int(SECONDS / _each(head, inputs, 5, device)))


def _each(head: Callable[[Any], Any], inputs: Any, times: int, device: str) -> float:
    # what ran before has the caches full of its own
    head(inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        head(inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times
