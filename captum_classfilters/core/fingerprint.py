"""The fingerprint by which paths know their network; weights are hashed again only where they have changed."""

import hashlib
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# The last fingerprint of a module, and the versions of its tensors at that time
_LAST: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def fingerprint(owner: nn.Module, structure: Any, tensors: Iterable[Tensor]) -> str:
    """Sixteen hexadecimal digits of ``structure``, by its repr, and of the values of ``tensors``.

    Args:
        owner: Whose fingerprint it is; as long as its tensors have not changed, they are not hashed again.
        structure: What does not change while the owner lives.
        tensors: Parameters and buffers in order.
    """
    tensors = list(tensors)
    versions = [_version(value) for value in tensors]
    last = _LAST.get(owner)
    if last is None or None in versions or last[0] != versions:
        digest = hashlib.sha256(repr(structure).encode())
        for value in tensors:
            digest.update(_bytes_of(value))
        last = _LAST[owner] = versions, digest.hexdigest()[:16]
    return last[1]


def of_network(network: Any) -> str:
    """The fingerprint of a network's parameters; "" for what has none.

    Buffers do not count: running statistics may differ between the ranks of one training.
    """
    if not isinstance(network, nn.Module):
        return ""
    named = list(network.named_parameters())
    shapes = [(name, tuple(value.shape)) for name, value in named]
    return fingerprint(network, shapes, [value for _, value in named])


def _version(value: Tensor) -> Any:
    """Something that differs after the tensor has changed; None where torch does not count changes."""
    if not isinstance(value, nn.Parameter):
        # the content: a batch norm changes its buffers without counting
        return _bytes_of(value)
    if value.is_inference():
        return None
    # a weak reference: as long as it lives, no other storage has the same address
    storage = StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
    return storage, value.data_ptr(), value.shape, value.stride(), value._version


def _bytes_of(value: Tensor) -> bytes:
    # NumPy has no bfloat16
    whole = value.detach().cpu().to(torch.promote_types(value.dtype, torch.float32))
    return whole.contiguous().numpy().tobytes()
