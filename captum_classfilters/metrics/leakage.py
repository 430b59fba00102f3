"""How much of what a gated network scores comes from the label that its gate was told."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_table, one_table
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import batches
from captum_classfilters.metrics.accuracy import check_draws
from captum_classfilters.metrics.gates import as_gate
from captum_classfilters.metrics.intervals import mean_interval, wilson

_FEATURES = ("own", "other classes", "noise")


def gate_leakage(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any],
    *,
    layer: nn.Module | str | None = None,
    draws: int = 5,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """How often the network answers with the label that its gate was told, on features that show it and that do not.

    A gate reads the true label, so the gated path's score is leakage and no accuracy. This says how much the label
    alone gives: features of an image of *another* class, and noise, are gated with a label that they do not show.

    Args:
        model: The network; borrowed.
        filters: The gate's table, ``gate.class_filters()``; of another table each channel is divided by its largest.
        loader: Batches ``(inputs, labels)``.
        layer: The head, if it cannot be found.
        draws: Random gates, at least 5: the same table, its classes shuffled within every channel.
        seed: Of shuffles, labels and noise.
        show_progress: A tqdm bar.

    Returns:
        One row for each ``features`` and ``gate``. Features: ``"own"``, the sample's label is told; ``"other
        classes"``, one of the others, at random, is told; ``"noise"``: ``|N(0, 1)|`` times each channel's root mean
        square in the batch, with a random sign where features have one, the sample's label told. Gate: ``"none"``,
        ``"own"``, ``"random"``. ``label_recovered``: the share of samples answered with the label that was told; for
        own features without a gate this is the network's accuracy, and nowhere else. ``low``, ``high``: Wilson;
        Student-t over draws for random; ``chance``, ``1 / C``; ``samples``.

    Raises:
        OptionError: Draws out of range, or a single class.
        ShapeError: A table of another network.
    """
    check_draws(draws)
    if one_table(filters).num_classes < 2:
        raise OptionError("a gate of at least two classes was expected, for labels of others are told; got one")
    # apart, so that the labels told do not depend on how large batches are
    labelled, noisy = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    tables = {"own": as_gate(filters.scores)}
    for draw in range(draws):
        order = torch.rand(filters.scores.shape, generator=labelled).argsort(0)
        tables[f"random {draw}"] = tables["own"].gather(0, order)
    hits = {(features, name): 0 for features in _FEATURES for name in ("none", *tables)}
    samples = 0
    with batches(model, loader, layer=layer, show_progress=show_progress, description="gate_leakage") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            labels: Tensor = batch.labels  # type: ignore[assignment]
            samples += len(labels)
            shown = batch.features.to(batch.head.weight.dtype)
            step = torch.randint(1, filters.num_classes, labels.shape, generator=labelled).to(labels.device)
            told = {"own": labels, "other classes": (labels + step) % filters.num_classes, "noise": labels}
            seen = {"own": shown, "other classes": shown, "noise": _noise(shown, noisy)}
            for features in _FEATURES:
                for name in ("none", *tables):
                    rows = tables[name].to(shown)[told[features]] if name in tables else 1.0
                    hits[features, name] += _recovered(seen[features] * rows, told[features], batch.head)
    return _frame(hits, samples, draws, filters.num_classes)


def _noise(features: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(features.shape, generator=generator).to(features)
    if not bool((features < 0).any()):
        noise = noise.abs()
    return noise * features.square().mean(0).sqrt()


def _recovered(features: Tensor, told: Tensor, head: Head) -> int:
    return int((F.linear(features, head.weight, head.bias).argmax(1) == told).sum())


def _frame(hits: dict[tuple[str, str], int], samples: int, draws: int, classes: int) -> pd.DataFrame:
    rows = []
    for features in _FEATURES:
        for gate in ("none", "own"):
            found = hits[features, gate]
            rows.append((features, gate, found / samples, *map(float, wilson(found, samples))))
        control = np.array([hits[features, f"random {draw}"] for draw in range(draws)]) / samples
        rows.append((features, "random", *mean_interval(control)))
    columns = ["features", "gate", "label_recovered", "low", "high"]
    return pd.DataFrame(rows, columns=columns).assign(chance=1 / classes, samples=samples)
