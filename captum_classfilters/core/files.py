"""Safetensors with a JSON header, written beside and renamed: nothing runs on load, nothing is half written.

One file holds the tensors and, in the header, what they are: ``kind``, ``version`` and ``meta``.
What the tensors of a kind mean is known where that kind is saved.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from captum_classfilters.core.errors import FileFormatError

_HEADER = "captum_classfilters"


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

    Raises:
        FileNotFoundError: There is no such folder.
    """
    target = Path(path)
    check_folder(target)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        # mkstemp makes the file private; a saved table is as readable as any other file of the user's
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


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
            found_tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(
            f"{path} is not a whole safetensors file ({error}); it is truncated or of another format: save it again"
        ) from error
    if header is None:
        raise FileFormatError(
            f"{path} is a safetensors file without a {_HEADER} header; expected a {kind} saved by this package"
        )
    try:
        content = json.loads(header)
        found, found_version, meta = content["kind"], content["version"], content["meta"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise FileFormatError(f"{path} has a broken {_HEADER} header ({error!r}); save it again") from error
    if found != kind:
        raise FileFormatError(f"{path} holds a {found}; expected a {kind}: load it with {found}.load")
    versions = [version] if isinstance(version, int) else list(version)
    if found_version not in versions:
        raise FileFormatError(
            f"{path} has schema version {found_version} of {kind}; this version of the package reads {versions[0]}: "
            "save it again with this version, or install the version that wrote it"
        )
    if tensors and set(tensors) != set(found_tensors):
        raise FileFormatError(f"{path} should hold {sorted(tensors)}, got {sorted(found_tensors)}; save it again")
    return found_tensors, meta
