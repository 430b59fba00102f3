"""The classifier head of a model: a linear function of features, whatever modules compute it.

Most heads are one ``nn.Linear`` or 1x1 convolution. A head can also be a wrapper around one (a LoRA adapter), several
that are averaged, or one behind a temperature: these have effective weights. `head_search.py` finds heads by value.
N samples, K features, C classes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.calls import CONVS
from captum_classfilters.core.errors import HeadError
from captum_classfilters.core.feature_map import FeatureMap, close, has_matrix
from captum_classfilters.core.layers import find_module, named_modules
from captum_classfilters.core.outputs import two_logits
from captum_classfilters.core.wide import home

# A layer that is a matrix of weights
Candidate: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

# Effective weights of wrappers, and the state that they were read in
_EFFECTIVE: WeakKeyDictionary[nn.Module, tuple[list[Any], tuple[Tensor, Tensor]]] = WeakKeyDictionary()


# Attributes that every module has
_OF_TORCH = frozenset(vars(nn.Module()))


class AuxiliaryHead(str):
    """The dotted name of a layer whose output is not what the model returns, given on purpose as ``layer=``.

    A layer that is named by a plain string must make the model's logits, and this is checked. With an auxiliary head
    everything is measured on that layer's own output.

    Example:
        >>> from captum_classfilters import InfluentialFeatures
        >>> class TwoHeads(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc, self.aux = nn.Linear(4, 2), nn.Linear(4, 3)
        ...     def forward(self, x):
        ...         self.aux(x)
        ...         return self.fc(x)
        >>> loader = [(torch.rand(6, 4), torch.arange(6) % 3)]
        >>> InfluentialFeatures(TwoHeads(), AuxiliaryHead("aux")).attribute(loader).meta["auxiliary_head"]
        True
    """

    __slots__ = ()


class Part(NamedTuple):
    """A module that is a linear function of the features, and what its output is multiplied by in the logits."""

    module: nn.Module
    factor: float
    name: str = ""


@dataclass(frozen=True)
class Head:
    """``logits = features @ weight.T + bias``; weight ``(C, K)``, bias ``(C,)``, read when asked for.

    On a device without float64 both are given on the CPU, as all numbers of a `Batch` are.

    Attributes:
        name: Dotted name of ``module``.
        module: The layer whose input are the features; the first of several.
        feature_map: Where the features come from, if that is known.
        no_map: Why there is no map behind it.
        parts: The modules whose outputs, times their factors, add up to the logits.
        offset: What the model adds to each of its outputs behind them; empty for nothing.
        channels: K.
        one_logit: The model returns one number for each sample, the logit of class 1. Class 0 has its negative.
        auxiliary: It does not make what the model returns.
        aliases: All names of ``module``.
    """

    name: str
    module: nn.Module
    feature_map: FeatureMap | None
    no_map: str = ""
    parts: tuple[Part, ...] = ()
    channels: int = 0
    one_logit: bool = False
    auxiliary: bool = False
    aliases: tuple[str, ...] = ()
    offset: tuple[float, ...] = ()

    def __repr__(self) -> str:
        kind = ", auxiliary" if self.auxiliary else ""
        return f"Head({self.name!r}, {self.num_features} features, {self.num_classes} classes{kind})"

    @property
    def weight(self) -> Tensor:
        """``(C, K)``, the effective one."""
        weight = self._matrix()[0]
        return weight.to(home(weight.device))

    @property
    def bias(self) -> Tensor:
        """``(C,)``; zeros for a head without."""
        bias = self._matrix()[1]
        return bias.to(home(bias.device))

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    @property
    def has_bias(self) -> bool:
        """Does any part add a bias? Of a wrapper, that it is not zero says so."""
        return any(
            part.module.bias is not None
            if is_candidate(part.module)
            else bool(affine(part.module, self.channels)[1].any())
            for part in self.all_parts
        )

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self._matrix()[0].shape[0])

    @property
    def num_features(self) -> int:
        """K."""
        return int(self._matrix()[0].shape[1])

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """``parts``, of which there is at least one."""
        return self.parts or (Part(self.module, 1.0),)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules that read the features."""
        return tuple(part.module for part in self.all_parts)

    def _matrix(self) -> tuple[Tensor, Tensor]:
        pairs = [(affine(part.module, self.channels), part.factor) for part in self.all_parts]
        if len(pairs) == 1 and pairs[0][1] == 1:
            weight, bias = pairs[0][0]
        else:
            weight = torch.stack([pair[0] * factor for pair, factor in pairs]).sum(0)
            bias = torch.stack([pair[1] * factor for pair, factor in pairs]).sum(0)
        bias = bias + bias.new_tensor(self.offset) if self.offset else bias
        return (torch.cat([-weight, weight]), torch.cat([-bias, bias])) if self.one_logit else (weight, bias)

    def pool(self, tensor: Tensor) -> Tensor:
        """Input or output of the head's module as ``(N, channels)``: positions are averaged, as the model does."""
        return pooled(tensor, self.module)

    def logits(self, features: Tensor, output: Tensor) -> Tensor:
        """The logits ``(N, C)``, from the features and what ``module`` gave for them."""
        if len(self.all_parts) > 1:
            weight, bias = self._matrix()
            return F.linear(features.to(weight.dtype), weight, bias)
        factor = self.all_parts[0].factor
        logits = self.pool(output) if factor == 1 else self.pool(output) * factor
        logits = logits + logits.new_tensor(self.offset) if self.offset else logits
        return two_logits(logits) if self.one_logit else logits

    def about(self) -> dict[str, Any]:
        """What a table or moments must remember of an unusual head, as plain values; empty for a usual one."""
        about: dict[str, Any] = {}
        if self.parts:
            about["head_parts"] = [[part.name, part.factor] for part in self.parts]
        if self.offset:
            about["head_offset"] = list(self.offset)
        if self.auxiliary:
            about["auxiliary_head"] = True
        return about

    def goes_by(self, name: str) -> bool:
        """Is this one of its names?"""
        return name in (self.name, *self.aliases)


def head_facts(value: Any) -> dict[str, Any]:
    """What `Head.about` told, read from a file: checked, and nothing else.

    Raises:
        TypeError: It is something else.
    """
    facts: dict[str, Any] = {}
    if not isinstance(value, Mapping) or set(value) - {"head_parts", "head_offset", "auxiliary_head"}:
        raise TypeError("facts about a head must be head_parts, head_offset and auxiliary_head")
    if "head_parts" in value:
        facts["head_parts"] = [[str(name), float(factor)] for name, factor in value["head_parts"]]
    if "head_offset" in value:
        facts["head_offset"] = [float(number) for number in value["head_offset"]]
    if "auxiliary_head" in value:
        facts["auxiliary_head"] = bool(value["auxiliary_head"])
    return facts


def affine(module: nn.Module, channels: int = 0) -> tuple[Tensor, Tensor]:
    """Weight ``(C, K)`` and bias ``(C,)`` of a module that is a linear function of its input.

    A wrapper's are read off its answers to zero and to each unit vector; whether it is linear is not asked here.

    Args:
        module: A layer with a matrix of weights, or a wrapper around one.
        channels: K, for a wrapper.
    """
    if is_plain(module):
        weight = module.weight.detach()
        weight = (weight if weight.layout == torch.strided else weight.to_dense()).flatten(1)
        bias = module.bias
        return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach()
    state = _state(module, channels)
    kept = _EFFECTIVE.get(module)
    if kept is None or not state or kept[0] != state:
        kept = _EFFECTIVE[module] = state, _answers(module, channels)
    return kept[1]


def forget(module: nn.Module) -> None:
    """Read the effective weights anew: writes through ``.data`` leave no trace."""
    _EFFECTIVE.pop(module, None)


def is_linear(module: nn.Module, channels: int) -> bool:
    """Does a wrapper answer random features as its answers to unit vectors say?"""
    try:
        weight, bias = affine(module, channels)
        features = torch.rand(8, channels, generator=torch.Generator().manual_seed(0)).to(weight)
        with borrowed(module):
            answers = module.forward(features)
        return close(F.linear(features, weight, bias), answers)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # it takes no matrix
        return False


def _answers(module: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    units = torch.cat([like.new_zeros(1, channels), torch.eye(channels, dtype=like.dtype, device=like.device)])
    if isinstance(module, CONVS):
        units = units.reshape(*units.shape, *[1] * (module.weight.dim() - 2))
    with borrowed(module):
        # not through hooks: they would take this for a forward pass of the model
        answers = module.forward(units).flatten(1)
    return (answers[1:] - answers[0]).T.contiguous(), answers[0]


def _state(module: nn.Module, channels: int) -> list[Any]:
    """What tells one state of a module from another: its parameters, and settings such as the active adapter."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return []
    versions = [number for tensor in tensors for number in (id(tensor), tensor._version)]
    settings = [
        (name, repr(value))
        for inner in module.modules()
        for name, value in vars(inner).items()
        if name not in _OF_TORCH and isinstance(value, bool | int | float | str | list | dict)
    ]
    return [channels, versions, settings]


def find_head(
    model: nn.Module, layer: nn.Module | str, about: Mapping[str, Any] | None = None, channels: int = 0
) -> Head:
    """The head that ``layer`` names, without a forward pass: not checked, nothing is known of the map behind it.

    Args:
        model: The model.
        layer: The layer.
        about: What `Head.about` told of an unusual head.
        channels: K, for a module whose weights do not tell it.
    """
    module = find_layer(model, layer)
    about = about or {}
    channels = channels_of(module) or channels
    forget(module)
    if not is_plain(module) and not is_linear(module, channels):
        raise HeadError(
            f"layer {layer}, {type(module).__name__}, is no linear function of its input, so its channels do not add "
            "up to its output; name the nn.Linear or 1x1 convolution that is"
        )
    parts = tuple(Part(find_layer(model, name), float(factor), name) for name, factor in about.get("head_parts", ()))
    names = named_modules(model).get(module, [type(module).__name__])
    return Head(
        names[0], module, None, parts=parts, channels=channels,
        auxiliary=isinstance(layer, AuxiliaryHead) or bool(about.get("auxiliary_head")),
        aliases=tuple(names), one_logit=len(affine(module, channels)[0]) == 1,
        offset=tuple(about.get("head_offset", ())),
    )  # fmt: skip


def last_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers that could be the head by their places: no later layer takes as many inputs as they have outputs.

    The last one comes first. A network with one classifier and nothing behind it has exactly one.

    Raises:
        HeadError: The last layer with a matrix of weights is no ``nn.Linear`` or 1x1 convolution.
    """
    with_matrix = [module for module in model.modules() if has_matrix(module) or is_quantised(module)]
    if not with_matrix:
        raise HeadError("the model has no layer with a matrix of weights, so no head; pass layer= with the one meant")
    taken: set[int] = set()
    for number, module in enumerate(reversed(with_matrix)):
        if number == 0:
            find_layer(model, module)
        if is_candidate(module) and (number == 0 or module.weight.shape[0] not in taken):
            yield module
        weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        taken.update(size for weight in weights for size in (weight.shape[1], weight.numel() // max(1, len(weight))))
        taken.update(_folded(module))


def _folded(module: nn.Module) -> list[int]:
    """Inputs that a grouped convolution takes; its weight shows those of one group."""
    return [module.in_channels] if isinstance(module, CONVS) else []


def channels_of(module: nn.Module) -> int:
    """K of a layer, or of the first layer inside a wrapper."""
    first = next((inner for inner in module.modules() if is_candidate(inner)), None)
    return 0 if first is None else int(first.weight.shape[1])


def has_layer(model: nn.Module, name: str) -> bool:
    """Does a layer of the model bear this name?"""
    return any(name in names for names in named_modules(model).values())


def find_layer(model: nn.Module | None, layer: nn.Module | str) -> nn.Module:
    """The module that ``layer`` names, checked to be one that can be a head: it has a matrix of weights."""
    module = find_module(model, layer, error=HeadError, likely=is_candidate)
    if is_quantised(module):
        raise HeadError(f"layer {layer} is quantised, its weights cannot be read; use the network before quantisation")
    holds = is_candidate(module) or (could_be_linear(module) and module is not model)
    if not holds or (isinstance(module, CONVS) and not is_candidate(module)):
        raise HeadError(
            f"layer must be an nn.Linear or a 1x1 convolution without groups, got {type(module).__name__}; "
            "its input features and weights are what is read"
        )
    return module


def could_be_linear(module: nn.Module) -> bool:
    """Does it hold a layer with a matrix of weights, or such a matrix itself?"""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return False
    own = any(weight.dim() == 2 and weight.is_floating_point() for weight in module.parameters(recurse=False))
    return own or any(map(is_candidate, module.modules()))


def is_quantised(module: nn.Module) -> bool:
    """Does it hold weights that cannot be read?"""
    return "quantized" in type(module).__module__ and hasattr(module, "weight")


def is_candidate(module: nn.Module) -> TypeGuard[Candidate]:
    """Is it an ``nn.Linear``, or a 1x1 convolution that adds nothing at the borders?"""
    if isinstance(module, CONVS):
        padded = module.padding != "valid" and any(module.padding)
        return module.groups == 1 and not padded and {*module.kernel_size, *module.stride} == {1}
    return isinstance(module, nn.Linear)


def is_plain(module: nn.Module) -> TypeGuard[Candidate]:
    """Is it a candidate that computes what its class computes? A subclass or an instance may have another forward."""
    if not is_candidate(module) or "forward" in vars(module):
        return False
    return type(module).forward in {kind.forward for kind in (nn.Linear, *CONVS)}


def pooled(tensor: Tensor, module: nn.Module) -> Tensor:
    """Input or output of a module as ``(N, channels)``: positions are averaged."""
    if isinstance(module, CONVS):
        return tensor.flatten(2).mean(2) if tensor[0, 0].numel() > 1 else tensor.flatten(1)
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(1, -2).mean(1) if tensor.dim() > 2 else tensor.unsqueeze(0)
