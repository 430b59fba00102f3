"""What every public method, metric and comparison gives on the shipped networks: stored before, compared after.

    python -m benchmarks.lib.golden write FILE       before, from a checkout of the old code
    python -m benchmarks.lib.golden compare FILE     after, on the same machine
    python -m benchmarks.lib.golden digest           integers and choices alone, which do not depend on the machine

Values differ in the last bits from one processor to another, so the file stays with the machine; the digest is
committed. The cases are in `golden_cases.py`, the canonical form of frames in `golden_schema.py`.
"""

import argparse
import fnmatch
import hashlib
import json
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from benchmarks.lib.golden_schema import RULES, canonical, translated

DIGEST = Path(__file__).with_name("golden_digest.json")
# Tables and all integers: none. Frames: absolute, and relative above 1. Logits, maps and other floats: of the largest
FRAME, FLOATS = 1e-9, 1e-6


class Exact(NamedTuple):
    """Floats that must agree bit for bit."""

    values: Any


class Frame(NamedTuple):
    """The frame of a metric of `golden_schema.RULES`."""

    frame: pd.DataFrame
    metric: str


class Case(NamedTuple):
    """A function that gives what is stored, by name."""

    run: Callable[[], Mapping[str, Any]]
    digest: bool
    network: str | None = None


CASES: dict[str, Case] = {}
# Folders of networks that do not ship any more, such as the assets of the old checkout: `--networks`
NETWORKS: list[Path] = []


def network_file(name: str) -> Path:
    """A file of a network that does not ship."""
    return next((path for folder in NETWORKS if (path := folder / name).is_file()), Path(name))


def case(
    key: str, *, digest: bool = True, network: str | None = None
) -> Callable[[Callable[[], Mapping[str, Any]]], Callable[[], Any]]:
    """Register a function under a key that stays.

    ``digest=False``: its integers hang on the last bits of floats. ``network``: a file that does not ship; the case is
    left out, in words, where ``--networks`` has no such file.
    """

    def register(run: Callable[[], Mapping[str, Any]]) -> Callable[[], Any]:
        if key in CASES:
            raise ValueError(f"two cases are named {key!r}")
        CASES[key] = Case(run, digest, network)
        return run

    return register


