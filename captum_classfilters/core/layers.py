"""Layers by name: the module that a user means, or an error with the names that are near. Nothing here runs a model."""

import difflib
from collections.abc import Callable

from torch import nn

from captum_classfilters.core.errors import ClassFiltersError, LayerError, OptionError

# The name of a model that is its own layer
ITSELF = "the model itself"


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
    by_name: dict[str, nn.Module] = {ITSELF: model, **dict(model.named_modules())}
    if layer not in by_name:
        near = difflib.get_close_matches(layer, by_name, n=3, cutoff=0.5)
        offered = near or [name for name, module in by_name.items() if likely(module)][-6:]
        raise error(f"the model has no layer {layer!r}; did you mean one of {offered}?")
    return by_name[layer]
