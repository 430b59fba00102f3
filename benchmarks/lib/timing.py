"""Paired timing: every round runs each contestant once, so that a slow moment of the machine hits all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Timings = dict[str, list[float]]


class Ratio(NamedTuple):
    """How much slower; ``low`` and ``high`` are the extremes over the rounds, ``value`` the ratio of the medians."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, warmups: int = 1, device: str = "cpu") -> Timings:
    """Seconds of each run in each round, in turn A B ..., and from the other end B A ... in every second round."""
    seconds: Timings = {name: [] for name in runs}
    for number in range(-warmups, rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            _wait(device)
            start = time.perf_counter()
            runs[name]()
            _wait(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Timings, name: str, to: str) -> Ratio:
    paired = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    return Ratio(statistics.median(seconds[name]) / statistics.median(seconds[to]), min(paired), max(paired))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
