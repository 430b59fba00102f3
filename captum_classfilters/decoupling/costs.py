"""How many multiplications an image's path takes. The counts are exact; they are not milliseconds.

One multiply-add is one MAC; torch's ``flop_counter`` counts two for it. Neither of them counts
additions, norms and pooling.

A closed channel stays zero through a ReLU or a pooling. In a sum it is zero where the other summand is, too, and in a
concatenation it moves. An `Expression` says this for one result, in what JSON can hold; a channel of which it cannot be
known counts as open.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.calls import KEEP_ZERO, Call, Calls, changes_in_place
from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import OptionError
from captum_classfilters.decoupling.units import Unit

# ["all", n] | ["gate", l] | ["or", a, b] | ["cat", a, b, ...]; None: not even the number of channels is known
Expression = list[Any]

# Channels of a layer, and of all gated layers together, that a file may speak of: its tables take memory for each
MOST_CHANNELS = 2**20

_SUMS = frozenset(("add", "iadd", "sub", "isub"))
_PRODUCTS = frozenset(("mul", "imul", "multiply"))
_CATS = frozenset(("cat", "concat", "concatenate"))


class ConvCost(NamedTuple):
    """One convolution: ``each`` multiplications for a pair of an input and an output channel of one group."""

    name: str
    gate: int | None  # index of its unit
    inputs: Expression  # which of its input channels may be other than zero
    in_channels: int
    out_channels: int
    groups: int
    each: int


class Costs(NamedTuple):
    """What one image costs: by convolution, all other layers together, and the controllers."""

    convs: tuple[ConvCost, ...]
    other: int
    controllers: int

    @property
    def dense(self) -> int:
        """The network without gates."""
        pairs = (conv.each * conv.in_channels * conv.out_channels // conv.groups for conv in self.convs)
        return sum(pairs) + self.other

    def of(self, gates: Sequence[Tensor], *, controllers: bool = True) -> Tensor:
        """MACs of each image, ``(N,)`` int64: the open inputs times the open outputs of every convolution.

        Args:
            gates: ``(N, K_l)`` bool or integers for each gated layer.
            controllers: Count their own work.
        """
        if any(gate.is_floating_point() for gate in gates):
            raise OptionError("gates must be bool or 0 and 1 as integers, got floating point; pass gate > 0.5")
        total = torch.full((len(gates[0]),), self.other + controllers * self.controllers, dtype=torch.int64)
        for conv in self.convs:
            total += self.of_conv(conv, gates).cpu()
        return total

    def of_conv(self, conv: ConvCost, gates: Sequence[Tensor]) -> Tensor:
        """MACs of one convolution, ``(N,)`` int64."""
        count = len(gates[0])
        inputs = evaluate(conv.inputs, gates).reshape(count, conv.groups, conv.in_channels // conv.groups).sum(2)
        if conv.gate is None:
            return conv.each * inputs.sum(1) * (conv.out_channels // conv.groups)
        outputs = gates[conv.gate].reshape(count, conv.groups, conv.out_channels // conv.groups).sum(2)
        return conv.each * (inputs * outputs).sum(1)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"convs": [list(conv) for conv in self.convs], "other": self.other, "controllers": self.controllers}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Costs":
        """What `as_json` wrote; see `check` for what a file may say."""
        return cls(tuple(ConvCost(*conv) for conv in saved["convs"]), saved["other"], saved["controllers"])

    def check(self, channels: Sequence[int]) -> "Costs":
        """These costs, if they are those of a network whose gated layers have so many channels.

        Raises:
            OptionError, ValueError, TypeError: They are not; a file held them.
        """
        for conv in self.convs:
            if not isinstance(conv.name, str):
                raise TypeError("the name of a convolution must be text")
            for name in ("in_channels", "out_channels", "groups"):
                integer(getattr(conv, name), name, 1, MOST_CHANNELS)
            integer(conv.each, "each", 0, MOST_CHANNELS**2)
            if conv.in_channels % conv.groups or conv.out_channels % conv.groups:
                raise ValueError("the groups of a convolution must divide its channels")
            if conv.gate is not None and _checked_width(["gate", conv.gate], channels) != conv.out_channels:
                raise ValueError("a convolution has other channels than its gate")
            if _checked_width(conv.inputs, channels) != conv.in_channels:
                raise ValueError("a convolution has other input channels than what it reads")
        for name in ("other", "controllers"):
            integer(getattr(self, name), name, 0, MOST_CHANNELS**2)
        if self.dense >= 2**62:
            raise ValueError("the network costs more than can be counted")
        return self


def count_costs(
    model: nn.Module, calls: Calls, units: Sequence[Unit], example: tuple[Any, ...], controllers: int = 0
) -> Costs:
    """Run ``model``, without gates, on an example to see how large its maps are.

    Args:
        model: The network.
        calls: What it calls.
        units: The gated convolutions.
        example: Arguments of its forward: one image.
        controllers: What those take.
    """
    inputs = open_inputs(model, calls, units)
    index = {unit.conv: number for number, unit in enumerate(units)}
    convs: list[ConvCost] = []

    def seen(name: str) -> Any:
        def hook(conv: Any, args: Any, output: Tensor) -> None:
            per_pair = math.prod(conv.kernel_size) * math.prod(output.shape[2:])
            expression = inputs.get(name, ["all", conv.in_channels])
            number = index.get(name)
            convs.append(ConvCost(name, number, expression, conv.in_channels, conv.out_channels, conv.groups, per_pair))

        return hook

    with borrowed(model) as borrow:
        for name in inputs:
            borrow.after(model.get_submodule(name), seen(name))
        with FlopCounterMode(display=False) as counter:
            model(*example)
    of_convs = Costs(tuple(convs), 0, 0)
    other = counter.get_total_flops() // 2 - of_convs.dense
    return of_convs._replace(other=other, controllers=controllers)


def open_inputs(model: nn.Module, calls: Calls, units: Sequence[Unit]) -> dict[str, Expression]:
    """For each convolution, which of its input channels may be other than zero; one that runs twice: all of them."""
    gates = {unit.site: index for index, unit in enumerate(units)}
    produced: dict[int, Expression | None] = {}
    read_by: dict[str, Expression] = {}
    nodes = list(calls.graph.nodes) if calls.graph else []
    for call in calls.calls:
        sources = [produced.get(source) for source in call.inputs]
        if call.op == "conv":
            conv: Any = model.get_submodule(call.module)
            source = sources[0] if sources else None
            fits = call.module not in read_by and _width(source, units, model) == conv.in_channels
            read_by[call.module] = source if fits and source is not None else ["all", conv.in_channels]
        produced[call.output] = _after(call, sources, gates, model, units)
        # a traced graph goes on naming what is changed in place; seen while running, it has a new number
        if call.inputs and nodes and changes_in_place(nodes[call.output]):
            produced[call.inputs[0]] = produced[call.output]
    return read_by


def _after(
    call: Call, sources: list[Expression | None], gates: dict[str, int], model: nn.Module, units: Sequence[Unit]
) -> Expression | None:
    if call.module in gates:
        return ["gate", gates[call.module]]
    if call.op == "conv":
        return ["all", model.get_submodule(call.module).out_channels]
    if not sources:
        return None
    if call.op == "norm":
        width = _width(sources[0], units, model)
        return ["all", width] if width else None
    if call.op in KEEP_ZERO:
        return sources[0]
    if call.op in _SUMS and len(sources) == 2:
        widths = {_width(source, units, model) for source in sources}
        if len(widths) > 1 or None in widths:
            return None
        return ["all", widths.pop()] if any(_is_all(source) for source in sources) else ["or", *sources]
    if call.op in _PRODUCTS:
        # with a number, or with a scale for each channel: zero stays zero
        return next((source for source in sources if source is not None and not _is_all(source)), sources[0])
    if call.op in _CATS and call.dim == 1 and all(source is not None for source in sources):
        return ["cat", *sources]
    return None


def _is_all(expression: Expression | None) -> bool:
    return expression is None or expression[0] == "all"


def _width(expression: Expression | None, units: Sequence[Unit], model: nn.Module) -> int | None:
    if expression is None:
        return None
    kind, *parts = expression
    if kind == "all":
        return int(parts[0])
    if kind == "gate":
        return int(model.get_submodule(units[parts[0]].conv).out_channels)  # type: ignore[arg-type]
    widths = [_width(part, units, model) or 0 for part in parts]
    return widths[0] if kind == "or" else sum(widths)


def _checked_width(expression: Any, channels: Sequence[int]) -> int:
    """The number of channels of an expression that came from a file."""
    if not isinstance(expression, list) or len(expression) < 2:
        raise TypeError("an expression must be a list of a word and what belongs to it")
    kind, *parts = expression
    if kind in ("all", "gate") and len(parts) == 1:
        value = integer(parts[0], kind, 0, MOST_CHANNELS if kind == "all" else len(channels) - 1)
        return value if kind == "all" else channels[value]
    if kind not in ("or", "cat"):
        raise ValueError("an expression must begin with all, gate, or, cat")
    widths = [_checked_width(part, channels) for part in parts]
    if kind == "or" and len(set(widths)) > 1:
        raise ValueError("a sum is of parts of equal width")
    return widths[0] if kind == "or" else sum(widths)


def evaluate(expression: Expression, gates: Sequence[Tensor]) -> Tensor:
    """The open channels of each image, ``(N, n)`` bool, from gates ``(N, K_l)`` bool."""
    kind, *parts = expression
    if kind == "all":
        return torch.ones(len(gates[0]), parts[0], dtype=torch.bool, device=gates[0].device)
    if kind == "gate":
        return gates[parts[0]]
    values = [evaluate(part, gates) for part in parts]
    return torch.cat(values, 1) if kind == "cat" else torch.stack(values).any(0)
