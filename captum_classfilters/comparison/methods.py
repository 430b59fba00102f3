"""The methods that are compared: each a function from a loader to a table of the head's input channels.

Weights only, one pass, or a gate that was trained: what they have in common is the answer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeAlias

from captum.attr import LayerAttribution
from torch import nn

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.comparison.aggregate import aggregate
from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head import Head, shows_features
from captum_classfilters.core.head_pass import batches
from captum_classfilters.gating import LabelSensitiveGate
from captum_classfilters.influential import InfluentialFeatures
from captum_classfilters.splitting import ALDSplitter

Method = Callable[[Iterable[Any]], ClassFilters]
# Alone, or with what `aggregate` passes on to it, such as {"n_steps": 10}
Attribution: TypeAlias = LayerAttribution | tuple[LayerAttribution, Mapping[str, Any]]

# Of InfluentialFeatures: one for each idea
SELECTORS = ("histogram", "mean_activation", "contribution", "margin", "weight")


def known_methods(
    model: Any,
    head: Head,
    gate: LabelSensitiveGate | None,
    attributions: Mapping[str, Attribution],
    class_names: Sequence[str] | None,
) -> dict[str, Method]:
    """Every method by name, that of weights first.

    A decoupled network's paths are of its convolutions' channels, not of the head's: they are in no row; the network
    itself may be the model.
    """
    layer = head.module

    def selected(selector: str) -> Method:
        return lambda loader: InfluentialFeatures(model, layer).attribute(
            loader, selector=selector, class_names=class_names
        )

    def summed(given: Attribution) -> Method:
        attribution, options = given if isinstance(given, tuple) else (given, {})
        # its own layer is the map that the head reads: the same channels by another name
        return lambda loader: replace(aggregate(attribution, loader, classes=class_names, **options), layer=head.name)

    methods: dict[str, Method] = {
        "ALDSplitter": lambda loader: ALDSplitter(model, layer).class_filters(
            class_names=class_names, min_size=max(2, min(20, head.num_features))
        )
    }
    methods |= {f"InfluentialFeatures, {selector}": selected(selector) for selector in SELECTORS}
    if gate is not None:
        # a gate does not know what its layer is called
        methods["LabelSensitiveGate"] = lambda loader: replace(gate.class_filters(class_names), layer=head.name)
    for name, attribution in attributions.items():
        if name in methods or name == "random":
            raise OptionError(f"attributions may not be named {name!r}, which is taken; give it another name")
        methods[str(name)] = summed(attribution)
    return methods


def check_attribution(name: str, given: Any, model: Any, head: Head, loader: Iterable[Any]) -> None:
    """Refuse an attribution of another network, or to a layer whose channels are not those that the head reads."""
    attribution = given[0] if isinstance(given, tuple) and given else given
    if not isinstance(attribution, LayerAttribution):
        raise OptionError(f"attribution {name!r} must be a Captum layer attribution, got {type(attribution).__name__}")
    if unwrap(attribution.forward_func) is not unwrap(model):
        raise ShapeError(f"attribution {name!r} is of another network; make it with the one that is compared")
    layer, behind = attribution.layer, head.feature_map
    if behind is not None and layer is behind.module:
        return
    seen: list[Any] = []
    inner = unwrap(model)
    with borrowed(inner if isinstance(inner, nn.Module) else None) as borrow:
        if isinstance(layer, nn.Module):
            borrow.after(layer, lambda module, args, output: seen.append(output))
        with batches(model, islice(loader, 1), layer=head.module, need_labels=False) as stream:
            features = next(iter(stream)).features
    if not seen or not shows_features(seen[-1], features):
        raise ShapeError(
            f"attribution {name!r} is to a layer whose channels are not the {head.num_features} that the head "
            f"{head.name!r} reads; give it the map behind the head" + (f", {behind.name!r}" if behind else "")
        )
