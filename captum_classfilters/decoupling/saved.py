"""What was trained beside a model, in a file and back; and the fingerprint by which paths know their network."""

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_classfilters.core.errors import FileFormatError, ShapeError
from captum_classfilters.core.files import read, write

if TYPE_CHECKING:
    from captum_classfilters.decoupling.decoupler import PathDecoupler

_KIND, _VERSION = "PathDecoupler", 1


def save(decoupler: "PathDecoupler", path: str | os.PathLike[str]) -> None:
    """See `PathDecoupler.save`."""
    meta = {"layers": list(decoupler.layers), "channels": list(decoupler.channels)}
    write(path, decoupler.controllers_state_dict(), kind=_KIND, version=_VERSION, meta=meta)


def load(decoupler: "PathDecoupler", path: str | os.PathLike[str]) -> "PathDecoupler":
    """See `PathDecoupler.load`."""
    tensors, meta = read(path, kind=_KIND, version=_VERSION)
    if meta["layers"] != list(decoupler.layers):
        raise FileFormatError(
            f"{path} holds controllers of {_shown(meta['layers'])}; this decoupler gates {_shown(decoupler.layers)}: "
            "make it from the same kind of network, with the same layers="
        )
    load_controllers(decoupler, tensors)
    return decoupler


def load_controllers(decoupler: "PathDecoupler", state: dict[str, Tensor]) -> None:
    """See `PathDecoupler.load_controllers_state_dict`."""
    own = decoupler.controllers_state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ShapeError(f"expected what controllers_state_dict() gives, tensors by name, got {type(state).__name__}")
    if missing := sorted(own.keys() - state.keys()):
        raise ShapeError(
            f"the state has no {missing[0]}; expected what controllers_state_dict() of such a network gives"
        )
    if unknown := sorted(state.keys() - own.keys()):
        raise ShapeError(f"the state holds {unknown[0]}, which this decoupler has not; it is of other layers")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise ShapeError(
                f"{name} must have shape {tuple(value.shape)}, got {tuple(state[name].shape)}; the state is of another "
                "network, reduction= or number of classes"
            )
    decoupler.load_state_dict(state, strict=False)


def fingerprint(decoupler: "PathDecoupler") -> str:
    """Sixteen hexadecimal digits that two decouplers share if their network, layers and controllers are the same."""
    digest = hashlib.sha256(repr((decoupler.layers, decoupler.channels)).encode())
    for name, value in decoupler.state_dict().items():
        if not name.startswith("readers."):  # these only read
            # numpy knows no bfloat16
            whole = value.detach().cpu().to(torch.promote_types(value.dtype, torch.float32))
            digest.update(whole.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _shown(layers: "list[str] | tuple[str, ...]") -> str:
    return f"{len(layers)} layers from {layers[0]} to {layers[-1]}"
