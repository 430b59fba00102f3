"""A benchmark's answer as rows of text, and the line that says where and when it was measured."""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import captum
import pandas as pd
import torch
import torchvision

import captum_classfilters


@dataclass(frozen=True)
class Row:
    """One figure; ``value`` is compared with ``target`` where both are numbers: no more is asked, or no less."""

    what: str
    shown: str
    value: float | None = None
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None or self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def cells(self) -> tuple[str, str, str, str]:
        target = "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g}"
        return self.what, self.shown, target, {None: "", True: "yes", False: "NO"}[self.met]


@dataclass
class Table:
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self, what: str, shown: str, value: float | None = None, target: float | None = None, at_least: bool = False
    ) -> None:
        self.rows.append(Row(what, shown, value, target, at_least))

    def __str__(self) -> str:
        return "\n".join(
            [f"## {self.title}", "", *columns(("what", "measured", "target", "met"), [r.cells() for r in self.rows])]
            + ["", *(f"- {note}" for note in self.notes)] * bool(self.notes)
        )


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, padded so that it also reads as plain text."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]


def interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def markdown(table: pd.DataFrame, title: str) -> None:
    """Print a frame as a Markdown table under a line that says what its cells hold."""
    print(f"\n{title}\n")
    head = [str(table.index.name or ""), *(f"{table.columns.name or ''} {column}".strip() for column in table.columns)]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, row in table.iterrows():
        print("| " + " | ".join([str(name), *map(str, row)]) + " |")


def machine(device: str) -> str:
    """Where, when and with what: the line without which a figure means nothing."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [date.today().isoformat(), f"{_processor()}, {cores} cores, threads used: {torch.get_num_threads()}"]
    if device == "cuda":
        parts.append(torch.cuda.get_device_name())
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "captum": captum.__version__,
        "captum_classfilters": captum_classfilters.__version__,
    }
    return "; ".join([*parts, ", ".join(f"{name} {version}" for name, version in versions.items())])


def stamp(name: str, device: str) -> str:
    """The command that makes the figures below it, and `machine`, as a comment of Markdown."""
    return f"<!-- {' '.join([f'python -m benchmarks.{name}', *sys.argv[1:]])}; {machine(device)} -->"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
