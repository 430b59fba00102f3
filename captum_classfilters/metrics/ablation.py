"""Are a class's influential channels essential to it? Overwrite them, or the others, and run the full head."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_k, check_table, one_table
from captum_classfilters.core.control import random_masks
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head_pass import batches
from captum_classfilters.metrics.accuracy import check_draws
from captum_classfilters.metrics.intervals import mean_interval, wilson, with_all

_MODES = ("noise", "zero", "mean")


def class_ablation(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any],
    k: int,
    *,
    modes: Sequence[str] = _MODES,
    means: Tensor | None = None,
    layer: nn.Module | str | None = None,
    draws: int = 5,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Recall of each class when its own channels are overwritten, against random ones and against the rest.

    Source: the "essential" test of the code published with Badola et al. 2022: influential features become N(0, 1),
    then the others do. Differs: also zeros and means, a random control of the same size, intervals.

    Args:
        model: The network; borrowed.
        filters: Whose top-k channels are the influential ones.
        loader: Batches ``(inputs, labels)``.
        k: Channels of each class, in ``[1, K]``.
        modes: What is written over them: ``"noise"`` N(0, 1), ``"zero"``, ``"mean"``.
        means: ``(K,)`` for ``"mean"``; None: the mean features of the samples behind ``filters``, which its mass
            gives as long as no feature is negative.
        layer: The head, if it cannot be found.
        draws: Random sets of k channels for each class, at least 5.
        seed: Of sets and noise.
        show_progress: A tqdm bar.

    Returns:
        One row for each class (and ``"all"``), ``mode`` and ``channels``: ``"none"`` (mode ``"intact"``),
        ``"influential"``, ``"random"`` (k others or the same, by chance) and ``"rest"`` (all but the influential).
        ``accuracy`` (recall), ``low``, ``high`` (Wilson; Student-t over the draws for random), ``drop`` against intact,
        ``samples``.

    Raises:
        OptionError: k, modes or draws out of range; mean of features that can be negative without ``means``.
        ShapeError: A table of another network.
    """
    check_k(k, one_table(filters).num_channels, "k")
    check_draws(draws)
    modes = [modes] if isinstance(modes, str) else list(modes)
    if not modes or any(mode not in _MODES for mode in modes):
        raise OptionError(f"modes must be some of {list(_MODES)}, got {list(modes)}")
    if means is not None and (not isinstance(means, Tensor) or means.shape != (filters.num_channels,)):
        raise ShapeError(
            f"means must be a tensor of shape ({filters.num_channels},), one for each channel; got {means!r}"
        )
    generator = torch.Generator().manual_seed(seed)
    sets = _sets(filters, k, draws, generator)
    right = {(mode, name): np.zeros(filters.num_classes, int) for mode in modes for name in sets}
    intact, samples = np.zeros(filters.num_classes, int), np.zeros(filters.num_classes, int)
    with batches(model, loader, layer=layer, show_progress=show_progress, description="class_ablation") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            # of a class that the table has not seen nothing can be said
            known = filters.seen.to(batch.labels.device)[batch.labels]  # type: ignore[union-attr]
            labels: Tensor = batch.labels[known]  # type: ignore[index]
            features = batch.features[known].to(batch.head.weight.dtype)
            count = _by_class(labels, filters.num_classes)
            samples += count(torch.ones_like(labels))
            intact += count(batch.logits[known].argmax(1) == labels)
            for mode in modes:
                written = _written(mode, features, batch.head.name, filters, means, generator)
                for name, chosen in sets.items():
                    changed = torch.where(chosen.to(labels.device)[labels], written, features)
                    logits = F.linear(changed, batch.head.weight, batch.head.bias)
                    right[mode, name] += count(logits.argmax(1) == labels)
    return _frame(right, intact, samples, modes, draws, filters.class_names)


def _sets(filters: ClassFilters, k: int, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    own = filters.mask(k)
    sets = {"influential": own, "rest": ~own}
    return sets | {
        f"random {draw}": mask for draw, mask in enumerate(random_masks(tuple(own.shape), k, draws, generator))
    }


def _written(
    mode: str,
    features: Tensor,
    layer: str,
    filters: ClassFilters,
    means: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    if mode == "zero":
        return torch.zeros_like(features)
    if mode == "noise":
        return torch.randn(features.shape, generator=generator).to(features)
    if means is None:
        if bool((features < 0).any()):
            raise OptionError(
                f"features of layer {layer!r} can be negative, so the table's mass is not their sum; pass "
                "means= "
                "(the mean of each feature over training images), or leave the mode 'mean' out"
            )
        means = filters.mass.sum(0) / filters.counts.sum()
    return means.to(features).expand_as(features)


def _by_class(labels: Tensor, classes: int) -> Callable[[Tensor], Any]:
    def count(flags: Tensor) -> Any:
        return torch.bincount(labels[flags.bool()], minlength=classes).cpu().numpy()

    return count


def _frame(
    right: dict[tuple[str, str], Any], intact: Any, samples: Any, modes: Sequence[str], draws: int, names: Sequence[str]
) -> pd.DataFrame:
    samples, intact = with_all(samples), with_all(intact)
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = intact / samples
        parts = [("intact", "none", whole, *wilson(intact, samples))]
        for mode in modes:
            for name in ("influential", "rest"):
                found = with_all(right[mode, name])
                parts.append((mode, name, found / samples, *wilson(found, samples)))
            control = np.stack([with_all(right[mode, f"random {draw}"]) / samples for draw in range(draws)])
            parts.append((mode, "random", *mean_interval(control)))
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "class_name": ["all", *names],
                    "mode": mode,
                    "channels": channels,
                    "accuracy": accuracy,
                    "low": low,
                    "high": high,
                    "drop": whole - accuracy,
                    "samples": samples,
                }
            )
            for mode, channels, accuracy, low, high in parts
        ],
        ignore_index=True,
    )
