"""Which convolutions can be gated, and where their channels are multiplied: on the norm that follows, if one does.

Masking before a batch norm would not zero a channel but give it the norm's constant.
"""

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from captum_classfilters.core.errors import LayerError, UngatedLayerWarning
from captum_classfilters.decoupling.calls import CONVS, GLOBAL_POOL, Call, Calls, calls_of

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ADDITIONS = ("add", "iadd")


class Unit(NamedTuple):
    """A convolution whose channels are gated, and the module whose output is multiplied."""

    conv: str
    site: str


def find_units(
    model: nn.Module, layers: Iterable[nn.Module | str] | None = None, calls: Calls | None = None
) -> tuple[Unit, ...]:
    """The gated units of ``model``, in the order in which they run.

    Source: "Interpretable neural network decoupling", section 4.1: all convolutions but the first and the last.
    Differs: 1x1 convolutions of a shortcut and those of a squeeze-and-excitation are left out as well.

    Args:
        model: Any; it is given back as it was.
        layers: Names or modules of the convolutions to gate; None: as said above.
        calls: What runs, if known.

    Raises:
        LayerError: There is no convolution to gate, one that is asked for does not exist, is none, does not run, or is
            used in a way that masking cannot follow.
    """
    found = calls or calls_of(model)
    convs = {call.module: call for call in found.calls if call.op == "conv"}
    if layers is not None:
        names = [_name_of(model, layer) for layer in _listed(layers)]
        for name in names:
            _check_runs(model, name, convs)
            if reason := _trouble(found, convs[name]):
                raise LayerError(f"{name} cannot be gated: {reason}; leave it out of layers=")
        chosen = [name for name in convs if name in names]
    else:
        ordered = [name for name, call in convs.items() if not _is_aside(model, found, call)]
        chosen = [name for name in ordered[1:-1] if not _warned(found, convs[name])]
    if not chosen:
        raise LayerError(
            f"{type(model).__name__} has {len(convs)} convolutions that run as modules, and none to gate after the "
            "first and the last; name some with layers="
            if layers is None
            else "layers= is empty; name at least one convolution, or leave layers= away"
        )
    return tuple(Unit(name, _site(found, convs[name])) for name in chosen)


def _listed(layers: Any) -> list[Any]:
    if isinstance(layers, str | nn.Module) or not isinstance(layers, Iterable):
        raise LayerError(f"layers must be a list of names or modules, got {type(layers).__name__}; put it in a list")
    return list(layers)


def _name_of(model: nn.Module, layer: nn.Module | str) -> str:
    if isinstance(layer, nn.Module):
        names: list[str] = [name for name, module in model.named_modules() if module is layer]
        if not names:
            raise LayerError(f"the {type(layer).__name__} in layers= is not a part of {type(model).__name__}")
        return names[0]
    if not isinstance(layer, str):
        raise LayerError(f"layers must be names or modules, got {layer!r}")
    # the decoupler's own modules are named so
    return layer if _has(model, layer) else layer.removeprefix("model.")


def _has(model: nn.Module, name: str) -> bool:
    return any(name == known for known, _ in model.named_modules())


def _check_runs(model: nn.Module, name: str, convs: dict[str, Call]) -> None:
    if name in convs:
        return
    if not _has(model, name):
        some = ", ".join(list(convs)[:5])
        raise LayerError(
            f"there is no layer {name!r}; the convolutions that run are {some}{', ...' * (len(convs) > 5)}"
        )
    module = model.get_submodule(name)
    if isinstance(module, _TRANSPOSED):
        raise LayerError(f"{name} is a {type(module).__name__}; only Conv1d, Conv2d and Conv3d can be gated")
    if not isinstance(module, CONVS):
        raise LayerError(f"{name} is a {type(module).__name__}, not a convolution; name a Conv1d, Conv2d or Conv3d")
    raise LayerError(
        f"{name} does not run as a module in the forward of {type(model).__name__} (in eval mode); leave it out"
    )


def _trouble(found: Calls, conv: Call) -> str:
    """Why masking cannot follow this convolution; empty if it can."""
    if (times := _times(found, conv.module)) > 1:
        return f"it runs {times} times in one forward, and a gate is for one"
    users = found.users(conv.output)
    for user in users:
        if user.op.endswith("norm") and not user.module:
            return f"its output goes into the function {user.op}, which would give a closed channel a constant"
        if len(users) == 1 and user.op == "norm" and (times := _times(found, user.module)) > 1:
            return f"the norm that follows, {user.module}, runs {times} times in one forward"
    return ""


def _times(found: Calls, module: str) -> int:
    return Counter(call.module for call in found.calls)[module]


def _warned(found: Calls, conv: Call) -> bool:
    reason = _trouble(found, conv)
    if reason:
        warnings.warn(f"{conv.module} is not gated: {reason}", UngatedLayerWarning, stacklevel=4)
    return bool(reason)


def _site(found: Calls, conv: Call) -> str:
    return (_following_norm(found, conv) or conv).module


def _following_norm(found: Calls, conv: Call) -> Call | None:
    """The norm that takes this output, if nothing else does."""
    users = found.users(conv.output)
    alone = len(users) == 1 and conv.output not in found.returned
    return users[0] if alone and users[0].op == "norm" else None


def _is_aside(model: nn.Module, found: Calls, conv: Call) -> bool:
    """A 1x1 convolution of a shortcut, or one that sees an image already pooled to one position."""
    return _is_shortcut(model, found, conv) or _is_squeezed(found, conv)


def _is_shortcut(model: nn.Module, found: Calls, conv: Call) -> bool:
    kernel = model.get_submodule(conv.module).kernel_size
    end = _following_norm(found, conv) or conv
    users = found.users(end.output)
    made_by = {call.output: call for call in found.calls}
    source = conv.inputs[0]
    while source in made_by and "avgpool" in made_by[source].op:  # as in ResNet-D
        source = made_by[source].inputs[0]
    shared = len(found.users(source)) > 1
    return all(size == 1 for size in kernel) and shared and any(user.op in _ADDITIONS for user in users)  # type: ignore[union-attr]


def _is_squeezed(found: Calls, conv: Call) -> bool:
    made_by = {call.output: call for call in found.calls}
    sources = list(conv.inputs)
    while sources:
        calls = [made_by[source] for source in sources if source in made_by]
        if len(calls) != len(sources):
            return False  # the model's own input
        if all(call.op == GLOBAL_POOL for call in calls):
            return True
        if len(calls) != 1:
            return False
        sources = list(calls[0].inputs)
    return False
