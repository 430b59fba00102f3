"""How many multiplications an image's path takes: exact counts, which say nothing yet of milliseconds.

One multiply-add is one MAC; torch's ``flop_counter`` counts two for it. Additions, norms and pooling are not counted,
there as here.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import OptionError
from captum_classfilters.decoupling.calls import Calls
from captum_classfilters.decoupling.flow import Expression, evaluate, open_inputs
from captum_classfilters.decoupling.units import Unit


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
        """What `as_json` wrote."""
        return cls(tuple(ConvCost(*conv) for conv in saved["convs"]), saved["other"], saved["controllers"])


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
            each = math.prod(conv.kernel_size) * math.prod(output.shape[2:])
            expression = inputs.get(name, ["all", conv.in_channels])
            number = index.get(name)
            convs.append(ConvCost(name, number, expression, conv.in_channels, conv.out_channels, conv.groups, each))

        return hook

    with borrowed(model) as borrow:
        for name in inputs:
            borrow.after(model.get_submodule(name), seen(name))
        with FlopCounterMode(display=False) as counter:
            model(*example)
    known = Costs(tuple(convs), 0, 0)
    other = counter.get_total_flops() // 2 - known.dense
    return known._replace(other=other, controllers=controllers)
