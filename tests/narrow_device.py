"""A second device without float64, emulated: tensors that say they are on it, hold numbers, and refuse the CPU's.

As on Apple's and some other accelerators, a tensor of float64 is a TypeError there. What is computed is computed on the
CPU, in the same types.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "slim"


class _Guard(torch._C._acc.DeviceGuard):
    """What autograd asks: there is one such device."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1

    def device_count_(self) -> int:
        return 1


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def set_up() -> None:
    """Let torch know the device, until the process ends: not on import, because collecting doctests imports files."""
    _setup_privateuseone_for_python_backend(NAME, _Backend(), device_guard=_Guard())


_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class NarrowTensor(torch.Tensor):
    """A tensor of the emulated device."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> "NarrowTensor":
        if inside.dtype in (torch.float64, torch.complex128):
            raise TypeError("this device has no float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"NarrowTensor({self.inside})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class NarrowDevice(TorchDispatchMode):
    """``with NarrowDevice():`` tensors can be made on the device ``NAME``, and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    narrow = [tensor for tensor in tensors if isinstance(tensor, NarrowTensor)]
    asked = kwargs.get("device")
    there = bool(narrow) if asked is None else torch.device(asked).type == NAME
    if not there and not narrow:
        return func(*args, **kwargs)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], NarrowTensor)
    elif func not in _MOVES and any(t.dim() and not isinstance(t, NarrowTensor) for t in tensors):
        raise RuntimeError(f"expected all tensors to be on the same device, got {NAME} and cpu in {func}")
    # in place, the tensor that comes back is the one that was given
    wrappers = {id(tensor.inside): tensor for tensor in narrow}
    args, kwargs = tree_map(lambda v: v.inside if isinstance(v, NarrowTensor) else v, (args, kwargs))
    result = func(*args, **kwargs)
    if not there:
        return result

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return wrappers[id(value)] if id(value) in wrappers else NarrowTensor(value)

    return tree_map(wrapped, result)
