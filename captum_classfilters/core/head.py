"""The classifier head of a model, its input features, and the feature map behind them.

A head is the ``nn.Linear`` (or 1x1 convolution) whose output is the model's output. It is found inside a forward
pass that is needed anyway, so that a loader which can be read only once loses no batch: `HeadSearch.watch` sets the
hooks, `HeadSearch.found` looks at what they saw. `head_pass.py` does both.
N samples, K features, C classes, h x w positions.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.core.borrow import Borrowed
from captum_classfilters.core.calls import CONVS
from captum_classfilters.core.errors import HeadError
from captum_classfilters.core.feature_map import FeatureMap, MapSearch, close, has_matrix
from captum_classfilters.core.layers import ITSELF, find_module
from captum_classfilters.core.outputs import describe, find_logits

# What a head can be
Candidate: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

# The head is called last or nearly so; of earlier candidates only the names are kept
_RECENT = 4


@dataclass(frozen=True)
class Head:
    """``logits = features @ weight.T + bias``; weight ``(C, K)``, bias ``(C,)``, read when asked for."""

    name: str
    module: Candidate
    feature_map: FeatureMap | None
    no_map: str = ""  # why there is no map behind it

    def __repr__(self) -> str:
        return f"Head({self.name!r}, {self.num_features} features, {self.num_classes} classes)"

    @property
    def weight(self) -> Tensor:
        """``(C, K)``."""
        return self.module.weight.detach().flatten(1)

    @property
    def bias(self) -> Tensor:
        """``(C,)``; zeros for a head without."""
        bias = self.module.bias
        return self.weight.new_zeros(self.num_classes) if bias is None else bias.detach()

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.weight.shape[0])

    @property
    def num_features(self) -> int:
        """K."""
        return int(self.weight.shape[1])

    def pool(self, tensor: Tensor) -> Tensor:
        """Input or output of the head's module as ``(N, channels)``: positions are averaged, as the model does."""
        return _pool(tensor, self.module)


class Found(NamedTuple):
    """What the first forward pass gave."""

    head: Head
    features: Tensor  # (N, K)
    logits: Tensor  # (N, C)


class _Call(NamedTuple):
    module: Candidate
    inputs: Tensor
    output: Tensor
    version: int | None
    position: int  # how many maps were kept before it


