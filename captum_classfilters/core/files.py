"""Safetensors with a JSON header, written beside and renamed: nothing runs on load, nothing is half written.

One file holds the tensors and, in the header, what they are: ``kind``, ``version`` and ``meta``.
What the tensors of a kind mean is known where that kind is saved; `contents` reports what does not fit.
"""

import glob
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from captum_classfilters.core.errors import FileFormatError, brief

_HEADER = "captum_classfilters"
# Seconds after which an unfinished file counts as left behind where there are no locks
_STALE = 24 * 3600


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    kind: str,
    version: int,
    meta: Mapping[str, Any],
) -> None:
    """Save ``tensors`` and ``meta`` under ``path``; an older file there stays whole until the new one is.

    Args:
        path: The file to write.
        tensors: Named tensors, on any device.
        kind: What this file is, such as ``"ClassFilters"``; `read` asks for it again.
        version: Schema version of that kind.
        meta: Anything JSON can hold.
    """
    header = {_HEADER: json.dumps({"kind": kind, "version": version, "meta": meta})}
    # clones: the format refuses tensors that share memory
    on_cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as beside:
        save_file(on_cpu, beside, metadata=header)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside ``path`` to write into; it takes the place of ``path`` if all goes well, and is gone if not.

    The new file is on the disk before it takes the place, so that a loss of power leaves the old file or the new one.
    It keeps the older file's mode. Where ``path`` is a link, the file that it points to is replaced. What killed runs
    left beside it is removed. Several threads and processes may write the same file: the last one stays.

    Raises:
        FileNotFoundError: There is no such folder.
        OSError: The file cannot be written, for instance because the disk is full; names the file.
    """
    check_folder(Path(path))
    target = Path(os.path.realpath(path))
    _remove_stale(target)
    # a folder of its own: safetensors and others put files of their own beside what they write
    folder, lock = _open_folder(target)
    beside = folder / target.name
    try:
        try:
            mode = _mode_for(target, beside)
            yield beside
        # neither safetensors nor torch.save reports a full disk by an OSError
        except (SafetensorError, RuntimeError) as error:
            raise _as_os_error(error, path) from error
        beside.chmod(mode)
        _flush(beside)
        os.replace(beside, target)
        with suppress(OSError):  # not every system lets a folder be opened
            _flush(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _mode_for(target: Path, beside: Path) -> int:
    """The mode of the file that is replaced; if there is none, what the user's umask makes of a new file."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    # the system applies the umask: it can be read only by setting it, which other threads would see
    handle = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _open_folder(target: Path) -> tuple[Path, int | None]:
    """A new private folder beside ``target``, and its lock where the system has locks."""
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            folder.mkdir(0o700)
            if fcntl is None:
                return folder, None
            lock = os.open(folder, os.O_RDONLY)
        except (FileExistsError, FileNotFoundError):
            if folder.parent.is_dir():
                continue
            raise
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            # another writer may have taken it for a stale one before it was locked
            if os.path.samestat(os.stat(folder), os.fstat(lock)):
                return folder, lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        os.close(lock)


def _remove_stale(target: Path) -> None:
    """Remove the unfinished files of runs that are no more: nobody holds their lock."""
    for name in glob.glob(os.path.join(glob.escape(str(target.parent)), f".{glob.escape(target.name)}.????????.part")):
        with suppress(OSError):
            if fcntl is None:
                if time.time() - os.stat(name).st_mtime > _STALE:
                    _remove(name)
                continue
            lock = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(name)
            finally:
                os.close(lock)


def _remove(name: str) -> None:
    # older versions of this package left files
    if os.path.isdir(name):
        shutil.rmtree(name, ignore_errors=True)
    else:
        os.unlink(name)


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of names."""
    # Windows flushes only what is open for writing
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _as_os_error(error: Exception, path: str | os.PathLike[str]) -> OSError:
    number = re.search(r"os error (\d+)", str(error))
    reason = f"could not be written ({brief(error)}); make room on the disk, or choose another folder"
    return OSError(int(number[1]) if number else 5, reason, os.fspath(path))


def check_folder(target: Path) -> None:
    """Refuse a folder, and a file in a folder that is not there, before any work is done for it."""
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} into; create it first")


def read(
    path: str | os.PathLike[str], *, kind: str, version: int | Sequence[int], tensors: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Load what `write` saved: ``(tensors, meta)``, tensors on the CPU.

    Args:
        path: The file.
        kind: What it must be.
        version: The schema version it must have, or several of which it must have one; the newest comes first.
        tensors: Names that must be there, and no others; empty: whatever there is.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is broken or truncated, comes from elsewhere, holds another kind, or has
            another schema version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            header = (opened.metadata() or {}).get(_HEADER)
            loaded = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    # a shape that no memory could hold is a RuntimeError, a dtype unknown to this torch an AttributeError
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file ({brief(error)}); it is truncated or of another format: save it "
            "again"
        ) from error
    if header is None:
        raise FileFormatError(
            f"{path} is a safetensors file without a {_HEADER} header; expected a {kind} saved by this package"
        )
    try:
        content = json.loads(header)
        found_kind, found_version, meta = content["kind"], content["version"], content["meta"]
        if not isinstance(found_kind, str) or type(found_version) is not int or not isinstance(meta, dict):
            raise TypeError("kind must be text, version an integer, meta a table")
    # ValueError: also an integer of thousands of digits; RecursionError: brackets in brackets
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path} has a broken {_HEADER} header ({brief(repr(error))}); save it again") from error
    if found_kind != kind:
        other = brief(found_kind, 60)
        raise FileFormatError(f"{path} holds a {other}; expected a {kind}: load it with {other}.load")
    versions = [version] if isinstance(version, int) else list(version)
    if found_version not in versions:
        raise FileFormatError(
            f"{path} has schema version {brief(found_version, 60)} of {kind}; this version of the package reads "
            f"{versions[0]}: save it again with this version, or install the version that wrote it"
        )
    if tensors and set(tensors) != set(loaded):
        raise FileFormatError(f"{path} should hold {sorted(tensors)}, got {brief(sorted(loaded))}; save it again")
    return loaded, meta


@contextmanager
def contents(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Inside, whatever a file's wrong contents make fail becomes a `FileFormatError` of bounded length.

    Args:
        path: The file.
        what: What it should hold, such as ``"a whole table"``.
    """
    try:
        yield
    except FileFormatError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path} does not hold {what} ({brief(repr(error))}); save it again") from error


def text(value: Any, name: str) -> str:
    """``value``, if it is text: what a file's header says."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {brief(repr(value))}")
    return value


def texts(values: Any, name: str) -> tuple[str, ...]:
    """``values``, if they are a list of texts, as a tuple."""
    if not isinstance(values, list):
        raise TypeError(f"{name} must be a list of texts, got {brief(repr(values))}")
    return tuple(text(value, name) for value in values)


def checked_tensor(
    tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype | None, *shape: int
) -> torch.Tensor:
    """A tensor of a file, if it has this dtype and shape; of dtype None it may hold floats of any size.

    Floats must be finite, integers 0 or more.
    """
    values = tensors[name]
    fits = values.is_floating_point() if dtype is None else values.dtype == dtype
    if not fits or tuple(values.shape) != shape:
        kind = "floats" if dtype is None else dtype
        raise ValueError(f"{name} must be {kind} of shape {shape}, got {values.dtype} of {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all() if values.is_floating_point() else (values >= 0).all()):
        raise ValueError(f"{name} holds {'NaN or infinity' if values.is_floating_point() else 'negative numbers'}")
    return values
