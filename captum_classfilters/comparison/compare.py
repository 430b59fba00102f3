"""`compare`: which method finds the channels that matter, and at what cost? One frame, a control in every row.

What is compared is in `methods.py`. N samples, C classes, K channels: the features that the head reads.
"""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_k, check_table, warn_unseen
from captum_classfilters.comparison.methods import SELECTORS, Attribution, Method, check_attribution, known_methods
from captum_classfilters.core.errors import OptionError, UnseenClassWarning
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import batches
from captum_classfilters.gating import LabelSensitiveGate
from captum_classfilters.metrics import accuracy_curve
from captum_classfilters.metrics.accuracy import check_draws
from captum_classfilters.metrics.intervals import mean_interval, wilson
from captum_classfilters.metrics.sets import random_jaccard


class Found(NamedTuple):
    """What a method answered."""

    filters: ClassFilters
    halves: tuple[ClassFilters, ClassFilters] | None  # None: it looks at no samples, or its tables do not add up
    seconds: float


def compare(
    model: Any,
    loader: Iterable[Any],
    test_loader: Iterable[Any],
    ks: Sequence[int] = (1, 3, 5, 10),
    *,
    gate: LabelSensitiveGate | None = None,
    attributions: Mapping[str, Attribution] | None = None,
    layer: nn.Module | str | None = None,
    class_names: Sequence[str] | None = None,
    draws: int = 5,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Run every method on one network and one loader, and judge them on other images.

    Args:
        model: The network; borrowed.
        loader: Batches ``(inputs, labels)`` to find filters from; it is read several times, so no bare iterator.
        test_loader: Batches to judge by, that had no part in it.
        ks: How many channels of each class, each in ``[1, K]``.
        gate: The gate that the network was trained with, if any.
        attributions: Captum layer attributions by name, of the map whose channels the head reads (aggregated over the
            loader), such as ``{"gradient x activation": LayerGradientXActivation(model, model.layer4)}``; a pair has
            what is passed on to it: ``{"IG": (LayerIntegratedGradients(model, model.layer4), {"n_steps": 10})}``.
        layer: The head, if it cannot be found.
        class_names: C names; otherwise numbers.
        draws: Random tables for the control, at least 5.
        seed: Of these.
        show_progress: Say which method runs.

    Returns:
        One row for each method and k.

        - ``keep``: accuracy when each class's logit keeps its k channels alone, with ``keep_low``, ``keep_high``
          (Wilson); ``keep_random``: the control, with ``keep_random_low``, ``keep_random_high``. ``dense``: with all
          channels.
        - ``drop_own``: accuracy when every image loses the k channels of its own class, the lower the better;
          ``drop_other``: when it loses those of another class, drawn for each image, the higher the better. Each with
          ``_low``, ``_high`` (Wilson) and ``_random`` (k random channels in their place).
        - ``class_overlap``: Jaccard index of two classes' sets, mean over pairs; ``overlap_random``: of two
          random sets, here and in the next two.
        - ``agreement``: Jaccard index with the other methods' sets, mean over methods and classes.
        - ``stability``: Jaccard index of a class's sets from either half of the samples, mean over classes; NaN for
          methods that look at no samples, and where no class has samples in both halves.
        - ``sparsity``: Hoyer's measure of a class's scores, mean over classes: 0 all alike, 1 one channel alone.
        - ``passes``: wall time over that of one inference pass over the same loader. ``samples``: of the test loader.

    Raises:
        OptionError: k or draws out of range, a name that is taken, a loader that can be read only once.
        ShapeError: An attribution to a layer whose channels are not those that the head reads, or of another network.
    """
    check_draws(draws)
    if not isinstance(ks, Iterable) or isinstance(ks, str):
        raise OptionError(f"ks must be a list of numbers of channels, got {ks!r}")
    ks = list(ks)
    if attributions is not None and not isinstance(attributions, Mapping):
        raise OptionError(f"attributions must be given by name, a dict of them; got {type(attributions).__name__}")
    if iter(loader) is loader or iter(test_loader) is test_loader:
        raise OptionError("the loaders are read several times: pass a DataLoader or a list of batches, no iterator")
    head, seconds = _inference(model, loader, layer)
    for k in ks:
        check_k(k, head.num_features, "k")
    wanted = sorted({int(k) for k in ks})
    found = {}
    for name, given in (attributions or {}).items():
        check_attribution(name, given, model, head, loader)
    for name, method in known_methods(model, head, gate, attributions or {}, class_names).items():
        if show_progress:
            print(f"compare: {name}", flush=True)
        with warnings.catch_warnings():
            # said once, below; half of the batches may well lack a class
            warnings.simplefilter("ignore", UnseenClassWarning)
            found[name] = _run(method, loader, head)
        check_table(found[name].filters, head)
    tables = {name: each.filters for name, each in found.items()}
    warn_unseen(tables[f"InfluentialFeatures, {SELECTORS[0]}"], stacklevel=3)
    keep = _keep(accuracy_curve(model, tables, test_loader, wanted, layer=head.module, draws=draws, seed=seed))
    drop = _drop(model, head, tables, test_loader, wanted, draws, seed)
    rows = [
        {
            "method": name,
            "k": k,
            **keep[name, k],
            **drop[name, k],
            **_sets(name, tables, found[name].halves, k),
            "sparsity": _hoyer(each.filters),
            "passes": each.seconds / seconds,
        }
        for name, each in found.items()
        for k in wanted
    ]
    return pd.DataFrame(rows)


def method_overlap(tables: Mapping[str, ClassFilters], k: int) -> pd.DataFrame:
    """Jaccard index of two methods' top-k sets of a class, mean over classes.

    Args:
        tables: By name, of the same network.
        k: Channels of each class.

    Returns:
        One row for each pair: ``method_a``, ``method_b``, ``jaccard``, ``low``, ``high`` (central 95 % over classes);
        ``random``, ``random_low``, ``random_high``: of two random sets.

    Raises:
        OptionError: k out of range.
    """
    chance = random_jaccard(k, next(iter(tables.values())).num_channels)
    rows = []
    for a, b in combinations(tables, 2):
        each = _jaccard(tables[a].mask(k), tables[b].mask(k))
        low, high = np.nanquantile(each, [0.025, 0.975])
        rows.append({"method_a": a, "method_b": b, "jaccard": np.nanmean(each), "low": low, "high": high})
    frame = pd.DataFrame(rows, columns=["method_a", "method_b", "jaccard", "low", "high"])
    return frame.assign(random=chance[0], random_low=chance[1], random_high=chance[2])


# -- finding -----------------------------------------------------------------------------------------------------------


def _inference(model: Any, loader: Iterable[Any], layer: Any) -> tuple[Head, float]:
    """The head, and the seconds of one pass that does nothing else; the second pass counts, the first warms up."""
    for _ in range(2):
        started = time.perf_counter()
        with batches(model, loader, layer=layer, need_labels=False) as stream:
            for batch in stream:
                head = batch.head
        seconds = _clock(head) - started
    return head, seconds


class _Half:
    """About half of a loader's samples, drawn by seed: a loader may be sorted, or repeat its classes in turn."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        for raw in self._loader:
            size = _size(raw)
            yield _chosen(raw, torch.rand(size, generator=generator) < 0.5, size)


def _size(raw: Any) -> int:
    """Samples in a batch: the length of the first tensor in it."""
    if isinstance(raw, Tensor | np.ndarray):
        return len(raw) if raw.ndim else 0
    parts = list(raw.values()) if isinstance(raw, Mapping) else list(raw) if isinstance(raw, list | tuple) else []
    return next((size for size in map(_size, parts) if size), 0)


def _chosen(raw: Any, chosen: Tensor, size: int) -> Any:
    """The chosen samples of everything in a batch that has one entry for each."""
    if isinstance(raw, Tensor) and raw.ndim and len(raw) == size:
        return raw[chosen.to(raw.device)]
    if isinstance(raw, np.ndarray) and raw.ndim and len(raw) == size:
        return raw[chosen.numpy()]
    if isinstance(raw, Mapping):
        return {key: _chosen(value, chosen, size) for key, value in raw.items()}
    if isinstance(raw, list | tuple):
        if any(isinstance(value, Tensor | np.ndarray | Mapping | list | tuple) for value in raw) or len(raw) != size:
            return [_chosen(value, chosen, size) for value in raw]
        return [value for value, own in zip(raw, chosen.tolist(), strict=True) if own]
    return raw


def _run(method: Method, loader: Iterable[Any], head: Head) -> Found:
    """A method on the whole loader, timed, and on half of its samples; the other half is what is left of the whole.

    So it does not matter whether the loader shuffles: whatever the half is, the rest is the rest.
    """
    started = _clock(head)
    whole = method(loader)
    seconds = _clock(head) - started
    if whole.meta.get("merge", "sum") != "sum":
        return Found(whole, None, seconds)
    half = method(_Half(loader))
    return Found(whole, (half, _minus(whole, half)), seconds)


def _minus(whole: ClassFilters, part: ClassFilters) -> ClassFilters:
    """The table of the other samples: sums on the grid subtract as exactly as they add."""
    return replace(
        whole, scores=whole.scores - part.scores, mass=whole.mass - part.mass, counts=whole.counts - part.counts
    )


def _clock(head: Head) -> float:
    if head.weight.is_cuda:
        torch.cuda.synchronize(head.weight.device)
    return time.perf_counter()


# -- judging -----------------------------------------------------------------------------------------------------------


def _keep(curve: pd.DataFrame) -> dict[tuple[str, int], dict[str, Any]]:
    whole = curve[curve.class_name == "all"]
    dense = float(whole[whole.filters == "dense"].accuracy.iloc[0])
    rows = {(row["filters"], row["k"]): row for row in whole.to_dict("records")}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for (name, k), row in rows.items():
        if name not in ("dense", "random"):
            chance = rows["random", k]
            found[name, k] = {"dense": dense, "keep": row["accuracy"], "keep_low": row["low"], "keep_high": row["high"]}
            found[name, k] |= {
                "keep_random": chance["accuracy"],
                "keep_random_low": chance["low"],
                "keep_random_high": chance["high"],
            }
    return found


def _drop(
    model: Any,
    head: Head,
    tables: Mapping[str, ClassFilters],
    loader: Iterable[Any],
    ks: Sequence[int],
    draws: int,
    seed: int,
) -> dict[tuple[str, int], dict[str, Any]]:
    """Accuracy without the channels of the image's own class, and without those of another one."""
    generator = torch.Generator().manual_seed(seed)
    chance = {
        f"{draw}": torch.rand(head.weight.shape, generator=generator).argsort(1).argsort(1) for draw in range(draws)
    }
    places = {("table", name): table.ranking().argsort(1) for name, table in tables.items()}
    places |= {("random", name): place for name, place in chance.items()}
    right = {(key, k): torch.zeros(2, dtype=torch.int64) for key in places for k in ks}
    samples = 0
    with batches(model, loader, layer=head.module) as stream:
        for batch in stream:
            labels: Tensor = batch.labels  # type: ignore[assignment]
            if not samples:
                places = {key: place.to(labels.device) for key, place in places.items()}
            samples += len(labels)
            # drawn on the CPU: the same for every device
            steps = torch.randint(1, max(head.num_classes, 2), (len(labels),), generator=generator)
            others = (labels + steps.to(labels.device)) % head.num_classes
            features = batch.features.to(head.weight.dtype)
            for key, place in places.items():
                for column, whose in enumerate((labels, others)):
                    ranks = place[whose]
                    for k in ks:
                        logits = F.linear(features * (ranks >= k), head.weight, head.bias)
                        right[key, k][column] += (logits.argmax(1) == labels).sum().cpu()
    found = {}
    for name in tables:
        for k in ks:
            row: dict[str, Any] = {}
            for column, kind in enumerate(("drop_own", "drop_other")):
                hits = int(right[("table", name), k][column])
                low, high = wilson(hits, samples)
                random = [float(right[("random", draw), k][column]) / samples for draw in chance]
                mean, random_low, random_high = mean_interval(random)
                row |= {kind: hits / samples, f"{kind}_low": float(low), f"{kind}_high": float(high)}
                row |= {f"{kind}_random": float(mean)}
                row |= {f"{kind}_random_low": float(random_low), f"{kind}_random_high": float(random_high)}
            found[name, k] = row | {"samples": samples}
    return found


def _sets(
    name: str, tables: Mapping[str, ClassFilters], halves: tuple[ClassFilters, ClassFilters] | None, k: int
) -> dict[str, float]:
    """How the method's sets agree: class with class, method with method, half with half."""
    own = tables[name]
    pairs = own.overlap(k)[tuple(torch.triu_indices(own.num_classes, own.num_classes, 1))].numpy()
    others = [np.nanmean(_jaccard(own.mask(k), table.mask(k))) for other, table in tables.items() if other != name]
    stability = np.nan
    if halves is not None:
        each = _jaccard(*(half.mask(k) for half in halves))
        # of a class with no sample in one of them nothing is known
        each[~(halves[0].seen & halves[1].seen).numpy()] = np.nan
        stability = float("nan") if np.isnan(each).all() else np.nanmean(each)
    return {
        "class_overlap": float(np.nanmean(pairs)) if len(pairs) else float("nan"),
        "agreement": float(np.mean(others)) if others else float("nan"),
        "stability": float(stability),
        "overlap_random": random_jaccard(k, own.num_channels)[0],
    }


def _jaccard(a: Tensor, b: Tensor) -> Any:
    """Of each class's two sets, ``(C,)``; NaN where both are empty."""
    shared, union = (a & b).sum(1).double(), (a | b).sum(1)
    return (shared / union).numpy()


def _hoyer(table: ClassFilters) -> float:
    """Hoyer 2004, section 3.1, of what speaks for a class; scores below 0 count as 0."""
    scores = table.scores[table.seen].clamp(min=0)
    root = table.num_channels**0.5
    norms = scores.norm(dim=1)
    each = (root - scores.sum(1) / norms.clamp(min=1e-300)) / (root - 1)
    return float(each[norms > 0].mean())
