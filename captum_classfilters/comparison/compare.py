"""`compare`: which method finds the channels that matter, and at what cost?

`methods.py` runs the methods. N samples, C classes, K channels: the features that the head reads.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from captum_classfilters.class_filters import ClassFilters, check_table, names_of, warn_unseen
from captum_classfilters.comparison.methods import (
    SELECTORS,
    Answer,
    Attribution,
    check_attributions,
    run_attribution,
    run_selectors,
    run_weights,
    selector_name,
)
from captum_classfilters.core.check import integers
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.core.stream import refuse_iterator
from captum_classfilters.gating import LabelSensitiveGate
from captum_classfilters.metrics.accuracy import KeepCounts
from captum_classfilters.metrics.interventions import DropCounts
from captum_classfilters.metrics.sets import random_jaccard


def compare(
    model: Any,
    loader: Iterable[Any] | None = None,
    test_loader: Iterable[Any] | None = None,
    ks: Sequence[int] = (1, 3, 5, 10),
    *,
    gate: LabelSensitiveGate | None = None,
    attributions: Mapping[str, Attribution] | None = None,
    layer: nn.Module | str | None = None,
    control: Control = Control(),
) -> pd.DataFrame:
    """Run every method on one network and one loader, and judge them on other images.

    ``loader`` is read twice, and once more for each attribution; ``test_loader`` is read once.

    Args:
        model: The network; borrowed. Or a `HeadPass` over the loader to find filters from, with class names and
            ``show_progress``; then ``loader`` is left out.
        loader: Batches ``(inputs, labels)`` to find filters from. It is read several times: no iterator.
        test_loader: Batches to judge the filters by, of other images.
        ks: Numbers of channels of each class, in ``[1, K]``.
        gate: The gate that the network was trained with, if any.
        attributions: Captum layer attributions by name, of the map whose channels the head reads, such as
            ``{"gradient x activation": LayerGradientXActivation(model, model.layer4)}``; with options as a pair:
            ``{"IG": (LayerIntegratedGradients(model, model.layer4), {"n_steps": 10})}``.
        layer: The head, if it cannot be found.
        control: Random tables.

    Returns:
        One row for each method and k, and for the control: ``method`` ``"random"``, ``control`` True.

        - ``keep``: accuracy when each class's logit keeps only its k channels, with ``keep_low``, ``keep_high``
          (Wilson; Student-t over draws for the control). ``dense``: accuracy with all channels.
        - ``drop_own``: accuracy when every image loses the k channels of its own class (lower is better);
          ``drop_other``: when it loses those of another class, drawn for each image (higher is better). Both have
          ``_low``, ``_high``. The control loses k random channels.
        - ``class_overlap``: Jaccard index of two classes' sets, mean over pairs. The control of this and of the next
          two columns is the index of two random sets.
        - ``agreement``: Jaccard index with the other methods' sets, mean over methods and classes.
        - ``stability``: Jaccard index of a class's sets from two halves of the samples, mean over classes; NaN for
          methods that look at no samples, and if no class has samples in both halves.
        - ``sparsity``: Hoyer's measure of a class's scores, mean over classes: 0 for equal scores, 1 for one channel.
        - ``passes``: wall time divided by that of one inference pass over the loader. ``samples``: of the test loader.

    Raises:
        OptionError: k is out of range, a name is taken, or a loader is missing.
        EmptyLoaderError: ``loader`` can be read only once, or a loader gave no sample.
        ShapeError: An attribution belongs to another network, or to a layer whose channels the head does not read.
    """
    head_pass = HeadPass.of(model, loader, layer)
    if test_loader is None:
        raise OptionError("test_loader is missing: pass batches that had no part in finding the filters")
    refuse_iterator(head_pass.loader, "loader")
    head = head_pass.head
    ks = integers(ks, "ks", 1, head.num_features, meaning="the number of channels")
    class_names = names_of(head_pass.class_names, head.num_classes, head_pass.loader, head_pass.model)
    taken = ["random", "ALDSplitter", "LabelSensitiveGate", *map(selector_name, SELECTORS)]
    attributions = check_attributions(attributions, taken, head_pass)

    _say(head_pass, "methods of weights, selectors")
    of_weights = run_weights(head_pass.model, head, gate, class_names)
    of_selectors, inference = run_selectors(head_pass, class_names)
    answers = {"ALDSplitter": of_weights.pop("ALDSplitter")} | of_selectors | of_weights
    for name, attribution in attributions.items():
        _say(head_pass, name)
        answers[name] = run_attribution(attribution, head, head_pass.loader, class_names)
    for answer in answers.values():
        check_table(answer.filters, head)
    tables = {name: answer.filters for name, answer in answers.items()}
    warn_unseen(tables[selector_name(SELECTORS[0])], stacklevel=3, result=tables)

    _say(head_pass, "judging")
    keep, drop = KeepCounts(head, tables, ks, control), DropCounts(head, tables, ks, control)
    with head_pass.over(test_loader).batches(description="compare") as stream:
        for batch in stream:
            keep.add(batch)
            drop.add(batch)
    curve = keep.frame(class_names)
    whole = curve[curve.class_name == "all"].to_dict("records")
    accuracy = {(row["filters"], row["k"]): row for row in whole}
    dense = accuracy["dense", head.num_features]["accuracy"]
    masks = {(name, k): table.mask(k) for name, table in tables.items() for k in ks}
    rows = []
    for name in [*tables, "random"]:
        for k in ks:
            kept = accuracy[name, k]
            judged = {"dense": dense, "keep": kept["accuracy"], "keep_low": kept["low"], "keep_high": kept["high"]}
            judged |= drop.columns(None if name == "random" else name, k)
            if name == "random":
                chance = random_jaccard(k, head.num_features)[0]
                sets = dict.fromkeys(("class_overlap", "agreement", "stability"), chance)
                cost = {"sparsity": np.nan, "passes": np.nan}
            else:
                sets = _sets(name, answers[name], masks, k)
                cost = {"sparsity": _hoyer(tables[name]), "passes": answers[name].seconds / inference}
            row = {"method": name, "control": name == "random", "k": k}
            rows.append({**row, **judged, "samples": drop.samples, **sets, **cost})
    return pd.DataFrame(rows)


def _say(head_pass: HeadPass, what: str) -> None:
    if head_pass.show_progress:
        print(f"compare: {what}", flush=True)


def method_overlap(tables: Mapping[str, ClassFilters], k: int) -> pd.DataFrame:
    """Jaccard index of two methods' top-k sets of a class, mean over classes.

    Args:
        tables: By name, of the same network.
        k: Channels of each class.

    Returns:
        One row for each pair, and one for two random sets (``control`` True, both names ``"random"``): ``method_a``,
        ``method_b``, ``control``, ``jaccard``, ``low``, ``high`` (central 95 % over classes; for the control over
        random sets).

    Raises:
        OptionError: k is out of range.
    """
    rows: list[dict[str, Any]] = []
    for a, b in combinations(tables, 2):
        of_classes = _jaccard(tables[a].mask(k), tables[b].mask(k))
        low, high = np.nanquantile(of_classes, [0.025, 0.975])
        pair = {"method_a": a, "method_b": b, "control": False}
        rows.append({**pair, "jaccard": np.nanmean(of_classes), "low": low, "high": high})
    jaccard, low, high = random_jaccard(k, next(iter(tables.values())).num_channels)
    chance = {"method_a": "random", "method_b": "random", "control": True}
    rows.append({**chance, "jaccard": jaccard, "low": low, "high": high})
    return pd.DataFrame(rows)


def _sets(name: str, answer: Answer, masks: Mapping[tuple[str, int], Tensor], k: int) -> dict[str, float]:
    """How well sets agree between classes, between methods, and between halves of the samples."""
    table, mask = answer.filters, masks[name, k]
    pairs = table.overlap(k)[tuple(torch.triu_indices(table.num_classes, table.num_classes, 1))].numpy()
    others = [
        np.nanmean(_jaccard(mask, other)) for (method, size), other in masks.items() if size == k and method != name
    ]
    stability = np.nan
    if answer.halves is not None:
        of_classes = _jaccard(*(half.mask(k) for half in answer.halves))
        # a class without samples in one half has no set there
        of_classes[~(answer.halves[0].seen & answer.halves[1].seen).numpy()] = np.nan
        stability = float("nan") if np.isnan(of_classes).all() else np.nanmean(of_classes)
    return {
        "class_overlap": float(np.nanmean(pairs)) if len(pairs) else float("nan"),
        "agreement": float(np.mean(others)) if others else float("nan"),
        "stability": float(stability),
    }


def _jaccard(a: Tensor, b: Tensor) -> Any:
    """Jaccard index of each class's two sets, ``(C,)``; NaN where both are empty."""
    shared, union = (a & b).sum(1).double(), (a | b).sum(1)
    return (shared / union).numpy()


def _hoyer(table: ClassFilters) -> float:
    """Sparsity of a class's scores, Hoyer 2004, section 3.1, mean over classes; scores below 0 count as 0."""
    scores = table.scores[table.seen].clamp(min=0)
    root = table.num_channels**0.5
    norms = scores.norm(dim=1)
    of_classes = (root - scores.sum(1) / norms.clamp(min=1e-300)) / (root - 1)
    return float(of_classes[norms > 0].mean())
