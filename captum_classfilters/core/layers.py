"""Layers by name: the module that a user means, or an error with the names that are near. Nothing here runs a model."""

import difflib
from collections.abc import Callable

from torch import nn

from captum_classfilters.core.errors import ClassFiltersError, LayerError, OptionError

# The name of a model that is its own layer
ITSELF = "the model itself"


# Modules that wrap a model: the model inside goes by the names that it has by itself
_WRAPPERS = ("AveragedModel", "DataParallel", "DistributedDataParallel", "OptimizedModule", "_FabricModule")


def named_modules(model: nn.Module | None) -> dict[nn.Module, list[str]]:
    """All modules with all their names; the first is the one that a model has without what wraps it.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> named_modules(nn.ModuleDict({"a": linear, "b": linear}))[linear]
        ['a', 'b']
    """
    names: dict[nn.Module, list[str]] = {}
    if model is None:
        return names
    inside = model
    while type(inside).__name__ in _WRAPPERS and len(children := list(inside.children())) > 0:
        inside = children[0]
    for name, module in inside.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name or ITSELF)
    if inside is not model:
        for name, module in model.named_modules(remove_duplicate=False):
            if name not in (known := names.setdefault(module, [])):
                known.append(name or ITSELF)
    return names


def find_module(
    model: nn.Module | None,
    layer: nn.Module | str,
    *,
    error: type[ClassFiltersError] = LayerError,
    likely: Callable[[nn.Module], bool] = lambda module: True,
) -> nn.Module:
    """The module that ``layer`` is or names, checked to be one of the model's.

    Args:
        model: The model; None for a bare function, whose layers nobody knows.
        layer: A module, or a dotted name as in ``model.named_modules()``.
        error: What is raised.
        likely: Of which modules names are offered where none is near.
    """
    if isinstance(layer, nn.Module):
        if model is not None and all(layer is not inner for inner in model.modules()):
            raise error(f"layer {type(layer).__name__} is not a module of this model; pass one that is, or its name")
        return layer
    if not isinstance(layer, str):
        raise OptionError(f"layer must be a module or its dotted name, got {type(layer).__name__}")
    if model is None:
        raise error(f"layer={layer!r} is a name, but the model is a bare function: pass the module itself")
    layer = layer or ITSELF
    by_name = {name: module for module, names in named_modules(model).items() for name in names}
    if layer not in by_name:
        near = difflib.get_close_matches(layer, by_name, n=3, cutoff=0.5)
        offered = near or [name for name, module in by_name.items() if likely(module)][-6:]
        raise error(f"the model has no layer {layer!r}; did you mean one of {offered}?")
    return by_name[layer]
