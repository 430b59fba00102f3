"""Take the user's model for a while and give it back as it was.

Eval mode, hooks and eager execution hold inside one ``with`` block. Nothing is ever written onto the model
besides these, so restoring what was saved is enough. One thread at a time borrows a module, others wait; a thread that
runs the model meanwhile without borrowing it runs it in eval mode. `core/head_pass.py` is the main borrower.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

Hook = Callable[..., Any]


class _Undone:
    """What is undone on the way out, last first. Ctrl-C in the middle of it leaves nothing undone behind."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def add(self, step: Callable[[], Any]) -> None:
        """``step`` may run twice, and before what it undoes was done."""
        self._steps.append(step)

    def __enter__(self) -> "_Undone":
        return self

    def __exit__(self, *_: Any) -> None:
        interrupted: BaseException | None = None
        while self._steps:
            try:
                while self._steps:
                    # first run, then taken off: an interrupt between the two runs it again
                    self._steps[-1]()
                    self._steps.pop()
            except KeyboardInterrupt as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted


class _Owners:
    """Which thread borrows which modules; others wait for them."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        # a module's id: the thread, and one object for each time that it borrowed the module
        self._held: dict[int, tuple[int, set[object]]] = {}

    def take(self, modules: Iterable[nn.Module], thread: int, loan: object) -> None:
        """Wait until no other thread has any of the modules, then take them all."""
        keys = [id(module) for module in modules]
        with self._change:
            while any(self._held.get(key, (thread,))[0] != thread for key in keys):
                self._change.wait()
            for key in keys:
                self._held.setdefault(key, (thread, set()))[1].add(loan)

    def give_back(self, modules: Iterable[nn.Module], loan: object) -> None:
        """Undo `take`, whole or begun; a second time does nothing."""
        with self._change:
            for key in map(id, modules):
                if key in self._held:
                    self._held[key][1].discard(loan)
                    if not self._held[key][1]:
                        del self._held[key]
            self._change.notify_all()


_OWNERS = _Owners()


class Borrowed:
    """What a borrower may do: put hooks on modules. They leave with the ``with`` block."""

    def __init__(self, undone: _Undone) -> None:
        self._undone = undone

    def after(self, module: nn.Module, hook: Hook) -> Callable[[], None]:
        """Call ``hook(module, args, output)`` after each forward of ``module``; returns what removes it early."""
        return self._set(module._forward_hooks, module.register_forward_hook, hook)

    def before(self, module: nn.Module, hook: Hook) -> Callable[[], None]:
        """Call ``hook(module, args)`` before each forward of ``module``; the arguments it returns replace them."""
        return self._set(module._forward_pre_hooks, module.register_forward_pre_hook, hook)

    def _set(self, hooks: dict[int, Hook], register: Callable[[Hook], Any], hook: Hook) -> Callable[[], None]:
        def ours(*args: Any) -> Any:
            return hook(*args)

        def remove() -> None:
            for key in [key for key, value in list(hooks.items()) if value is ours]:
                hooks.pop(key, None)

        # before the hook is there: an interrupt between the two would leave it behind
        self._undone.add(remove)
        register(ours)
        return remove


@contextmanager
def borrowed(model: nn.Module | None, *, grad: bool = False, train: bool = False) -> Iterator[Borrowed]:
    """Eval mode, no gradients (unless ``grad``), no compilation; on the way out all is as before.

    ``train``: a step of training; modes are left as they are, and so is what the caller says of gradients.

    ``training`` is restored module by module: a model whose batch norms were frozen by hand stays so.
    ``model=None``: a bare function, of which only the hooked layers are known.
    """
    # outermost modules are given back first: until torch 2.5 a compiled one writes a stale mode into the one inside
    modules = list(model.modules())[::-1] if model is not None else []
    undone = _Undone()
    # twice: what an interrupt at the first line of the inner exit leaves, the outer one undoes
    # a step of training changes no modes, so threads that serve one network need not wait for one another
    with nullcontext() if train else _taken(modules), undone, undone, ExitStack() as stack:
        # read once the modules are ours: another thread may have had them
        training = [module.training for module in modules]
        for module, was in zip(modules, training, strict=True) if not train else ():
            undone.add(partial(setattr, module, "training", was))
            # not model.eval(): a class that overrides it may do more there than can be undone here
            module.training = False
        if not train:
            undone.add(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
            torch.set_grad_enabled(grad)
        if compiled := list(filter(_is_compiled, modules)):
            # a compiled module skips hooks that were set after its compilation
            stack.enter_context(_eagerly(compiled))
        yield Borrowed(undone)


@contextmanager
def _taken(modules: list[nn.Module]) -> Iterator[None]:
    loan, undone = object(), _Undone()
    with undone, undone:
        # before they are taken: an interrupt between the two would keep them for ever
        undone.add(partial(_OWNERS.give_back, modules, loan))
        _OWNERS.take(modules, threading.get_ident(), loan)
        yield


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
