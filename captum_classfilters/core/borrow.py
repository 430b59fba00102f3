"""Take the user's model for a while and give it back as it was.

Eval mode, hooks and eager execution hold inside one ``with`` block. Nothing is ever written onto the model
besides these, so restoring what was saved is enough. `core/stream.py` is the main borrower.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

Hook = Callable[..., Any]


class Borrowed:
    """What a borrower may do: put hooks on modules. They leave with the ``with`` block."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def after(self, module: nn.Module, hook: Hook) -> Callable[[], None]:
        """Call ``hook(module, args, output)`` after each forward of ``module``; returns what removes it early."""
        return self._kept(module.register_forward_hook(hook))

    def before(self, module: nn.Module, hook: Hook) -> Callable[[], None]:
        """Call ``hook(module, args)`` before each forward of ``module``; the arguments it returns replace them."""
        return self._kept(module.register_forward_pre_hook(hook))

    def _kept(self, handle: RemovableHandle) -> Callable[[], None]:
        self._stack.callback(handle.remove)
        return handle.remove


@contextmanager
def borrowed(model: nn.Module | None, *, grad: bool = False, train: bool = False) -> Iterator[Borrowed]:
    """Eval mode, no gradients (unless ``grad``), no compilation; on the way out all is as before.

    ``train``: a step of training; modes are left as they are, and so is what the caller says of gradients.

    ``training`` is restored module by module: a model whose batch norms were frozen by hand stays so.
    ``model=None``: a bare function, of which only the hooked layers are known.
    """
    # outermost modules are given back first: until torch 2.5 a compiled one writes a stale mode into the one inside
    modules = list(model.modules())[::-1] if model is not None else []
    training = [module.training for module in modules]
    with ExitStack() as stack:
        for module, was in zip(modules, training, strict=True) if not train else ():
            stack.callback(setattr, module, "training", was)
            # not model.eval(): a class that overrides it may do more there than can be undone here
            module.training = False
        if not train:
            stack.enter_context(torch.set_grad_enabled(grad))
        if compiled := list(filter(_is_compiled, modules)):
            # a compiled module skips hooks that were set after its compilation
            stack.enter_context(_eagerly(compiled))
        yield Borrowed(stack)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _eagerly(compiled: list[nn.Module]) -> Iterator[None]:
    """What was compiled runs as it was written."""
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    # until torch 2.6, which has stances, is the oldest: what each module calls is put aside
    with ExitStack() as stack:
        for module in compiled:
            inside, own = getattr(module, "_orig_mod", None), vars(module)
            name = "_compiled_call_impl" if inside is None else "forward"
            stack.callback(own.__setitem__, name, own[name])
            own[name] = None if inside is None else inside.__call__
        yield


def without_compile(model: Any) -> Any:
    """The module that ``torch.compile`` was given: DistributedDataParallel may be inside."""
    while isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod
    return model


def outermost(forward: Any) -> nn.Module | None:
    """What to borrow where ``forward`` itself is called: a compiled wrapper would skip the hooks on what is inside."""
    module = forward if isinstance(forward, nn.Module) else unwrap(forward)
    return module if isinstance(module, nn.Module) else None


def process_group(model: Any) -> Any:
    """The group of a model in DistributedDataParallel, compiled or not; None for another."""
    outer = without_compile(model)
    return outer.process_group if isinstance(outer, nn.parallel.DistributedDataParallel) else None


def unwrap(model: Any) -> Any:
    """The module inside ``torch.compile``, DataParallel, DistributedDataParallel, or behind ``model.forward``."""
    while True:
        model = without_compile(model)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif getattr(model, "__name__", "") == "forward" and isinstance(getattr(model, "__self__", None), nn.Module):
            model = model.__self__
        else:
            return model
