"""Finding the head of a model by value, inside a forward pass that is needed anyway.

`HeadSearch.watch` sets the hooks, `HeadSearch.found` looks at what they saw: which module's output, recomputed from its
input, is what the model returned. A layer that the user names is checked in the same way. `head_pass.py` does both, so
that a loader that can be read only once loses no batch. N samples, K features, C classes.
"""

from collections import Counter
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
    could_be_linear,
    find_layer,
    forget,
    is_candidate,
    is_plain,
    is_quantised,
    pooled,
)
from captum_classfilters.core.layers import named_modules
from captum_classfilters.core.outputs import describe, find_logits
from captum_classfilters.core.wide import wide

# The head is called last or nearly so; of earlier candidates only the names are kept. Of those that give vectors, which
# are small, more are kept: an average may have many heads
_RECENT, _RECENT_VECTORS = 4, 32
# So many numbers more than unknowns tell an equation from a coincidence
_ENOUGH = 3


def _itself(logits: Tensor) -> Tensor:
    return logits


# What may stand between the head and the model's output without changing the order of the classes; and its inverse
_BEHIND: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "nothing": (_itself, _itself),
    "a softmax": (lambda logits: logits.softmax(1), lambda output: output.log()),
    "a log-softmax": (lambda logits: logits.log_softmax(1), _itself),
    "a sigmoid": (lambda logits: logits.sigmoid(), lambda output: output.logit()),
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
    offset: tuple[float, ...] = ()
    logits: Any = None  # what they make, where it was solved for


