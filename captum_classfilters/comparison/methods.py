"""The methods that are compared. They are run with as few passes over the loader as possible.

Methods of weights need no pass, all selectors share one pass, and each attribution takes one. The same pass also makes
a table from half of the samples.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from captum.attr import LayerAttribution
from torch import Tensor, nn

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.comparison.aggregate import Aggregation
from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.feature_map import shows_features
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.core.outputs import innermost
from captum_classfilters.gating import LabelSensitiveGate
from captum_classfilters.influential.running_sums import Options, Tables
from captum_classfilters.influential.selectors import STATIC
from captum_classfilters.splitting import ALDSplitter

# A layer attribution, or a pair of it and options for its `attribute`, such as {"n_steps": 10}
Attribution: TypeAlias = LayerAttribution | tuple[LayerAttribution, Mapping[str, Any]]

# Selectors of InfluentialFeatures that rest on different ideas
SELECTORS = ("histogram", "mean_activation", "contribution", "margin", "weight")
_SELECTOR_META = {"label_source": "target", "correct_only": False}


class Answer(NamedTuple):
    """The result of a method."""

    filters: ClassFilters
    halves: tuple[ClassFilters, ClassFilters] | None  # None: the method looks at no samples, or a half has none
    seconds: float


class Half:
    """About half of a loader's samples, drawn at random, because a loader may be sorted or repeat its classes."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, samples: int, device: torch.device) -> Tensor:
        """Which samples of the next batch are in the half, ``(N,)`` bool."""
        return (torch.rand(samples, generator=self._generator) < 0.5).to(device)


def selector_name(selector: str) -> str:
    """The name of a selector among the methods."""
    return f"InfluentialFeatures, {selector}"


def run_selectors(head_pass: HeadPass, class_names: tuple[str, ...]) -> tuple[dict[str, Answer], float]:
    """Run all selectors in one pass; also return the seconds that the pass takes without them."""
    head = head_pass.head
    options = [Options.checked([name], [None], "abs") for name in SELECTORS]
    whole = {name: Tables(head, option) for name, option in zip(SELECTORS, options, strict=True)}
    part = {name: Tables(head, option) for name, option in zip(SELECTORS, options, strict=True) if name not in STATIC}
    seconds = dict.fromkeys(SELECTORS, 0.0)
    half, apart = Half(), 0.0
    started = clock(head)
    with head_pass.batches(description="compare") as stream:
        for batch in stream:
            begun = clock(head)
            labels: Tensor = batch.labels  # type: ignore[assignment]
            for name, tables in whole.items():
                before = clock(head)
                tables.add(batch.features, batch.logits, labels)
                seconds[name] += clock(head) - before
            chosen = half.draw(len(labels), labels.device)
            if bool(chosen.any()):
                for tables in part.values():
                    tables.add(batch.features[chosen], batch.logits[chosen], labels[chosen])
            apart += clock(head) - begun
    inference = clock(head) - started - apart
    answers = {}
    for name, tables in whole.items():
        table = _only(tables, class_names)
        halves = None
        if name in part:
            first = _only(part[name], class_names)
            halves = (first, table.without(first))
        answers[selector_name(name)] = Answer(table, halves, inference + seconds[name])
    return answers, inference


def _only(tables: Tables, class_names: tuple[str, ...]) -> ClassFilters:
    return next(iter(tables.filters(class_names, _SELECTOR_META).values()))


def run_weights(
    model: Any, head: Head, gate: LabelSensitiveGate | None, class_names: tuple[str, ...]
) -> dict[str, Answer]:
    """Run the methods that read no samples.

    Calculation paths are not compared, because they consist of channels of convolutions and not of the head.
    """
    started = clock(head)
    split = ALDSplitter.of_head(model, head).class_filters(
        class_names=class_names, min_size=max(2, min(20, head.num_features))
    )
    answers = {"ALDSplitter": Answer(split, None, clock(head) - started)}
    if gate is not None:
        started = clock(head)
        # a gate does not know what its layer is called
        table = replace(gate.class_filters(class_names), layer=head.name)
        answers["LabelSensitiveGate"] = Answer(table, None, clock(head) - started)
    return answers


def run_attribution(
    attribution: Attribution, head: Head, loader: Iterable[Any], class_names: tuple[str, ...]
) -> Answer:
    """A Captum attribution in one pass over the loader."""
    of_layer, options = attribution if isinstance(attribution, tuple) else (attribution, {})
    whole = Aggregation(of_layer, classes=class_names, options=options)
    part = Aggregation(of_layer, classes=class_names, options=options)
    half, apart = Half(), 0.0
    started = clock(head)
    with whole.samples(loader) as stream:
        for batch in stream:
            values, labels = whole.attribute(batch)
            whole.add(values, labels, batch.place)
            begun = clock(head)
            chosen = half.draw(len(labels), labels.device)
            if bool(chosen.any()):
                part.add(values[chosen], labels[chosen], batch.place)
            apart += clock(head) - begun
    seconds = clock(head) - started - apart
    # the attribution's layer is the map that the head reads, so its channels are those of the head
    table = replace(whole.table(), layer=head.name)
    if not part.started:
        return Answer(table, None, seconds)
    first = replace(part.table(), layer=head.name)
    return Answer(table, (first, table.without(first)), seconds)


def clock(head: Head) -> float:
    """The time, after a GPU has finished its work."""
    if head.weight.is_cuda:
        torch.cuda.synchronize(head.weight.device)
    return time.perf_counter()


def check_attributions(attributions: Any, taken: Sequence[str], head_pass: HeadPass) -> dict[str, Attribution]:
    """Attributions by name; refuse one of another network, or of a layer whose channels the head does not read.

    One batch is run if a layer is not the map behind the head.
    """
    if attributions is None:
        return {}
    if not isinstance(attributions, Mapping):
        raise OptionError(f"attributions must be given by name, a dict of them; got {type(attributions).__name__}")
    head = head_pass.head
    unproved: dict[str, Any] = {}
    for name, attribution in attributions.items():
        if name in taken:
            raise OptionError(f"attributions may not be named {name!r}, which is taken; give it another name")
        of_layer = attribution[0] if isinstance(attribution, tuple) and attribution else attribution
        if not isinstance(of_layer, LayerAttribution):
            raise OptionError(f"attribution {name!r} must be a Captum layer attribution, got {type(of_layer).__name__}")
        if innermost(of_layer.forward_func) is not innermost(head_pass.model):
            raise ShapeError(f"attribution {name!r} is of another network; make it with the one that is compared")
        if head.feature_map is None or of_layer.layer is not head.feature_map.module:
            unproved[name] = of_layer.layer
    if unproved:
        _check_layers(unproved, head_pass)
    return {str(name): attribution for name, attribution in attributions.items()}


def _check_layers(layers: Mapping[str, Any], head_pass: HeadPass) -> None:
    head, outputs = head_pass.head, {}
    module = innermost(head_pass.model)
    with borrowed(module if isinstance(module, nn.Module) else None) as borrow:
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                borrow.after(layer, lambda module, args, output, name=name: outputs.update({name: output}))
        first = head_pass.over(islice(head_pass.loader, 1))
        with first.batches(need_labels=None) as stream:
            features = next(stream).features
    for name in layers:
        if name not in outputs or not shows_features(outputs[name], features):
            behind = f", {head.feature_map.name!r}" if head.feature_map else ""
            raise ShapeError(
                f"attribution {name!r} is to a layer whose channels are not the {head.num_features} that the head "
                f"{head.name!r} reads; give it the map behind the head{behind}"
            )
