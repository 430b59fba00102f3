"""Which convolutions are gated (`find_units`), and one forward with their gates on (`Run`).

Channels are multiplied on the norm that follows the convolution, if one does: masking before a batch norm would not
zero a channel but give it the norm's constant. What a forward needs lives in a `Run`, which the hooks find through a
context variable: threads, DataParallel's replicas and nested calls each see their own, and a hook that another one of
them has put on the same module does nothing here.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_classfilters.core.calls import CONVS, GLOBAL_POOL, Call, Calls, calls_of
from captum_classfilters.core.errors import LayerError, ShapeError, UngatedLayerWarning
from captum_classfilters.decoupling.controller import Controller, mask, pooled

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ADDITIONS = ("add", "iadd")


class Unit(NamedTuple):
    """A convolution whose channels are gated, and the module whose output is multiplied."""

    conv: str
    site: str


def find_units(
    model: nn.Module, layers: Iterable[nn.Module | str] | None = None, calls: Calls | None = None
) -> tuple[Unit, ...]:
    """The gated units of ``model``, in the order in which they run.

    Source: "Interpretable neural network decoupling", section 4.1: all convolutions but the first and the last.
    Differs: 1x1 convolutions of a shortcut and those of a squeeze-and-excitation are left out as well.

    Args:
        model: Any; it is given back as it was.
        layers: Names or modules of the convolutions to gate; None: as said above.
        calls: What runs, if known.

    Raises:
        LayerError: There is no convolution to gate, one that is asked for does not exist, is none, does not run, or is
            used in a way that masking cannot follow.
    """
    ran = calls or calls_of(model)
    convs = {call.module: call for call in ran.calls if call.op == "conv"}
    if layers is not None:
        names = [_name_of(model, layer) for layer in _listed(layers)]
        for name in names:
            _check_runs(model, name, convs)
            if reason := _trouble(ran, convs[name]):
                raise LayerError(f"{name} cannot be gated: {reason}; leave it out of layers=")
        chosen = [name for name in convs if name in names]
    else:
        ordered = [name for name, call in convs.items() if not _is_aside(model, ran, call)]
        chosen = [name for name in ordered[1:-1] if not _warned(ran, convs[name])]
    if not chosen:
        raise LayerError(
            f"{type(model).__name__} has {len(convs)} convolutions that run as modules, and none to gate after the "
            "first and the last; name some with layers="
            if layers is None
            else "layers= is empty; name at least one convolution, or leave layers= away"
        )
    return tuple(Unit(name, _site(ran, convs[name])) for name in chosen)


def _listed(layers: Any) -> list[Any]:
    if isinstance(layers, str | nn.Module) or not isinstance(layers, Iterable):
        raise LayerError(f"layers must be a list of names or modules, got {type(layers).__name__}; put it in a list")
    return list(layers)


def _name_of(model: nn.Module, layer: nn.Module | str) -> str:
    if isinstance(layer, nn.Module):
        names: list[str] = [name for name, module in model.named_modules() if module is layer]
        if not names:
            raise LayerError(f"the {type(layer).__name__} in layers= is not a part of {type(model).__name__}")
        return names[0]
    if not isinstance(layer, str):
        raise LayerError(f"layers must be names or modules, got {layer!r}")
    # the decoupler's own modules are named so
    return layer if _has(model, layer) else layer.removeprefix("model.")


def _has(model: nn.Module, name: str) -> bool:
    return any(name == other for other, _ in model.named_modules())


def _check_runs(model: nn.Module, name: str, convs: dict[str, Call]) -> None:
    if name in convs:
        return
    if not _has(model, name):
        some = ", ".join(list(convs)[:5])
        raise LayerError(
            f"there is no layer {name!r}; the convolutions that run are {some}{', ...' * (len(convs) > 5)}"
        )
    module = model.get_submodule(name)
    if isinstance(module, _TRANSPOSED):
        raise LayerError(f"{name} is a {type(module).__name__}; only Conv1d, Conv2d and Conv3d can be gated")
    if not isinstance(module, CONVS):
        raise LayerError(f"{name} is a {type(module).__name__}, not a convolution; name a Conv1d, Conv2d or Conv3d")
    raise LayerError(
        f"{name} does not run as a module in the forward of {type(model).__name__} (in eval mode); leave it out"
    )


def _trouble(calls: Calls, conv: Call) -> str:
    """Why masking cannot follow this convolution; empty if it can."""
    if (times := _times(calls, conv.module)) > 1:
        return f"it runs {times} times in one forward, and a gate is for one"
    users = calls.users(conv.output)
    for user in users:
        if user.op.endswith("norm") and not user.module:
            return f"its output goes into the function {user.op}, which would give a closed channel a constant"
        if len(users) == 1 and user.op == "norm" and (times := _times(calls, user.module)) > 1:
            return f"the norm that follows, {user.module}, runs {times} times in one forward"
    return ""


def _times(calls: Calls, module: str) -> int:
    return Counter(call.module for call in calls.calls)[module]


def _warned(calls: Calls, conv: Call) -> bool:
    reason = _trouble(calls, conv)
    if reason:
        warnings.warn(f"{conv.module} is not gated: {reason}", UngatedLayerWarning, stacklevel=4)
    return bool(reason)


def _site(calls: Calls, conv: Call) -> str:
    return (_following_norm(calls, conv) or conv).module


def _following_norm(calls: Calls, conv: Call) -> Call | None:
    """The norm that takes this output, if nothing else does."""
    users = calls.users(conv.output)
    alone = len(users) == 1 and conv.output not in calls.returned
    return users[0] if alone and users[0].op == "norm" else None


def _is_aside(model: nn.Module, calls: Calls, conv: Call) -> bool:
    """A 1x1 convolution of a shortcut, or one that sees an image already pooled to one position."""
    return _is_shortcut(model, calls, conv) or _is_squeezed(calls, conv)


def _is_shortcut(model: nn.Module, calls: Calls, conv: Call) -> bool:
    kernel = model.get_submodule(conv.module).kernel_size
    end = _following_norm(calls, conv) or conv
    users = calls.users(end.output)
    made_by = {call.output: call for call in calls.calls}
    source = conv.inputs[0]
    while source in made_by and "avgpool" in made_by[source].op:  # as in ResNet-D
        source = made_by[source].inputs[0]
    shared = len(calls.users(source)) > 1
    return all(size == 1 for size in kernel) and shared and any(user.op in _ADDITIONS for user in users)  # type: ignore[union-attr]


def _is_squeezed(calls: Calls, conv: Call) -> bool:
    made_by = {call.output: call for call in calls.calls}
    sources = list(conv.inputs)
    while sources:
        makers = [made_by[source] for source in sources if source in made_by]
        if len(makers) != len(sources):
            return False  # the model's own input
        if all(call.op == GLOBAL_POOL for call in makers):
            return True
        if len(makers) != 1:
            return False
        sources = list(makers[0].inputs)
    return False


Gates = tuple[Tensor, ...]


class Run:
    """One forward: its gates, and what else is asked of it.

    Args:
        frozen: Gates to take instead of the controllers' own.
        logits: Keep g of eq. 2.
        pooled: Keep the mean response of every channel before it is masked.
        straight_through: Hard gates in eval mode have the gradient of soft ones.
    """

    def __init__(
        self, frozen: Gates | None, logits: bool = False, pooled: bool = False, straight_through: bool = False
    ) -> None:
        self.frozen, self.straight_through = frozen, straight_through
        self.gates: dict[int, Tensor] = {}
        self.logits: dict[int, Tensor] | None = {} if logits else None
        self.pooled: dict[int, Tensor] | None = {} if pooled else None
        self.masked: set[int] = set()

    @contextmanager
    def hooked(self, model: nn.Module, units: Sequence[Unit], controllers: Sequence[Controller]) -> Iterator[None]:
        """Inside, forwards of ``model`` in this thread are gated."""
        token = _RUN.set(self)
        try:
            with ExitStack() as stack:
                for index, (unit, controller) in enumerate(zip(units, controllers, strict=True)):
                    opens = _opens(self, index, controller, unit.conv)
                    stack.callback(model.get_submodule(unit.conv).register_forward_pre_hook(opens).remove)
                    closes = _closes(self, index, unit.site)
                    stack.callback(model.get_submodule(unit.site).register_forward_hook(closes).remove)
                yield
        finally:
            _RUN.reset(token)


_RUN: ContextVar[Run | None] = ContextVar("captum_classfilters_run", default=None)


def _opens(run: Run, index: int, controller: Controller, name: str) -> Callable[..., None]:
    """Before a convolution: its gates, from its input."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if _RUN.get() is not run:
            return
        if not args:
            raise LayerError(f"{name} gets its input by keyword, which a hook does not see; call it with x alone")
        features = args[0]
        if features.dim() != len(module.kernel_size) + 2:  # type: ignore[arg-type]
            raise ShapeError(f"{name} got an image without a batch, {tuple(features.shape)}; pass (N, C, ...)")
        if run.frozen is not None:
            run.gates[index] = _repeated(run.frozen[index], len(features), name).to(features.device)
        elif run.logits is not None:
            run.logits[index] = controller.logits(features)
            run.gates[index] = controller.gates(run.logits[index], run.straight_through)
        else:
            # called, not taken apart: Captum's LayerActivation hooks it to read the gates
            run.gates[index] = controller(features, run.straight_through)

    return hook


