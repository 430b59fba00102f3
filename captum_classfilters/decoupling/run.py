"""One forward of a gated network: hooks that open and close channels, and what they find out.

What a forward needs lives in a `Run`, known through a context variable: threads, DataParallel's replicas and nested
calls each see their own, and hooks that another of them has put on the same module do nothing here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.core.errors import LayerError, ShapeError
from captum_classfilters.decoupling.controller import Controller, mask, pooled
from captum_classfilters.decoupling.units import Unit

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
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise LayerError(f"the output of {name} should be {tuple(gates.shape)} with positions behind, got {found}")
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
