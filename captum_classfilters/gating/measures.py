"""How dense is a gate, do features point along it, do they cluster as it says, and what does it owe to the label?

For `LabelSensitiveGate.class_filters()`; any other table is read as a gate: negative scores become 0, and each channel
is divided by its largest score. N samples, C classes, K channels.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_table, named_tables, one_table
from captum_classfilters.core.check import integer
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.core.intervals import draws_interval, mean_interval, wilson
from captum_classfilters.core.wide import wide

_FEATURES = ("own", "other classes", "noise")


def density(
    filters: ClassFilters | Mapping[Any, ClassFilters],
    *,
    threshold: float = 0.5,
    control: Control = Control(20),
) -> pd.DataFrame:
    """How much of a table is in use: the mean of the gate, and how many channels are one class's own.

    Source: "Training interpretable CNNs towards class-specific filters", table 1, ``L1 norm`` (a mean over C and K),
    and section 4.4 (filters that a class monopolises). Differs: any table, read as a gate; a control and intervals.

    Args:
        filters: A table, or tables by name, all of one shape; one of the random selector is left out, for the control
            stands for it. A class without samples counts with what the table says.
        threshold: A channel is used by the classes with more than this.
        control: Random gates: uniform noise, each channel divided by its largest.

    Returns:
        One row for each table and class, and for ``"all"``; ``control`` is True where ``filters == "random"``.
        ``density``, ``low``, ``high`` (Student-t over channels; over draws for the control); ``exclusive``: channels
        that this class alone uses; ``shared``: those that it uses with others (both are means over draws for the
        control); ``channels``: K.

    Raises:
        OptionError: The threshold is not in [0, 1), or there is no table.
        ShapeError: Tables of different shapes.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
        raise OptionError(
            f"threshold must lie in [0, 1), as shares of each channel's largest score do; got {threshold!r}"
        )
    tables = named_tables(filters, ("random",))
    shapes = {name: tuple(table.scores.shape) for name, table in tables.items()}
    if len(set(shapes.values())) > 1:
        raise ShapeError(
            f"the tables must have one shape, for they share a control; got {shapes}; pass them one by one"
        )
    names = ["all", *next(iter(tables.values())).class_names]
    noise = torch.rand(control.draws, *next(iter(shapes.values())), generator=control.generator(), dtype=torch.float64)
    frames = []
    for name, table in [*tables.items(), ("random", None)]:
        gates = as_gate(noise if table is None else table.scores[None]).numpy()
        rows = np.concatenate([gates.mean(1, keepdims=True), gates], axis=1)  # (draws or 1, 1 + C, K)
        mean, low, high = mean_interval(rows[0].T) if table is not None else mean_interval(rows.mean(2))
        used = gates > threshold
        alone = used & (used.sum(1, keepdims=True) == 1)
        exclusive, shared = (_with_any(part) for part in (alone, used & ~alone))
        frames.append(
            pd.DataFrame(
                {
                    "filters": name,
                    "class_name": names,
                    "control": table is None,
                    "density": mean,
                    "low": low,
                    "high": high,
                    "exclusive": exclusive,
                    "shared": shared,
                    "channels": gates.shape[2],
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def gate_similarity(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any] | None = None,
    *,
    layer: nn.Module | str | None = None,
    control: Control = Control(20),
) -> pd.DataFrame:
    """Average inner product of a class's features and each row of the gate, of images recognised and not.

    Source: "Training interpretable CNNs towards class-specific filters", section 4.2, figure 5 and appendix B:
    ``S_y^c = mean of <a, G_c>`` over images of class y. Differs: any table, read as a gate; a control and intervals.

    Args:
        model: The network, borrowed and run without a gate; or a `HeadPass`.
        filters: The table whose rows are compared.
        loader: Batches ``(inputs, labels)``; left out with a `HeadPass`.
        layer: The head, if it cannot be found; left out with a `HeadPass`.
        control: Gates with their channels shuffled, alike in all rows.

    Returns:
        One row for each outcome, class and row of the gate, and one more with ``control`` True: ``outcome`` (``"TP"``:
        classified as what it is, ``"FN"``: as another class), ``class_name`` (y), ``gate_row`` (c), ``similarity`` (NaN
        without samples), ``low``, ``high`` (normal interval; Student-t over draws for the control), ``samples``.

    Raises:
        ShapeError: A table of another network.
    """
    one_table(filters)
    size = filters.num_classes
    gate = as_gate(filters.scores)
    similarities, features = GroupMoments(2 * size), GroupMoments(2 * size)
    with HeadPass.of(model, loader, layer).batches(description="gate_similarity") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            labels: Tensor = batch.labels  # type: ignore[assignment]
            groups = labels + size * (batch.logits.argmax(1) != labels).long()
            rows = gate.to(batch.features.device)
            similarities.add(batch.features.double() @ rows.T, groups)
            features.add(batch.features, groups)
    generator = control.generator()
    orders = [torch.randperm(gate.shape[1], generator=generator) for _ in range(control.draws)]
    # the mean of a product with a row is the product of the mean
    chance = [features.mean.cpu() @ gate[:, order].T for order in orders]
    count = similarities.count.cpu().numpy()
    mean = similarities.mean.cpu().numpy()
    half = 1.96 * similarities.error().cpu().numpy()
    names = np.array(filters.class_names)
    labelled = pd.DataFrame(
        {
            "outcome": np.repeat(["TP", "FN"], size * size),
            "class_name": np.tile(np.repeat(names, size), 2),
            "gate_row": np.tile(names, 2 * size),
            "samples": np.repeat(count.astype(int), size),
        }
    )
    frames = []
    for is_control, values in ((False, (mean, mean - half, mean + half)), (True, draws_interval(torch.stack(chance)))):
        similarity, low, high = (value.ravel() for value in values)
        frames.append(labelled.assign(control=is_control, similarity=similarity, low=low, high=high))
    return pd.concat(frames, ignore_index=True)


def feature_clusters(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any] | None = None,
    *,
    n_init: int = 10,
    layer: nn.Module | str | None = None,
    control: Control = Control(20),
) -> pd.DataFrame:
    """K-means of the features into as many clusters as there are classes: do the centres look like rows of the gate?

    Source: "Training interpretable CNNs towards class-specific filters", appendix D and figure 9. Differs: the likeness
    has numbers, with a control, where the paper shows a picture. Each centre is matched to one row of the gate, so that
    the sum of their cosines is largest. K-means needs all features at once: N x K float32 numbers are kept.

    Args:
        model: The network, borrowed and run without a gate; or a `HeadPass`.
        filters: The table whose rows the centres are matched to, read as a gate.
        loader: Batches ``(inputs, labels)``; left out with a `HeadPass`.
        n_init: Starts of k-means, of which the best counts.
        layer: The head, if it cannot be found; left out with a `HeadPass`.
        control: Gates with their channels shuffled, and shuffled labels. K-means has the same seed.

    Returns:
        One row for all clusters, ``"all"``, and one for each, and of each one more with ``control`` True: ``cluster``,
        ``class_name`` (matched), ``cosine`` of centre and row (control: of rows with their channels shuffled alike),
        ``cosine_low``, ``cosine_high`` (Student-t over draws, the control's alone); ``purity``: the share of the
        cluster's most frequent class (control: with labels shuffled), ``low``, ``high`` (Wilson, not the control's);
        ``ami``: adjusted mutual information of clusters and labels (0 is chance), in the first row; ``samples``; then
        the centre as ``"channel 0"``, ``"channel 1"`` and so on, in the first row the mean of all features, in control
        rows NaN.

    Raises:
        OptionError: n_init out of range, or fewer samples than classes.
        ShapeError: A table of another network.
    """
    one_table(filters)
    n_init = integer(n_init, "n_init", 1)
    feature_parts, label_parts = [], []
    with HeadPass.of(model, loader, layer).batches(description="feature_clusters") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            feature_parts.append(batch.features.float().cpu().numpy())
            label_parts.append(batch.labels.cpu().numpy())  # type: ignore[union-attr]
    features, labels = np.concatenate(feature_parts), np.concatenate(label_parts)
    size = filters.num_classes
    if len(features) < size:
        raise OptionError(f"{size} clusters need at least as many samples, got {len(features)}; pass more images")
    means = KMeans(size, n_init=n_init, random_state=control.seed).fit(features)
    centres, cluster = means.cluster_centers_.astype(float), means.labels_
    gate = as_gate(filters.scores).numpy()
    matched, cosine = match(centres, gate)
    generator = np.random.default_rng(control.seed)
    shuffles = [gate[:, generator.permutation(gate.shape[1])] for _ in range(control.draws)]
    chance = np.stack([match(centres, shuffled)[1] for shuffled in shuffles])
    most, samples = _most(cluster, labels, size)
    by_chance = np.mean([_most(cluster, generator.permutation(labels), size)[0] for _ in range(control.draws)], axis=0)
    low, high = wilson(most, samples)
    nothing = np.full(1 + size, np.nan)
    mean, mean_low, mean_high = draws_interval(np.column_stack([chance.mean(1), chance]))
    rows = pd.DataFrame(
        {"cluster": ["all", *range(size)], "class_name": ["all", *np.array(filters.class_names)[matched]]}
    )
    judged = rows.assign(
        control=False, cosine=[cosine.mean(), *cosine], cosine_low=nothing, cosine_high=nothing,
        purity=most / samples, low=low, high=high,
        ami=[adjusted_mutual_info_score(labels, cluster), *[np.nan] * size], samples=samples,
    )  # fmt: skip
    shown = np.concatenate([features.mean(0, dtype=float)[None], centres])
    judged = judged.join(pd.DataFrame(shown, columns=[f"channel {channel}" for channel in range(shown.shape[1])]))
    random = rows.assign(
        control=True, cosine=mean, cosine_low=mean_low, cosine_high=mean_high, purity=by_chance / samples,
        samples=samples,
    )  # fmt: skip
    return pd.concat([judged, random], ignore_index=True)


def gate_leakage(
    model: Any,
    filters: ClassFilters,
    loader: Iterable[Any] | None = None,
    *,
    layer: nn.Module | str | None = None,
    control: Control = Control(),
) -> pd.DataFrame:
    """How often the network answers with the label that its gate was told, on features that show it and that do not.

    A gate reads the true label, so the gated path's score is leakage and no accuracy. This says how much the label
    alone gives: features of an image of *another* class, and noise, are gated with a label that they do not show.

    Args:
        model: The network, borrowed; or a `HeadPass`.
        filters: The gate's table, ``gate.class_filters()``; of another table each channel is divided by its largest.
        loader: Batches ``(inputs, labels)``; left out with a `HeadPass`.
        layer: The head, if it cannot be found; left out with a `HeadPass`.
        control: Random gates: the same table, its classes shuffled within every channel. Labels and noise are drawn
            from its seed, too.

    Returns:
        One row for each ``features`` and ``gate``. Features: ``"own"``, the gate is told the sample's label; ``"other
        classes"``, it is told one of the other labels, at random; ``"noise"``: ``|N(0, 1)|`` times each channel's root
        mean square in the batch, with a random sign where features have one, and the gate is told the sample's label.
        Gate: ``"none"``, ``"own"``, ``"random"``, where ``control`` is True. ``label_recovered``: the share of samples
        answered with the label that was told; for own features without a gate this is the network's accuracy, and
        nowhere else. ``low``, ``high``: Wilson; Student-t over draws for the control; ``chance``, ``1 / C``;
        ``samples``.

    Raises:
        OptionError: A single class.
        ShapeError: A table of another network.
    """
    if one_table(filters).num_classes < 2:
        raise OptionError(
            f"leakage needs a gate of at least two classes, got {filters.num_classes}: labels of other classes are told"
        )
    # two generators, so that the labels do not depend on how large batches are
    label_generator, noise_generator = control.generator(), torch.Generator().manual_seed(control.seed + 1)
    gates = {"own": as_gate(filters.scores)}
    for draw in range(control.draws):
        order = torch.rand(filters.scores.shape, generator=label_generator).argsort(0)
        gates[f"random {draw}"] = gates["own"].gather(0, order)
    hits = {(features, name): 0 for features in _FEATURES for name in ("none", *gates)}
    samples = 0
    with HeadPass.of(model, loader, layer).batches(description="gate_leakage") as stream:
        for batch in stream:
            check_table(filters, batch.head)
            labels: Tensor = batch.labels  # type: ignore[assignment]
            samples += len(labels)
            original = batch.features.to(batch.head.weight.dtype)
            step = torch.randint(1, filters.num_classes, labels.shape, generator=label_generator).to(labels.device)
            other_labels = (labels + step) % filters.num_classes
            cases = {
                "own": (original, labels),
                "other classes": (original, other_labels),
                "noise": (_noise(original, noise_generator), labels),
            }
            for name in _FEATURES:
                features, gate_labels = cases[name]
                for gate in ("none", *gates):
                    rows = gates[gate].to(features)[gate_labels] if gate in gates else 1.0
                    hits[name, gate] += _recovered(features * rows, gate_labels, batch.head)
    return _leakage_frame(hits, samples, control.draws, filters.num_classes)


def _noise(features: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(features.shape, generator=generator).to(features)
    if not bool((features < 0).any()):
        noise = noise.abs()
    return noise * features.square().mean(0).sqrt()


def _recovered(features: Tensor, labels: Tensor, head: Head) -> int:
    return int((F.linear(features, head.weight, head.bias).argmax(1) == labels).sum())


def _leakage_frame(hits: dict[tuple[str, str], int], samples: int, draws: int, classes: int) -> pd.DataFrame:
    rows: list[tuple[Any, ...]] = []
    for features in _FEATURES:
        for gate in ("none", "own"):
            count = hits[features, gate]
            rows.append((features, gate, False, count / samples, *map(float, wilson(count, samples))))
        shares = np.array([hits[features, f"random {draw}"] for draw in range(draws)]) / samples
        rows.append((features, "random", True, *mean_interval(shares)))
    columns = ["features", "gate", "control", "label_recovered", "low", "high"]
    return pd.DataFrame(rows, columns=columns).assign(chance=1 / classes, samples=samples)


def as_gate(scores: Tensor) -> Tensor:
    """Read any table as a gate: negatives 0, every channel divided by its largest. A gate stays as it is.

    Args:
        scores: ``(..., C, K)``.

    Returns:
        The same shape, in [0, 1]; a channel with nothing above 0 is 0.
    """
    positive = scores.double().clamp(min=0)
    largest = positive.amax(-2, keepdim=True)
    return positive / torch.where(largest > 0, largest, 1)


def match(centres: Any, gate: Any) -> tuple[Any, Any]:
    """Which row of the gate each centre is, so that the sum of cosines is largest, and those cosines.

    Args:
        centres: ``(C, K)``.
        gate: ``(C, K)``; a row of zeros has cosine 0.

    Returns:
        ``(rows, cosines)``, each ``(C,)``.
    """
    unit = [table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-30) for table in (centres, gate)]
    cosines = unit[0] @ unit[1].T
    rows = linear_sum_assignment(cosines, maximize=True)[1]
    return rows, cosines[np.arange(len(rows)), rows]


class GroupMoments:
    """Running count, mean and squared deviations of values in groups, float64; large means do not destroy them.

    Source: Chan, Golub and LeVeque 1979, the merging of two parts.

    Args:
        groups: R.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self.count: Tensor = torch.zeros(groups, dtype=torch.float64)
        self._mean = self._squares = torch.zeros(groups, 1, dtype=torch.float64)

    def add(self, values: Tensor, groups: Tensor) -> None:
        """Take a batch in: values ``(N, K)``, the group of each row ``(N,)``."""
        values = wide(values.detach())
        groups = groups.to(values.device)
        members = F.one_hot(groups, self._groups).double()
        count, before = members.sum(0), self.count.to(values.device)
        mean = members.T @ values / count.clamp(min=1)[:, None]
        squares = members.T @ (values - mean[groups]).square()
        whole = before + count
        apart = mean - self._mean.to(values.device)
        share = (count / whole.clamp(min=1))[:, None]
        self._squares = self._squares.to(values.device) + squares + apart.square() * before[:, None] * share
        self._mean = self._mean.to(values.device) + apart * share
        self.count = whole

    @property
    def mean(self) -> Tensor:
        """``(R, K)``; NaN for a group without samples."""
        return self._mean.masked_fill(self.count[:, None] == 0, torch.nan)

    def error(self) -> Tensor:
        """Standard error of the mean, ``(R, K)``; NaN for a group of fewer than two."""
        count = self.count[:, None]
        return (self._squares / (count - 1) / count).sqrt().masked_fill(count < 2, torch.nan)


def _with_any(flags: Any) -> Any:
    """Channels of each class, mean over tables ``(T, C, K)``; in front those of any class: ``(1 + C,)``."""
    every = np.concatenate([flags.any(1, keepdims=True), flags], axis=1)
    return every.sum(2).mean(0)


def _most(cluster: Any, labels: Any, size: int) -> tuple[Any, Any]:
    """Samples of each cluster's most frequent class, and its samples; in front those of all clusters."""
    table = np.bincount(cluster * size + labels, minlength=size * size).reshape(size, size)
    most, samples = table.max(1), table.sum(1)
    return np.concatenate([[most.sum()], most]), np.concatenate([[samples.sum()], samples])
