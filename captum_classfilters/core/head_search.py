"""Finding the head of a model by value, inside a forward pass that is needed anyway.

`HeadSearch.watch` sets the hooks, `HeadSearch.found` looks at what they saw: which module's output, recomputed from its
input, is what the model returned. A layer that the user names is checked in the same way. `head_pass.py` does both, so
that a loader that can be read only once loses no batch. N samples, K features, C classes.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.core.borrow import Borrowed
from captum_classfilters.core.errors import HeadError
from captum_classfilters.core.feature_map import MapSearch, close
from captum_classfilters.core.head import (
    AuxiliaryHead,
    Head,
    Part,
    affine,
    channels_of,
    find_layer,
    is_candidate,
    is_plain,
    is_quantised,
    pooled,
)
from captum_classfilters.core.layers import named_modules
from captum_classfilters.core.outputs import describe, find_logits
from captum_classfilters.core.wide import wide

# The head is called last or nearly so; of earlier candidates only the names are kept
_RECENT, _RECENT_WRAPPERS = 4, 8
# So many numbers tell a factor between two outputs from a coincidence
_ENOUGH = 6
# What may stand between the head and the model's output without changing the order of the classes
_BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "a softmax": lambda logits: logits.softmax(1),
    "a log-softmax": lambda logits: logits.log_softmax(1),
    "a sigmoid": lambda logits: logits.sigmoid(),
}


class Found(NamedTuple):
    """What the first forward pass gave."""

    head: Head
    features: Tensor  # (N, K)
    logits: Tensor  # (N, C)


class _Call(NamedTuple):
    module: nn.Module
    inputs: Tensor
    output: Tensor
    version: int | None
    position: int  # how many maps were kept before it

    @property
    def features(self) -> Tensor:
        return pooled(self.inputs, self.module)

    @property
    def logits(self) -> Tensor:
        return pooled(self.output, self.module)

    @property
    def is_whole(self) -> bool:
        """Nothing wrote into the output afterwards."""
        return self.version is None or self.output._version == self.version


class _Match(NamedTuple):
    call: _Call
    parts: tuple[Part, ...]


class HeadSearch:
    """Hooks for one forward pass that remember what could be the head and the map behind it."""

    def __init__(self, model: nn.Module | None, layer: nn.Module | str | None) -> None:
        self._model = model
        self._layer = find_layer(model, layer) if layer is not None else None
        self._auxiliary = isinstance(layer, AuxiliaryHead)
        self._names = named_modules(model)
        self._calls: deque[_Call] = deque(maxlen=_RECENT)
        self._wrappers: deque[_Call] = deque(maxlen=_RECENT_WRAPPERS)
        self._named: _Call | None = None
        self._times: Counter[nn.Module] = Counter()
        self._maps = MapSearch()
        self._removers: list[Callable[[], None]] = []

    def watch(self, borrow: Borrowed) -> None:
        """Set the hooks."""
        modules = list(self._model.modules()) if self._model is not None else [self._layer]
        holders = {outer for outer in modules if outer is not None and any(map(is_candidate, outer.modules()))}
        for module in modules:
            if module is None:
                continue
            if module is not self._model:
                self._removers.append(borrow.after(module, self._maps.keep))
            if module in holders and (module is not self._model or is_candidate(module) or module is self._layer):
                self._removers.append(borrow.after(module, self._keep))

    def found(self, output: Any) -> Found:
        """What was found, given the model's ``output``; the hooks are gone afterwards.

        Raises:
            HeadError: There is no head, or more than one reading of it; names the candidates.
        """
        for remove in self._removers:
            remove()
        match = self._search(output) if self._layer is None else self._given(self._layer, output)
        call = match.call
        features = call.features
        inside = [inner for part in match.parts for inner in part.module.modules()]
        behind, reason = self._maps.found(features, call.position, inside, self._name)
        names = self._names.get(call.module, [type(call.module).__name__])
        one_logit = call.logits.shape[1] == 1
        parts = tuple(Part(part.module, part.factor, self._name(part.module)) for part in match.parts)
        if len(parts) == 1 and parts[0].factor == 1:
            parts = ()
        head = Head(
            names[0], call.module, behind, reason, parts, int(features.shape[1]), one_logit, self._auxiliary,
            tuple(names),
        )  # fmt: skip
        logits = head.logits(features, call.output)
        self._calls.clear()
        self._wrappers.clear()
        self._named, self._maps = None, MapSearch()
        return Found(head, features, logits)

    # -- what the hooks keep ---------------------------------------------------------------------------------------

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        self._times[module] += 1
        if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            return
        version = None if output.is_inference() else output._version
        call = _Call(module, args[0], output, version, len(self._maps))
        if module is self._layer:
            self._named = call
        if is_plain(module):
            self._calls.append(call)
        elif is_candidate(module) or (output.dim() == 2 and args[0].dim() == 2):
            self._wrappers.append(call)

    # -- which of the candidates it is -----------------------------------------------------------------------------

    def _search(self, output: Any) -> _Match:
        logits = find_logits(output)
        if not _could_be_logits(logits):
            raise self._error(f"expected a model that returns floating logits (N, C), got {describe(output)}")
        flat: Tensor = logits.flatten(1)  # type: ignore[union-attr]
        match = next(self._matches(flat, [*self._calls][::-1], self._wrappers), None)
        if match is None:
            raise self._error(self._why_not(flat))
        for part in match.parts:
            if self._times[part.module] > 1:
                raise self._error(
                    f"{self._name(part.module)} is called {self._times[part.module]} times in one forward pass, so its "
                    "input is not one set of features"
                )
        if sharers := self._sharers(match.call.module):
            raise self._error(f"the head's weight is shared by {', '.join(sharers)}")
        return match

    def _matches(self, output: Tensor, calls: Iterable[_Call], wrappers: Iterable[_Call]) -> Iterator[_Match]:
        """All readings of the model's output, the plainest first."""
        plain, linear = list(calls), [call for call in wrappers if call.is_whole and _fits(call, output)]
        for call in plain:
            if _is(call, output):
                yield _Match(call, (Part(call.module, 1.0),))
        for call in linear:
            if close(*_lowest(call.logits, output, call)) and _is_linear(call):
                yield _Match(call, (Part(call.module, 1.0),))
        for call in plain:
            if (factor := _factor(call, output)) is not None:
                yield _Match(call, (Part(call.module, factor),))
        yield from _combined(plain, output)
        for call in [*plain, *linear]:
            for function in _BEHIND.values():
                if _is(call, output, function):
                    yield _Match(call, (Part(call.module, 1.0),))

    def _given(self, layer: nn.Module, output: Any) -> _Match:
        name, call = self._name(layer), self._named
        if self._times[layer] == 1 and call is None:
            raise self._error(
                f"layer {name} must be called with its input by position, as self.fc(x), and give a tensor"
            )
        if self._times[layer] != 1 or call is None:
            raise self._error(f"layer {name} must run once in a forward pass; it ran {self._times[layer]} times")
        if not call.is_whole:
            raise self._error(
                f"an activation stands between {name} and the model's output: what layer {name} gave was changed in "
                "place afterwards"
            )
        if not (_recomputed(call) if is_plain(layer) else _is_linear(call)):
            raise self._error(
                f"layer {name}, {type(layer).__name__}, is no linear function of its input, so its channels do not add "
                "up to its output; a cosine or normalised head is none"
            )
        if self._auxiliary:
            return _Match(call, (Part(layer, 1.0),))
        mine: tuple[list[_Call], list[_Call]] = ([call], []) if is_plain(layer) else ([], [call])
        logits = find_logits(output)
        for position, tensor in enumerate(_tensors(output)):
            match = next(self._matches(tensor.flatten(1), *mine), None)
            match = match or self._averaged_with(call, tensor.flatten(1))
            if match is None:
                continue
            # the first of several outputs are the logits, unless no layer makes them
            others = [other for other in self._calls if other.module is not layer]
            first = None if logits is None or not _could_be_logits(logits) else logits.flatten(1)
            if position > 0 and first is not None and next(self._matches(first, others, []), None) is not None:
                break
            return match
        returned = describe(output) if logits is None else f"logits of shape {tuple(logits.shape)}"
        right = None
        if logits is not None and _could_be_logits(logits):
            right = next(self._matches(logits.flatten(1), [*self._calls][::-1], self._wrappers), None)
        made_by = f"; the logits are made by {self._name(right.call.module)!r}: name that one" if right else ""
        raise self._error(
            f"layer {name} gives {tuple(call.output.shape)}, which is not what the model returns "
            f"({returned}){made_by}. To look at this output on purpose, as an auxiliary head, pass "
            f"layer=AuxiliaryHead({name!r})"
        )

    def _averaged_with(self, call: _Call, output: Tensor) -> _Match | None:
        others = [other for other in self._calls if other.module is not call.module]
        return next((match for match in _combined([call, *others], output)), None)

    def _sharers(self, module: nn.Module) -> list[str]:
        """Other modules with the same weight; other names of the module itself are no others."""
        if self._model is None or not is_candidate(module):
            return []
        others = [
            names[0]
            for other, names in self._names.items()
            if other is not module and any(p is module.weight for p in other.parameters(recurse=False))
        ]
        return [self._name(module), *others] if others else []

    def _why_not(self, output: Tensor) -> str:
        # by name: this floor knows nothing of smaller heads
        if any(type(module).__name__ == "DecomposedLinear" for module in self._names):
            return "its head has been decomposed; use the network it was made from, or decompose(..., backend='dense')"
        if any(map(is_quantised, self._names)):
            return "the network is quantised, its weights cannot be read; use the network before quantisation"
        ran = [module for module in self._times if is_candidate(module)]
        if not ran:
            return "no nn.Linear or 1x1 convolution ran in the forward pass"
        for call in self._wrappers:
            if _fits(call, output) and close(*_lowest(call.logits, output, call)):
                return (
                    f"{self._name(call.module)}, {type(call.module).__name__}, makes the model's output and is no "
                    "linear function of its input, so channels do not add up to logits; a cosine or normalised head "
                    "is none"
                )
        if output.shape[1] > 1:
            total = wide(output).sum(1)
            if bool((output >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3):
                return "the model's output is probabilities that no layer with a softmax behind it gives"
        for call in self._calls:
            behind = call.logits.relu()
            if behind.shape == output.shape and close(*_lowest(behind, output, call)):
                return f"an activation stands between {self._name(call.module)} and the model's output"
        return "the model's output is not the output of an nn.Linear or of a 1x1 convolution"

    def _error(self, reason: str) -> HeadError:
        ran = [module for module in self._times if is_candidate(module)]
        candidates = [f"{self._name(m)} ({m.weight.shape[1]} -> {m.weight.shape[0]})" for m in ran[-6:]]
        which = f"candidates: {', '.join(candidates)}" if candidates else "there is no candidate"
        remedy = (
            ""
            if self._layer is not None
            else ". Pass layer= with the name of the layer that makes the logits. For a network without a linear head "
            "(regression, detection, segmentation) aggregate(LayerActivation(model, layer), loader) scores the "
            "channels of any layer"
        )
        return HeadError(f"could not find the classifier head: {reason}; {which}{remedy}")

    def _name(self, module: nn.Module) -> str:
        return self._names.get(module, [type(module).__name__])[0]


def _could_be_logits(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1


def _tensors(output: Any) -> list[Tensor]:
    """Floating tensors among what a model returned, the logits first."""
    first = find_logits(output)
    values: Iterable[Any] = ()
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, list | tuple):
        values = output
    others = [value for value in values if value is not first]
    return [value for value in (first, *others) if _could_be_logits(value)]


def _fits(call: _Call, output: Tensor) -> bool:
    return call.logits.shape == output.shape


def _lowest(a: Tensor, b: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Both in the lowest precision on the way, so that they are compared with its rounding."""
    weights = [p.dtype for p in call.module.parameters() if p.is_floating_point()]
    kinds = (a.dtype, b.dtype, call.inputs.dtype, call.output.dtype, *weights)
    lowest = min((kind for kind in kinds if kind.is_floating_point), key=lambda kind: torch.finfo(kind).bits)
    return a.to(lowest), b.to(lowest)


def _is(call: _Call, output: Tensor, function: Callable[[Tensor], Tensor] = lambda logits: logits) -> bool:
    """Is the model's output this function of the call's output, and this its linear function of its input?"""
    if not (call.is_whole and _fits(call, output)):
        return False
    if not close(*_lowest(function(call.logits.float()), output, call)):
        return False
    return _recomputed(call) if is_plain(call.module) else _is_linear(call)


def _recomputed(call: _Call) -> bool:
    weight, bias = affine(call.module, int(call.features.shape[1]))
    if weight.shape[1] != call.features.shape[1]:
        return False
    again = F.linear(call.features.to(weight.dtype), weight, bias)
    return close(*_lowest(again, call.logits, call))


def _is_linear(call: _Call) -> bool:
    """Is what a wrapper gave the linear function that its answers to unit vectors say?"""
    if channels_of(call.module) != call.features.shape[1]:
        return False
    try:
        return _recomputed(call)
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes no matrix of unit vectors
        return False


def _place(call: _Call) -> int:
    return call.position


def _factor(call: _Call, output: Tensor) -> float | None:
    """The number by which the output is a multiple of this call's: a temperature."""
    if not (call.is_whole and _fits(call, output)) or output.numel() < _ENOUGH:
        return None
    a, b = wide(call.logits), wide(output)
    square = float((a * a).sum())
    factor = float((a * b).sum()) / square if square > 0 else 0.0
    if factor <= 0 or not close(*_lowest((a * factor).to(call.output.dtype), output, call)):
        return None
    return factor if _recomputed(call) else None


def _combined(calls: list[_Call], output: Tensor) -> Iterator[_Match]:
    """Heads that read the same features and are averaged, or added."""
    fitting = [call for call in calls if call.is_whole and _fits(call, output)]
    for call in fitting:
        same = [other for other in fitting if other.features.shape == call.features.shape]
        same = [other for other in same if other is call or close(other.features, call.features)]
        if len(same) < 2 or output.numel() < _ENOUGH:
            continue
        total = torch.stack([other.logits.float() for other in same]).sum(0)
        for factor in (1 / len(same), 1.0):
            if close(*_lowest(total * factor, output, call)) and all(map(_recomputed, same)):
                first = min(same, key=_place)
                yield _Match(first, tuple(Part(other.module, factor) for other in sorted(same, key=_place)))