class HeadSearch:
    """Hooks for one forward pass that remember what could be the head and the map behind it."""

    def __init__(self, model: nn.Module | None, layer: nn.Module | str | None) -> None:
        self._model = model
        self._layer = find_layer(model, layer) if layer is not None else None
        self._auxiliary = isinstance(layer, AuxiliaryHead)
        self._names = named_modules(model)
        self._calls: list[_Call] = []  # of layers that compute what their class computes
        self._wrappers: list[_Call] = []  # of other modules that make a vector of a vector
        self._named: _Call | None = None
        self._times: Counter[nn.Module] = Counter()
        self._maps = MapSearch()
        self._removers: list[Callable[[], None]] = []

    def watch(self, borrow: Borrowed) -> None:
        """Set the hooks."""
        modules = list(self._model.modules()) if self._model is not None else [self._layer]
        holders = {outer for outer in modules if outer is not None and could_be_linear(outer)}
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
            tuple(names), match.offset,
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
        is_vector = output.dim() == 2 and args[0].dim() == 2
        if not (is_candidate(module) or is_vector):
            return
        calls = self._calls if is_plain(module) else self._wrappers
        for place, before in enumerate(calls):
            if before.module is module and before.is_whole and _same_call(before, call):
                # once more for the same features, as behind several dropouts
                self._times[module] -= 1
                del calls[place]
                break
        calls.append(call)
        alike = [place for place, other in enumerate(calls) if (other.output.dim() == 2) == (output.dim() == 2)]
        if len(alike) > (_RECENT_VECTORS if output.dim() == 2 else _RECENT):
            del calls[alike[0]]

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
        for call in [*plain, *linear]:
            for function, _ in _BEHIND.values():
                if _is(call, output, function):
                    yield _Match(call, (Part(call.module, 1.0),))
        yield from _mixed([*plain, *linear], output)

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
        matches = _mixed([*self._calls, *self._wrappers], output)
        return next((match for match in matches if any(part.module is call.module for part in match.parts)), None)

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
        for call in self._wrappers:
            if _fits(call, output) and close(*_lowest(call.logits, output, call)):
                return (
                    f"{self._name(call.module)}, {type(call.module).__name__}, makes the model's output and is no "
                    "linear function of its input, so channels do not add up to logits; a cosine or normalised head "
                    "is none"
                )
        if not any(map(is_candidate, self._times)):
            return "no nn.Linear or 1x1 convolution ran in the forward pass"
        for call in self._calls:
            name = self._name(call.module)
            if self._times[call.module] > 1 and _fits(call, output):
                return (
                    f"{name} is called {self._times[call.module]} times in one forward pass, so its input is not one "
                    "set of features"
                )
            if call.logits.shape[0] == len(output) > 2 and _is_selected(call.logits, output):
                return f"the model leaves classes of {name} out, or gives them in another order"
        fitting = [call for call in self._calls if call.is_whole and _fits(call, output)]
        if len(fitting) > 1:
            total_of_all = torch.stack([call.logits.float() for call in fitting]).sum(0)
            if any(close(*_lowest(total_of_all * factor, output, fitting[0])) for factor in (1.0, 1 / len(fitting))):
                names = " and ".join(self._name(call.module) for call in fitting)
                return f"the model averages {names}, which read different features, so there is no one set of features"
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
        once = [module for module in ran if self._times[module] == 1]
        remedy = ""
        if self._layer is None and once:
            remedy = (
                f". To look at what one of them gives itself, pass layer=AuxiliaryHead({self._name(once[-1])!r}), or "
                "another of these names"
            )
        if self._layer is None:
            remedy += (
                ". For a network without a linear head (regression, detection, segmentation) "
                "aggregate(LayerActivation(model, layer), loader) scores the channels of any layer"
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


def _is_selected(logits: Tensor, output: Tensor) -> bool:
    """Is each column of the output one of the logits' columns?"""
    if output.shape[1] * logits.shape[1] > 2**22:
        return False  # too many to compare
    if output.shape == logits.shape and close(output, logits):
        return False
    nearest = (output[:8, :, None].float() - logits[:8, None, :].float()).abs().amax(0).min(1)
    return bool((nearest.values <= 1e-3 * float(logits.abs().max())).all())


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
    return _explained(call)


def _same_call(one: _Call, other: _Call) -> bool:
    return one.inputs is other.inputs or torch.equal(one.inputs, other.inputs)


def _explained(call: _Call) -> bool:
    return _recomputed(call) if is_plain(call.module) else _is_linear(call)


def _recomputed(call: _Call) -> bool:
    weight, bias = affine(call.module, int(call.features.shape[1]))
    if weight.shape[1] != call.features.shape[1]:
        return False
    again = F.linear(call.features.to(weight.dtype), weight, bias)
    return close(*_lowest(again, call.logits, call))


def _is_linear(call: _Call) -> bool:
    """Is what a module gave the linear function that its answers to unit vectors say?"""
    try:
        forget(call.module)
        return _recomputed(call)
    except (RuntimeError, TypeError, ValueError, IndexError, StopIteration):  # it takes no matrix of unit vectors
        return False


def _mixed(calls: list[_Call], output: Tensor) -> Iterator[_Match]:
    """Readings of the output as a sum of what these gave for the same features, each times a factor, plus an offset.

    So do averaged heads, temperatures, and logits adjusted by the classes' frequencies.
    """
    whole = [call for call in calls if call.is_whole and _fits(call, output)]
    # a module inside another one is part of what that one gives
    inside = {inner for call in whole for inner in call.module.modules() if inner is not call.module}
    groups = [[call] for call in whole]
    for call in whole:
        same = [other for other in whole if other.module not in inside and _same_features(other, call)]
        if len(same) > 1 and same not in groups:
            groups.append(same)
    for function, inverse in _BEHIND.values():
        target = inverse(output.detach().cpu().double())
        for group in groups:
            for with_offset in (False, True):
                match = _solved(group, target, with_offset, function is not _itself)
                if match is not None and close(*_lowest(function(match.logits), output.cpu(), group[0])):
                    kept = [call for call in group if any(part.module is call.module for part in match.parts)]
                    if all(map(_explained, kept)):
                        yield match._replace(call=min(kept, key=lambda call: call.position))


def _solved(group: list[_Call], target: Tensor, with_offset: bool, any_level: bool) -> _Match | None:
    """The factors of the calls that make the target, by least squares; None where there are too few numbers to tell.

    Args:
        group: The calls.
        target: What their sum is to be.
        with_offset: It may differ by a number for each class.
        any_level: It may differ by a number for each sample, as in front of a softmax.
    """
    samples, classes = target.shape
    free = target.numel() - len(group) - (classes if with_offset else 0) - (samples if any_level else 0)
    if free < _ENOUGH:
        return None
    # on the CPU: some devices have no float64
    values = torch.stack([call.logits.detach().cpu().double() for call in group])
    axes = [axis for axis, centred in ((0, with_offset), (1, any_level and classes > 1)) if centred]
    inner, wanted = values, target
    for axis in axes:
        inner, wanted = inner - inner.mean(axis + 1, keepdim=True), wanted - wanted.mean(axis, keepdim=True)
    scale = float(inner.abs().max())
    if not scale or not bool(torch.isfinite(inner).all() and torch.isfinite(wanted).all()):
        return None
    matrix = inner.flatten(1).T
    factors = torch.linalg.lstsq(matrix, wanted.reshape(-1, 1), driver="gelsd").solution[:, 0]
    # an average of n, or a sum, has been computed in the model's precision: take what was meant
    for meant in (1.0, 1 / len(group)):
        factors = torch.where((factors - meant).abs() < 1e-3 * meant, torch.full_like(factors, meant), factors)
    factors[factors.abs() < 1e-3 * factors.abs().max()] = 0
    if not close(*_lowest(matrix @ factors, wanted.flatten(), group[0])) or not factors.any():
        return None
    total = (values * factors[:, None, None]).sum(0)
    offset = (target - total).mean(0) if with_offset else None
    if offset is not None and any_level and classes > 1:
        offset = offset - offset.mean()  # a softmax does not tell it
    parts = tuple(Part(call.module, float(factor)) for call, factor in zip(group, factors, strict=True) if factor)
    sums = total if offset is None else total + offset
    return _Match(group[0], parts, () if offset is None else tuple(offset.tolist()), sums)


def _same_features(one: _Call, other: _Call) -> bool:
    return one is other or (one.features.shape == other.features.shape and close(one.features, other.features))
