"""What several processes found, put together: sums over ``torch.distributed`` ranks.

Every rank passes over its own shard and comes here once, at the end. A rank that fails does not come: it raises at
once, and the others learn of it when the sum cannot be made, at the latest after the group's timeout.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

from captum_classfilters.core.borrow import unwrap
from captum_classfilters.core.errors import EmptyLoaderError, MergeError, OptionError, brief
from captum_classfilters.core.fingerprint import of_network

# True, False, or a group; None: all ranks, where torch.distributed has been started
Ranks: TypeAlias = "bool | dist.ProcessGroup | None"


def group_of(ranks: Ranks) -> Any:
    """The process group that is meant, or None for this process alone.

    Raises:
        OptionError: True, but torch.distributed has not been started; or not a group.
    """
    started = dist.is_available() and dist.is_initialized()
    if ranks is None or ranks is True:
        if ranks and not started:
            raise OptionError(
                "distributed=True, but torch.distributed has not been started; call init_process_group first, or start "
                "the script with torchrun"
            )
        return dist.group.WORLD if started and dist.get_world_size() > 1 else None
    if ranks is False:
        return None
    if not started or not isinstance(ranks, dist.ProcessGroup):
        raise OptionError(f"distributed must be True, False, None or a process group, got {type(ranks).__name__}")
    return ranks


def sum_over(
    group: Any, mine: dict[str, Tensor] | None, about: Any, *, same: Collection[str] = (), network: Any = None
) -> tuple[dict[str, Tensor], Any]:
    """Add up tensors of all ranks: ``(sums, about)``, on the CPU.

    Args:
        group: From `group_of`, not None.
        mine: Named tensors; None for a rank whose shard was empty.
        about: What must be the same on all ranks for the sum to make sense; anything that compares and pickles.
        same: Names of tensors that all ranks have alike: taken, not added up.
        network: What the ranks ran; those of all ranks must have the same weights.

    Raises:
        MergeError: The ranks' tensors do not belong together, or one did not come.
        EmptyLoaderError: No rank has anything.
    """
    mine_told = None
    if mine is not None:
        kinds = {name: (tuple(t.shape), t.dtype, name in same) for name, t in mine.items()}
        mine_told = (kinds, about, of_network(unwrap(network)))
    told: list[Any] = [None] * dist.get_world_size(group)
    _together(partial(dist.all_gather_object, told, mine_told, group))
    present = [found for found in told if found is not None]
    if not present:
        raise EmptyLoaderError("the loaders of all ranks gave no sample; expected at least one batch on one of them")
    for rank, found in enumerate(told):
        if found is not None and found[:2] == present[0][:2] and found[2] != present[0][2]:
            raise MergeError(
                f"the networks of the ranks have different weights (fingerprints {found[2]} on rank {rank} and "
                f"{present[0][2]} on another); load the same checkpoint on all of them"
            )
        if found is not None and found != present[0]:
            raise MergeError(
                f"the ranks do not pass over the same network with the same options: rank {rank} has {brief(found)}, "
                f"another has {brief(present[0])}; give all of them the same"
            )
    kinds, about, _ = present[0]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    sums = {}
    for name, (shape, dtype, taken) in kinds.items():
        neutral = torch.full(shape, -torch.inf if taken else 0, dtype=dtype)
        total = (neutral if mine is None else mine[name]).to(device, copy=True)
        _together(partial(dist.all_reduce, total, dist.ReduceOp.MAX if taken else dist.ReduceOp.SUM, group))
        sums[name] = total.cpu()
    return sums, about


def _together(step: Callable[[], Any]) -> None:
    try:
        step()
    except (RuntimeError, ValueError) as error:
        raise MergeError(
            f"another rank ended early or did not come in time ({brief(error)}); what this rank found is in "
            "error.partial_result: save it, pass over the lost shard again, and merge the two"
        ) from error
