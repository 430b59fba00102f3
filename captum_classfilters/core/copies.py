"""Copies of a user's model that are proved to be copies: nothing in them leads back to the original.

A module can carry a function that still calls the original, such as ``model.forward = torch.compile(model.forward)``;
such a copy would change nothing, or the wrong network.
"""

import copy
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from captum_classfilters.core.errors import LayerError, brief

_LOCKS = ("lock", "RLock", "Condition", "Event", "Semaphore")


def copied(model: nn.Module, replaced: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A deep copy of a model, in which some modules may be replaced.

    Tensors that hold a graph, as cached features and the weights of the old ``weight_norm`` do, are copied without it.
    Locks are shared. A compiled ``forward`` is copied uncompiled.

    Args:
        model: The model; not changed.
        replaced: For a module of the model, what stands in its place in the copy; it is not copied.

    Raises:
        LayerError: The model cannot be copied, or something in the copy would still run the original.
    """
    memo: dict[int, Any] = {id(old): new for old, new in (replaced or {}).items()}
    for module in model.modules():
        for value in _reachable(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif type(value).__name__ in _LOCKS and type(value).__module__ in ("_thread", "threading"):
                memo[id(value)] = value
    keep = list(memo.values())  # deepcopy knows objects by their addresses
    try:
        twin: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:  # deepcopy raises whatever a class's own methods do
        raise LayerError(
            f"the model cannot be copied ({type(error).__name__}: {brief(error)}); take what is no part of the "
            "network, such as a logger or an open file, off it first"
        ) from error
    del keep
    _uncompile(twin)
    originals = {id(module) for module in model.modules()} - {id(module) for module in twin.modules()}
    for name, module in twin.named_modules():
        for attribute, value in vars(module).items():
            if any(id(inner) in originals for inner in _called(value)):
                owner = name or "the model itself"
                raise LayerError(
                    f"{attribute!r} of {owner} is a function that runs the original model, so a copy would not be one; "
                    f"define it in the class, or delete it first: del model.{attribute}"
                )
    return twin


def _uncompile(twin: nn.Module) -> None:
    """Let the class's own forward run where ``forward`` was compiled: the compiled one is the original's."""
    for module in twin.modules():
        compiled: Any = vars(module).get("forward")
        if hasattr(compiled, "_torchdynamo_orig_callable"):
            original = inspect.unwrap(compiled)
            if getattr(original, "__func__", original) is type(module).forward:
                del module.forward


def _reachable(value: Any, depth: int = 3) -> Iterator[Any]:
    """Values in dicts, lists and tuples, a few levels deep."""
    if isinstance(value, Mapping):
        for item in list(value.values()):
            yield from _reachable(item, depth - 1) if depth else ()
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _reachable(item, depth - 1) if depth else ()
    else:
        yield value


def _called(value: Any, depth: int = 6, seen: frozenset[int] = frozenset()) -> Iterator[nn.Module]:
    """Modules that a function may run: those it is bound to, encloses, or names."""
    if depth == 0 or id(value) in seen:
        return
    seen = seen | {id(value)}
    inner: list[Any] = []
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, types.MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.FunctionType):
        names = {name: value.__globals__.get(name) for name in value.__code__.co_names}
        # of other functions in the module only those count that are named; their own names are not followed
        inner = [item for item in names.values() if isinstance(item, nn.Module | types.MethodType)]
        inner += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
        for cell in value.__closure__ or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:  # empty: its name was deleted
                continue
    elif callable(value) and not isinstance(value, type):
        inner = list(getattr(value, "__dict__", {}).values())
    for item in inner:
        yield from _called(item, depth - 1, seen)
