"""Which channels of which results are zero when gates are closed: a closed channel stays closed through a ReLU or a
pooling, opens in a sum where the other summand is open, and moves in a concatenation.

Where it cannot be known, a channel counts as open. An expression says it for one result, in what JSON can hold.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from captum_classfilters.decoupling.calls import GLOBAL_POOL, Call, Calls, named
from captum_classfilters.decoupling.units import Unit

# ["all", n] | ["gate", l] | ["or", a, b] | ["cat", a, b, ...]; None: not even the number of channels is known
Expression = list[Any]

# A channel of zeros comes out as zeros, at the same place
_KEEP_ZERO = frozenset((
    GLOBAL_POOL,
    "relu", "relu6", "silu", "swish", "hardswish", "gelu", "leakyrelu", "elu", "celu", "selu", "prelu", "mish",
    "tanh", "identity", "dropout", "dropout2d", "featuredropout", "alphadropout", "stochasticdepth", "droppath",
    "maxpool1d", "maxpool2d", "maxpool3d", "avgpool1d", "avgpool2d", "avgpool3d", "adaptiveavgpool1d",
    "adaptiveavgpool2d", "adaptiveavgpool3d", "adaptivemaxpool1d", "adaptivemaxpool2d", "adaptivemaxpool3d",
    "contiguous", "clone", "detach", "float", "half", "bfloat16", "interpolate", "upsample", "neg", "abs", "sqrt",
    "square",
))  # fmt: skip
_SUMS = frozenset(("add", "iadd", "sub", "isub"))
_PRODUCTS = frozenset(("mul", "imul", "multiply"))
_CATS = frozenset(("cat", "concat", "concatenate"))


def open_inputs(model: nn.Module, calls: Calls, units: Sequence[Unit]) -> dict[str, Expression]:
    """For each convolution, which of its input channels may be other than zero; one that runs twice: all of them."""
    gates = {unit.site: index for index, unit in enumerate(units)}
    known: dict[int, Expression | None] = {}
    found: dict[str, Expression] = {}
    nodes = list(calls.graph.nodes) if calls.graph else []
    for call in calls.calls:
        sources = [known.get(source) for source in call.inputs]
        if call.op == "conv":
            conv: Any = model.get_submodule(call.module)
            source = sources[0] if sources else None
            fits = call.module not in found and _width(source, units, model) == conv.in_channels
            found[call.module] = source if fits and source is not None else ["all", conv.in_channels]
        known[call.output] = _after(call, sources, gates, model, units)
        # a traced graph goes on naming what is changed in place; seen while running, it has a new number
        if call.inputs and nodes and changes_in_place(nodes[call.output]):
            known[call.inputs[0]] = known[call.output]
    return found


def changes_in_place(node: fx.Node) -> bool:
    """``x.add_(y)``, ``F.relu_(x)``, ``x += y``."""
    target = node.target if node.op in ("call_function", "call_method") else ""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in ("iadd", "isub", "imul", "itruediv")


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
    if call.op in _KEEP_ZERO:
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


def keeps_zero(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node of a traced graph works on each channel alone and leaves zeros zero."""
    target: Any = type(model.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    return named(target) in _KEEP_ZERO


def evaluate(expression: Expression, gates: Sequence[Tensor]) -> Tensor:
    """The open channels of each image, ``(N, n)`` bool, from gates ``(N, K_l)`` bool."""
    kind, *parts = expression
    if kind == "all":
        return torch.ones(len(gates[0]), parts[0], dtype=torch.bool, device=gates[0].device)
    if kind == "gate":
        return gates[parts[0]]
    found = [evaluate(part, gates) for part in parts]
    return torch.cat(found, 1) if kind == "cat" else torch.stack(found).any(0)