def _repeated(gates: Tensor, count: int, name: str) -> Tensor:
    if count % len(gates):
        raise ShapeError(f"the frozen gates of {name} are of {len(gates)} images, and {count} came; freeze their own")
    return gates.repeat(count // len(gates), 1)


def _closes(run: Run, index: int, name: str) -> Callable[..., Any]:
    """After the norm, or the convolution: its channels times the gates."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if _RUN.get() is not run:
            return None
        if index not in run.gates:
            raise LayerError(f"{name} ran before its convolution; make a PathDecoupler with layers= without it")
        gates = run.gates[index]
        if not isinstance(output, Tensor) or output.shape[:2] != gates.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise LayerError(f"the output of {name} should be {tuple(gates.shape)} with positions behind, got {got}")
        run.masked.add(index)
        if run.pooled is not None:
            # eq. 1 has a ReLU; where the network has it later, as before a sum, the response is the same
            run.pooled[index] = pooled(output.relu(), gates.dtype)
        return mask(output, gates)

    return hook


def not_finite(layers: Sequence[str], gates: Gates) -> str:
    """Which gates are NaN or infinite, for a message."""
    name = next(name for name, gate in zip(layers, gates, strict=True) if not torch.isfinite(gate).all())
    return (
        f"the gates of {name} are not finite: its input overflowed or holds NaN; use bfloat16 or float32 for the "
        "features"
    )