def seed_all() -> None:
    """The same random numbers for every case, whichever ran before."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


# -- what is stored ----------------------------------------------------------------------------------------------------


def stored(value: Any) -> dict[str, Any]:
    """A value as plain tensors, lists and dicts."""
    if isinstance(value, Frame):
        frame, labels = canonical(value.frame, value.metric), RULES[value.metric].labels
        columns = {str(name): _column(frame[name]) for name in frame.columns}
        return {"kind": "frame", "metric": value.metric, "labels": list(labels), "columns": columns}
    if isinstance(value, Exact):
        return {"kind": "exact", "values": _tensor(value.values)}
    if isinstance(value, str | Mapping | list | tuple) or value is None:
        return {"kind": "text", "values": json.dumps(value, sort_keys=True, default=str)}
    tensor = _tensor(value)
    return {"kind": "floats" if tensor.is_floating_point() else "exact", "values": tensor}


def loaded(path: Path) -> dict[str, dict[str, Any]]:
    """What `write` stored, by case, in the schemas and words of today."""
    cases = torch.load(path, weights_only=True)["cases"]
    return {key: {name: _translated(value) for name, value in values.items()} for key, values in cases.items()}


def _translated(value: dict[str, Any]) -> dict[str, Any]:
    if value["kind"] == "text":
        return {**value, "values": translated(value["values"])}
    if value["kind"] != "frame":
        return value
    columns = value["columns"].items()
    frame = pd.DataFrame({name: each.numpy() if isinstance(each, Tensor) else each for name, each in columns})
    return stored(Frame(frame, value["metric"]))


def _tensor(value: Any) -> Tensor:
    tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    return tensor.contiguous().clone()


def _column(values: pd.Series) -> Any:
    if values.dtype == bool or pd.api.types.is_integer_dtype(values.dtype):
        return torch.as_tensor(values.to_numpy().astype(np.int64))
    filled = [value for value in values if not (isinstance(value, float) and np.isnan(value)) and value is not None]
    if all(isinstance(value, bool | int | float | np.number | np.bool_) for value in filled):
        return torch.as_tensor(values.astype(float).to_numpy().copy())
    return ["" if value is None or (isinstance(value, float) and np.isnan(value)) else str(value) for value in values]


# -- comparing ---------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """Where two results differ, by how much, and whether that is too much."""

    where: str
    words: str
    wrong: bool


def differences(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """How a stored value differs from another."""
    if before["kind"] != now["kind"]:
        return [Difference(name, f"was {before['kind']}, is {now['kind']}", True)]
    if before["kind"] == "text":
        if before["values"] == now["values"]:
            return []
        return [Difference(name, f"was {before['values'][:300]}, is {now['values'][:300]}", True)]
    if before["kind"] == "frame":
        return _frame_differences(name, before, now)
    exact = before["kind"] == "exact"
    return _numbers(name, before["values"], now["values"], None if exact else FLOATS, whole=True)


def _frame_differences(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    found, labels = [], [*now["labels"], "control"]
    ours, theirs = _by_label(before, labels), _by_label(now, labels)
    for text, rows, others in (("missing", ours, theirs), ("new", theirs, ours)):
        odd = [key for key in rows if key not in others]
        if odd:
            found.append(Difference(name, f"{len(odd)} rows {text}, such as {odd[0]} of {labels}", True))
    same = [key for key in ours if key in theirs]
    for column in dict.fromkeys([*before["columns"], *now["columns"]]):
        where = f"{name}.{column}"
        if column not in now["columns"] or column not in before["columns"]:
            found.append(Difference(where, "column is " + ("new" if column in now["columns"] else "missing"), True))
            continue
        old = _taken(before["columns"][column], [ours[key] for key in same])
        new = _taken(now["columns"][column], [theirs[key] for key in same])
        if isinstance(old, list) or isinstance(new, list):
            odd_rows = [(key, a, b) for key, a, b in zip(same, map(str, old), map(str, new), strict=True) if a != b]
            if odd_rows:
                key, a, b = odd_rows[0]
                found.append(
                    Difference(where, f"{len(odd_rows)} rows differ, such as {key}: was {a!r}, is {b!r}", True)
                )
        else:
            exact = not (old.is_floating_point() or new.is_floating_point())
            found += _numbers(where, old, new, None if exact else FRAME, whole=False, keys=same)
    return found


def _by_label(frame: Mapping[str, Any], labels: list[str]) -> dict[tuple[str, ...], int]:
    columns = []
    for label in labels:
        values = frame["columns"].get(label, [])
        plain = values.tolist() if isinstance(values, Tensor) else values
        columns.append([f"{value:.12g}" if isinstance(value, float | int) else str(value) for value in plain])
    return {key: row for row, key in enumerate(zip(*columns, strict=True))}


def _taken(values: Any, rows: list[int]) -> Any:
    return [values[row] for row in rows] if isinstance(values, list) else values[torch.tensor(rows, dtype=torch.int64)]


def _numbers(
    where: str, before: Tensor, now: Tensor, tolerance: float | None, *, whole: bool, keys: Any = None
) -> list[Difference]:
    """``tolerance`` None: bit for bit. ``whole``: relative to the largest of all; else to each number above 1."""
    if before.shape != now.shape:
        return [Difference(where, f"was of shape {tuple(before.shape)}, is {tuple(now.shape)}", True)]
    if whole and before.dtype != now.dtype:
        return [Difference(where, f"was {before.dtype}, is {now.dtype}", True)]
    if not before.numel():
        return []
    old, new = before.double(), now.double()
    same = (old == new) | (old.isnan() & new.isnan())
    if bool(same.all()):
        return []
    gap = torch.where(same, 0.0, (old - new).abs()).nan_to_num(torch.inf, torch.inf)
    finite = torch.where(old.isfinite(), old.abs(), 0.0)
    scale = finite.max() if whole else finite.clamp(min=1)
    wrong = tolerance is None or not bool((gap <= tolerance * scale).all())
    place = int(gap.argmax())
    which = f" at {keys[place]}" if keys else ""
    words = f"{int((~same).sum())} of {same.numel()} numbers, max abs difference {float(gap.max()):.3g}{which}"
    return [Difference(where, f"{words}: was {old.flatten()[place]:.17g}, is {new.flatten()[place]:.17g}", wrong)]


# -- the digest --------------------------------------------------------------------------------------------------------


def digest_of(values: Mapping[str, Any]) -> str:
    """Of integers, bools and words alone."""
    total = hashlib.sha256()
    for name in sorted(values):
        value = values[name]
        parts = value["columns"] if value["kind"] == "frame" else {"": value["values"]}
        for column in sorted(parts):
            part = parts[column]
            if isinstance(part, Tensor):
                if part.is_floating_point():
                    continue
                part = [list(part.shape), part.flatten().long().tolist()]
            total.update(json.dumps([name, column, part]).encode())
    return total.hexdigest()[:16]


# -- running -----------------------------------------------------------------------------------------------------------


def run_case(key: str) -> dict[str, Any]:
    """What a case gives now, stored."""
    seed_all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: stored(value) for name, value in CASES[key].run().items()}


def chosen(pattern: str | None) -> list[str]:
    """Keys of the cases that a pattern, such as ``metrics/*`` or a part of the key, names."""
    import benchmarks.lib.golden_cases  # noqa: F401 - it registers the cases

    keys = []
    for key, case_ in CASES.items():
        if pattern is not None and not fnmatch.fnmatch(key, pattern) and pattern not in key:
            continue
        if case_.network and not network_file(case_.network).is_file():
            print(f"left out {key}: {case_.network} is not in a folder of --networks", flush=True)
            continue
        keys.append(key)
    return keys


def _attempt(key: str) -> tuple[dict[str, Any] | None, str]:
    try:
        return run_case(key), ""
    except Exception as error:  # the rest goes on
        lines = traceback.format_exception(error)
        return None, f"{type(error).__name__}: {error}\n" + "".join(lines[-3:])


def write(path: Path, pattern: str | None = None) -> int:
    """Run the cases and store what they give."""
    results, errors = {}, 0
    for key in chosen(pattern):
        started = time.perf_counter()
        values, words = _attempt(key)
        print(f"{'error' if values is None else 'stored':<7}{time.perf_counter() - started:6.1f} s  {key}", flush=True)
        if values is None:
            errors += 1
            print("    " + words.replace("\n", "\n    "))
        else:
            results[key] = values
    torch.save({"torch": str(torch.__version__), "cases": results}, path)
    print(f"{len(results)} cases in {path}, {errors} errors")
    return 1 if errors else 0


def compare(path: Path, pattern: str | None = None) -> int:
    """Run the cases and say where they differ from what is stored."""
    before = loaded(path)
    keys = chosen(pattern)
    counts = dict.fromkeys(("ok", "differs", "missing", "extra", "error"), 0)
    gone = [key for key in before if key not in CASES and (pattern is None or pattern in key)]
    for key in [*keys, *gone]:
        details: list[str] = []
        values, words = (None, "") if key in gone else _attempt(key)
        note = ""
        if key in gone:
            status, details = "missing", ["the file has this case, the code has not"]
        elif values is None:
            status, details = "error", words.splitlines()
        elif key not in before:
            status, details = "extra", ["the file has no such case; write it from the old code"]
        else:
            found = _case_differences(before[key], values)
            details = [f"{each.where}: {each.words}" for each in found if each.wrong]
            status = "differs" if details else "ok"
            if found and not details:
                note = f" (within tolerance, not bit for bit: {found[0].where}: {found[0].words})"
        counts[status] += 1
        print(f"{status:<8} {key}{note}", flush=True)
        for line in details:
            print(f"         {line}")
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 0 if counts["ok"] == sum(counts.values()) and counts["ok"] else 1


def _case_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    found = []
    for name in dict.fromkeys([*before, *now]):
        if name not in now or name not in before:
            found.append(Difference(name, "is " + ("new" if name in now else "missing"), True))
        else:
            found += differences(name, before[name], now[name])
    return found


def digest(pattern: str | None = None, *, check: bool = False, source: Path | None = None) -> int:
    """Write the digest of every case, or compare it with the one that is committed; from a file, nothing runs."""
    ready = {} if source is None else loaded(source)
    now, errors = {}, 0
    for key in chosen(pattern):
        if CASES[key].digest:
            values, words = (ready[key], "") if key in ready else _attempt(key)
            errors += values is None
            now[key] = digest_of(values) if values is not None else f"error: {words.splitlines()[0]}"
    if not check:
        DIGEST.write_text(json.dumps(now, indent=1) + "\n")
        print(f"{len(now)} cases in {DIGEST}, {errors} errors")
        return 1 if errors else 0
    known = json.loads(DIGEST.read_text())
    odd = [key for key in now if known.get(key) != now[key]]
    odd += [key for key in known if key not in CASES and pattern is None]
    for key in odd:
        print(f"differs  {key}: was {known.get(key)}, is {now.get(key)}")
    print(f"{len(now) - len(odd)} ok, {len(odd)} differ")
    return 1 if odd else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="golden", description="Store and compare what the package gives.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("write", "compare", "digest", "list"):
        command = commands.add_parser(name)
        command.add_argument("--only", metavar="PATTERN", help="cases whose key matches or contains this")
        command.add_argument("--networks", type=Path, metavar="FOLDER", help="of networks that do not ship")
        if name in ("write", "compare"):
            command.add_argument("file", type=Path)
        if name == "digest":
            command.add_argument("--check", action="store_true", help="compare with the committed digest")
            command.add_argument("--source", type=Path, metavar="FILE", help="what `write` stored, to run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    NETWORKS[:] = [options.networks] if options.networks else []
    if options.command == "list":
        print("\n".join(chosen(options.only)))
        return 0
    if options.command == "digest":
        return digest(options.only, check=options.check, source=options.source)
    return (write if options.command == "write" else compare)(options.file, options.only)


if __name__ == "__main__":
    # under one name, for the cases register themselves in the module of this name
    from benchmarks.lib.golden import main as entry

    sys.exit(entry())
