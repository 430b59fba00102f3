"""What every training loop of this package needs: batches on the model's device, random states that can be kept.

`heads/recover.py` and `gating/fit.py` hold the loops.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_classfilters.core.errors import EmptyLoaderError, OptionError
from captum_classfilters.core.stream import check_labels, unpack, value_to_model


def to_model(raw: Any, index: int, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], Tensor]:
    """One batch of a loader as ``(inputs, labels)``: inputs where the model is and of its dtype, labels checked."""
    inputs, labels = unpack(raw, True, index)
    moved = tuple(value_to_model(value, device, dtype) for value in inputs)
    return moved, check_labels(labels, len(moved[0]), index).to(device)


def refuse_iterators(loader: Any, name: str) -> None:
    """Refuse what can be read only once and is needed more often."""
    if isinstance(loader, Iterator):
        raise EmptyLoaderError(
            f"{name} is an iterator, {type(loader).__name__}, which can be read only once, and is needed more often; "
            "pass a DataLoader or a list"
        )


def get_random(device: torch.device, loader: Any) -> dict[str, Any]:
    """The state of every generator a training may draw from: torch's, numpy's, Python's, the loader's own."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random(state: dict[str, Any], device: torch.device, loader: Any) -> None:
    """Put back what `get_random` gave."""
    own = _generators(loader)
    if len(own) != len(state["loader"]):
        raise OptionError(
            f"the loader has {len(own)} generators, the one whose states were kept had {len(state['loader'])}; pass "
            "one that was made the same way"
        )
    for generator, found in zip(own, state["loader"], strict=True):
        generator.set_state(found.cpu())
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def samplers(loader: Any) -> list[Any]:
    """The samplers of a DataLoader, the one inside of its batch sampler among them."""
    batches = getattr(loader, "batch_sampler", None)
    found = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _generators(loader: Any) -> list[torch.Generator]:
    """Those that a DataLoader and its samplers were given; one that several share comes once."""
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers(loader))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
