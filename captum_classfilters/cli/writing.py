"""What a command gives: files, each whole or not at all; and prose or one JSON document on stdout, notes on stderr."""

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.core.errors import printable
from captum_classfilters.core.files import check_folder, replacing

_OURS = re.compile(
    r"(filters|moments|small|class_filters|overlap|accuracy_curve|accuracy|top|decompose|scores|alarms|detector|watch)(_\w+)?(\.partial)?"
    r"\.(safetensors|csv|png|json|skops)"
)


class Console:
    """Prose as it comes, facts for ``--json`` at the end.

    Args:
        as_json: Print no prose; `finish` prints the facts.
        quiet: Print no prose.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json, self._silent = as_json, as_json or quiet
        self.facts: dict[str, Any] = {}

    def say(self, text: str = "") -> None:
        """A line of prose."""
        if not self._silent:
            self._print(text)

    def _print(self, text: str) -> None:
        try:
            print("\n".join(map(printable, text.split("\n"))), flush=True)
        except BrokenPipeError:  # the reader, such as head, has seen enough: the files are still wanted
            self._silent = True
            with open(os.devnull, "w") as nowhere, suppress(OSError):  # not every stdout is a file
                os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def note(self, text: str) -> None:
        """A note on stderr, whatever the output."""
        print(f"note: {printable(text)}", file=sys.stderr)

    def finish(self) -> None:
        """Print the facts, if JSON was asked for."""
        if self._as_json:
            self._print(as_json(self.facts))


def as_json(value: Any) -> str:
    """Strict JSON, indented: NaN and infinity become null, paths become text."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


class Output:
    """The folder a command writes into; made, and tried, before work starts.

    Args:
        folder: Where to write.
        names: The files that will be written: none may be a folder.

    Raises:
        OSError: Nothing can be written there.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        self.written: list[Path] = []
        # this run's names, and the folders that it makes, innermost first
        self._names = set(names)
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in self._names:
                check_folder(folder / name)
            # only writing shows whether one can write; permissions do not tell it all
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"\0")
        except OSError as error:
            self.remove_if_empty()
            raise OSError(f"cannot write to {folder}: {_why(error)}; choose another folder with --out") from error

    def remove_if_empty(self) -> None:
        """Take the folders away that were made for nothing."""
        with suppress(OSError):  # not empty
            for path in self._made:
                path.rmdir()

    def from_before(self) -> list[str]:
        """Files that look like this command line's, and are of an earlier run."""
        mine = {path.name for path in self.written}
        return sorted(p.name for p in self.folder.iterdir() if _OURS.fullmatch(p.name) and p.name not in mine)

    @contextmanager
    def into(self, name: str) -> Iterator[Path]:
        """The path to save a file under; an error names the file, and says that an older one is still there."""
        path = self.folder / name
        try:
            yield path
        except (OSError, SafetensorError) as error:
            before = "; the one from before is untouched" if path.exists() else ""
            raise OSError(
                f"cannot write {path}: {_why(error)}{before}; make room, or choose another folder with --out"
            ) from error
        self.written.append(path)

    def text(self, name: str, text: str) -> None:
        """Write text."""
        with self.into(name) as path, replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")

    def picture(self, name: str, draw: Callable[[], object]) -> None:
        """Write the figure that ``draw`` makes as PNG."""
        import matplotlib as mpl

        mpl.use("Agg")  # no window, wherever this runs
        import matplotlib.pyplot as plt

        plt.close("all")
        try:
            draw()
            with self.into(name) as path, replacing(path) as beside:
                plt.gcf().savefig(beside, format="png", dpi=120, bbox_inches="tight")
        finally:
            plt.close("all")

    def keep_partial(self, stem: str, partial: Any) -> Path:
        """Save what a pass had counted before it ended early: a table, or moments."""
        with self.into(f"{stem}.partial.safetensors") as path:
            partial.save(path)
        self.written.remove(path)  # it has a note of its own: it is not what was asked for
        return path


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def top_csv(tables: Mapping[str, ClassFilters], k: int) -> str:
    """Each class's k strongest channels as CSV; classes without images are left out.

    ``score`` is as in the table. ``per_image`` is the score divided by the images of the class, where scores add up
    over images: for the histogram the share of them that vote for the channel. ``share`` is the channel's part of the
    sum of the class's positive scores.
    """
    import pandas as pd

    rows = []
    for selector, table in tables.items():
        adds_up = table.merge_rule == "sum"
        for index, channels in enumerate(table.top(k).tolist()):
            if not table.seen[index]:
                continue
            scores, images = table.scores[index], int(table.counts[index])
            positive = float(scores.clamp(min=0).sum())
            for rank, channel in enumerate(channels, 1):
                score = float(scores[channel])
                per_image = score / images if adds_up else float("nan")
                share = max(score, 0.0) / positive if positive else float("nan")
                rows.append((selector, table.class_names[index], rank, channel, score, per_image, share, images))
    columns = ["selector", "class", "rank", "channel", "score", "per_image", "share", "images"]
    return as_csv(pd.DataFrame(rows, columns=columns))


def as_csv(frame: Any) -> str:
    """CSV whose text cells are no formulas: spreadsheets would run a folder's name that begins with ``=``."""
    harmless = frame.apply(lambda column: column.map(_no_formula))
    return str(harmless.to_csv(index=False, lineterminator="\n"))


def _no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and re.match(r"[=+@\t\r]|-(?!\d+(\.\d+)?$)", cell) else cell


def top_lines(table: ClassFilters, k: int, most: int = 20) -> list[str]:
    """The first classes and their channels, for people."""
    width = max(len(_short(name)) for name in table.class_names[:most])
    lines = []
    for name, seen, channels in zip(
        table.class_names[:most], table.seen[:most].tolist(), table.top(k)[:most].tolist(), strict=True
    ):
        row = "".join(f"{channel:>6}" for channel in channels) if seen else "  (no images)"
        lines.append(f"  {_short(name):<{width}}{row}")
    if table.num_classes > most:
        lines.append(f"  ... and {table.num_classes - most} more classes")
    return lines


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."