class HeadSearch:
    """Hooks for one forward pass that remember what could be the head and the map behind it."""

    def __init__(self, model: nn.Module | None, layer: nn.Module | str | None) -> None:
        self._model = model
        self._layer = find_layer(model, layer) if layer is not None else None
        self._names = _names(model)
        self._calls: deque[_Call] = deque(maxlen=_RECENT)
        self._times: Counter[nn.Module] = Counter()
        self._maps = MapSearch()
        self._removers: list[Callable[[], None]] = []

    def watch(self, borrow: Borrowed) -> None:
        """Set the hooks."""
        modules = list(self._model.modules()) if self._model is not None else []
        for module in modules:
            if module is not self._model:
                self._removers.append(borrow.after(module, self._maps.keep))
        for module in modules if self._layer is None else [self._layer]:
            if _is_candidate(module):
                self._removers.append(borrow.after(module, self._candidate))

    def found(self, output: Any) -> Found:
        """What was found, given the model's ``output``; the hooks are gone afterwards.

        Raises:
            HeadError: There is no head, or more than one reading of it; names the candidates.
        """
        for remove in self._removers:
            remove()
        logits = find_logits(output)
        if self._layer is None:
            call = self._search(output if logits is None else logits)
        else:
            # a tuple may hold anything beside the logits, in any order: the layer that was named says which is meant
            call = self._given(self._layer, output if isinstance(output, tuple | list) or logits is None else logits)
        features, logits = _pool(call.inputs, call.module), _pool(call.output, call.module)
        behind, reason = self._maps.found(features, call.position, call.module.modules(), self._name)
        self._calls.clear()
        self._maps = MapSearch()
        return Found(Head(self._name(call.module), call.module, behind, reason), features, logits)

    # -- what the hooks keep ---------------------------------------------------------------------------------------

    def _candidate(self, module: Candidate, args: Any, output: Any) -> None:
        self._times[module] += 1
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            version = None if output.is_inference() else output._version
            self._calls.append(_Call(module, args[0], output, version, len(self._maps)))

    # -- which of the candidates it is -----------------------------------------------------------------------------

    def _search(self, output: Any) -> _Call:
        if not _could_be_logits(output):
            raise self._error(f"expected a model that returns floating logits (N, C), got {describe(output)}")
        matching = [call for call in self._calls if _gives(call, output)]
        if not matching:
            raise self._error(self._why_not(output))
        call = matching[-1]
        if self._times[call.module] > 1:
            raise self._error(
                f"{self._name(call.module)} is called {self._times[call.module]} times in one forward pass, so its "
                "input is not one set of features"
            )
        if sharers := self._sharers(call.module):
            raise self._error(f"the head's weight is shared by {', '.join(sharers)}")
        return call

    def _given(self, layer: Candidate, output: Any) -> _Call:
        name = self._name(layer)
        if self._times[layer] != 1 or not self._calls:
            raise self._error(
                f"layer {name} must run once in a forward pass, on a tensor given by position; it ran "
                f"{self._times[layer]} times"
            )
        call = self._calls[-1]
        if _could_be_logits(output) and output.shape[1] != layer.weight.shape[0]:
            raise self._error(
                f"layer {name} has {layer.weight.shape[0]} outputs, the model {output.shape[1]}: it is not the last one"
            )
        if call.output.numel() > _pool(call.output, layer).numel() and not _gives(call, output):
            raise self._error(
                f"layer {name} gives {tuple(call.output.shape)}, several positions a sample, whose average is not the "
                "model's output: something else stands behind it, so its channels do not add up to the logits"
            )
        return call

    def _sharers(self, module: Candidate) -> list[str]:
        if self._model is None:
            return []
        names = self._names[module][:]
        for other, parameter in self._model.named_parameters(remove_duplicate=False):
            owner = other.rpartition(".")[0] or ITSELF
            if parameter is module.weight and owner not in names:
                names.append(owner)
        return names if len(names) > 1 else []

    def _why_not(self, output: Tensor) -> str:
        # by name: this floor knows nothing of smaller heads
        if any(type(module).__name__ == "DecomposedLinear" for module in self._names):
            return "its head has been decomposed; use the network it was made from, or decompose(..., backend='dense')"
        if not self._times:
            return "no nn.Linear or 1x1 convolution ran in the forward pass"
        if output.dim() == 2 and output.shape[1] > 1:
            total = output.double().sum(1)
            if bool((output >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3):
                return "the model's output is probabilities: a softmax follows the head"
            if torch.allclose(output.double().exp().sum(1), torch.ones_like(total), atol=1e-3):
                return "the model's output is log-probabilities: a log-softmax follows the head"
        for call in self._calls:
            behind = _pool(call.output.relu(), call.module)
            if behind.shape == output.flatten(1).shape and close(behind, output.flatten(1)):
                return f"an activation stands between {self._name(call.module)} and the model's output"
        return "the model's output is not the output of an nn.Linear or of a 1x1 convolution"

    def _error(self, reason: str) -> HeadError:
        ran = [module for module in self._times if _is_candidate(module)]
        candidates = [f"{self._name(m)} ({m.weight.shape[1]} -> {m.weight.shape[0]})" for m in ran[-6:]]
        which = f"candidates: {', '.join(candidates)}" if candidates else "there is no candidate"
        return HeadError(
            f"could not find the classifier head: {reason}; {which}. Pass layer= with the name of the nn.Linear that "
            "makes the logits"
        )

    def _name(self, module: nn.Module) -> str:
        return self._names.get(module, [type(module).__name__])[0]


def find_head(model: nn.Module, layer: nn.Module | str) -> Head:
    """The head that ``layer`` names, without a forward pass; nothing is known of the map behind it."""
    module = find_layer(model, layer)
    return Head(_names(model)[module][0], module, None)


def last_head(model: nn.Module) -> Head:
    """The head by its place alone: the last layer with a matrix of weights. For those who read weights and no data.

    Raises:
        HeadError: That layer is no ``nn.Linear`` or 1x1 convolution.
    """
    with_matrix = [module for module in model.modules() if has_matrix(module) or _is_quantised(module)]
    if not with_matrix:
        raise HeadError("the model has no layer with a matrix of weights, so no head; pass layer= with the one meant")
    return find_head(model, with_matrix[-1])


def has_layer(model: nn.Module, name: str) -> bool:
    """Does a layer of the model bear this name, as `Head.name` gives it?"""
    return name == ITSELF or name in dict(model.named_modules())


def find_layer(model: nn.Module | None, layer: nn.Module | str) -> Candidate:
    """The module that ``layer`` names, checked to be one that can be a head."""
    module = find_module(model, layer, error=HeadError, likely=_is_candidate)
    if _is_quantised(module):
        raise HeadError(f"layer {layer} is quantised, its weights cannot be read; use the network before quantisation")
    if not _is_candidate(module):
        raise HeadError(
            f"layer must be an nn.Linear or a 1x1 convolution without groups, got {type(module).__name__}; "
            "its input features and weights are what is read"
        )
    return module


def _is_quantised(module: nn.Module) -> bool:
    return "quantized" in type(module).__module__ and hasattr(module, "weight")


def _names(model: nn.Module | None) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False) if model is not None else ():
        names.setdefault(module, []).append(name or ITSELF)
    return names


def _is_candidate(module: nn.Module) -> TypeGuard[Candidate]:
    if isinstance(module, CONVS):
        padded = module.padding != "valid" and any(module.padding)
        return module.groups == 1 and not padded and {*module.kernel_size, *module.stride} == {1}
    return isinstance(module, nn.Linear)


def _pool(tensor: Tensor, module: nn.Module) -> Tensor:
    if isinstance(module, CONVS):
        return tensor.flatten(2).mean(2) if tensor[0, 0].numel() > 1 else tensor.flatten(1)
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(1, -2).mean(1) if tensor.dim() > 2 else tensor.unsqueeze(0)


def _could_be_logits(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1


def _gives(call: _Call, output: Any) -> bool:
    """Is the model's output this call's linear function of its pooled input?"""
    if not _could_be_logits(output):
        return False
    logits, flat = _pool(call.output, call.module), output.flatten(1)
    if logits.shape != flat.shape:
        return False
    if call.version is not None and call.output._version != call.version:
        return False  # something wrote into it afterwards
    weight, bias = call.module.weight.flatten(1), call.module.bias
    features = _pool(call.inputs, call.module)
    return close(F.linear(features.to(weight.dtype), weight, bias), flat)
