"""Weights from a file: read without running anything in it, and put into a network whole or not at all."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_classfilters.core.errors import FileFormatError, ShapeError, quoted

# Under which key training scripts keep the network, and what DataParallel and torch.compile put before its names
_INSIDE = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
# A number of outputs that no other dimension of a network has
_PROBE = 1013


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a checkpoint that holds a state dict."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected .safetensors, or a checkpoint of tensors")
    content = _content(path)
    for key in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        what = f"a dict of {quoted(content)}" if isinstance(content, Mapping) else type(content).__name__
        raise FileFormatError(
            f"{path} holds {what}; expected a state dict, plain or under {quoted(_INSIDE)}: save model.state_dict()"
        )
    return _without_prefixes({str(name): tensor for name, tensor in content.items()})


def _content(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except SafetensorError as error:
        raise FileFormatError(f"{path} is not a whole safetensors file ({error}); copy or save it again") from error
    except Exception as error:  # torch.load raises what the content makes it
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(
            f"{path} could not be read as a checkpoint of tensors alone ({first}); save model.state_dict(), or convert "
            "it to .safetensors: whole models run code when they are loaded, which is not done here"
        ) from error


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES * 2:  # both may be there, in either order
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def classes_in(state: Mapping[str, Tensor], make: Callable[[int], nn.Module]) -> int | None:
    """How many classes the head in a file has; None where the file does not have it.

    Args:
        state: The file's tensors.
        make: Makes the network for a number of classes.
    """
    try:
        # on the meta device: shapes without memory
        with torch.device("meta"):
            skeleton = make(_PROBE).state_dict()
    except Exception:  # some networks read numbers while they are made, and there are none on meta
        skeleton = make(_PROBE).state_dict()
    heads = [name for name, tensor in skeleton.items() if tensor.dim() >= 2 and len(tensor) == _PROBE]
    found = {len(state[name]) for name in heads if name in state and state[name].dim() >= 2}
    return found.pop() if len(found) == 1 else None


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load a state dict, all of it.

    Raises:
        ShapeError: Names or shapes do not fit; says which.
    """
    own = model.state_dict()
    odd = [key for key in own if key in state and state[key].shape != own[key].shape]
    found = None if odd else model.load_state_dict(dict(state), strict=False)
    missing = found.missing_keys if found else [key for key in own if key not in state]
    unexpected = found.unexpected_keys if found else [key for key in state if key not in own]
    if not (odd or missing or unexpected):
        return
    shapes = [f"{key}: file {tuple(state[key].shape)}, network {tuple(own[key].shape)}" for key in odd]
    parts = [
        f"{len(keys)} {what} ({'; '.join(keys[:3])}{'; ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    raise ShapeError(
        f"{path} does not fit {name}: {', '.join(parts)}; name the network that these weights were trained in"
    )
