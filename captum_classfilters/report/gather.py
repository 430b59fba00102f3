"""What the page shows, gathered in one pass over each loader; memory does not grow with the number of images.

N images, C classes, K channels, S channels that are shown, h x w positions of the map.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.class_filters import ClassFilters, check_table, names_of
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import Batch, HeadPass, position_map
from captum_classfilters.core.intervals import wilson
from captum_classfilters.influential.running_sums import Options, Tables
from captum_classfilters.metrics.accuracy import KeepCounts
from captum_classfilters.report.options import ReportOptions
from captum_classfilters.report.pictures import Pictures, images_of
from captum_classfilters.report.suspects import SuspectSums

PARTS = 5  # of the training images, for the stability of a ranking
_FINEST = 16  # positions along a side of the maps that are kept
_CLOSE_CALLS = 2  # right answers of each class that were nearly wrong
_MATRIX = 50  # classes up to which the whole matrix is shown


class Trained(NamedTuple):
    """What the training images gave."""

    filters: ClassFilters
    parts: list[ClassFilters]  # tables of a fifth of the images each; none where the table came ready-made


def train_pass(head_pass: HeadPass, options: ReportOptions, class_names: Sequence[str] | None) -> Trained:
    """The table of class filters, and tables of a fifth of the images each, from one pass."""
    chosen = Options.checked([options.selector], [None], "abs")
    names: tuple[str, ...] = ()
    tables: list[Tables] = []
    place = 0
    with head_pass.batches(description="report: training images") as stream:
        for batch in stream:
            if not tables:
                given = class_names if class_names is not None else head_pass.class_names
                names = names_of(given, batch.head.num_classes, head_pass.loader, head_pass.model)
                tables = [Tables(batch.head, chosen) for _ in range(1 + PARTS)]
            labels: Tensor = batch.labels  # type: ignore[assignment]
            tables[0].add(batch.features, batch.logits, labels)
            turn = (torch.arange(len(labels), device=labels.device) + place) % PARTS
            for part in range(PARTS):
                mine = turn == part
                if bool(mine.any()):
                    tables[1 + part].add(batch.features[mine], batch.logits[mine], labels[mine])
            place += len(labels)
    made = [
        next(iter(table.filters(names, {"label_source": "target", "correct_only": False}).values())) for table in tables
    ]
    return Trained(made[0], made[1:])


def stability(trained: Trained, most: int) -> np.ndarray[Any, Any]:
    """``(C, most, most)``: for a class's m-th channel and k, in which share of the parts it is among the top k."""
    top = trained.filters.top(most)
    ranks = []
    for part in trained.parts:
        order = part.ranking()
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
        rank[~part.seen] = order.shape[1]
        ranks.append(rank.gather(1, top.clamp(min=0)))
    within = torch.stack(ranks)[..., None] < torch.arange(1, most + 1)
    return np.asarray(within.double().mean(0).numpy())


class TopImages:
    """For each shown channel the images that activate it most, with the channel's map on them."""

    def __init__(self, channels: Tensor, count: int) -> None:
        self.channels, self._count = channels, count
        shape = (len(channels), 0)
        self.values = torch.zeros(shape)
        self.places = torch.zeros(shape, dtype=torch.int64)
        self.labels = torch.zeros(shape, dtype=torch.int64)
        self.maps: Tensor | None = None

    def add(self, batch: Batch, first: int) -> None:
        """Take a batch in, whose first image has the place ``first`` in the loader."""
        channels = self.channels.to(batch.features.device)
        values, order = batch.features[:, channels].float().sort(dim=0, descending=True, stable=True)
        values, order = values[: self._count].T, order[: self._count].T  # (S, n)
        labels: Tensor = batch.labels  # type: ignore[assignment]
        maps = None
        if batch.maps is not None and batch.maps.dim() == 4:
            maps = coarse(batch.maps[order, channels[:, None]].float()).cpu()
        joined = torch.cat([self.values, values.cpu()], 1)
        # stable: of equal activations the earlier image stays, however the loader is cut into batches
        self.values, best = (part[:, : self._count] for part in joined.sort(dim=1, descending=True, stable=True))
        self.places = torch.cat([self.places, order.cpu() + first], 1).gather(1, best)
        self.labels = torch.cat([self.labels, labels[order].cpu()], 1).gather(1, best)
        if maps is not None and (self.maps is None or self.maps.shape[2:] == maps.shape[2:]):
            before = maps[:, :0] if self.maps is None else self.maps
            index = best[:, :, None, None].expand(-1, -1, *maps.shape[2:])
            self.maps = torch.cat([before, maps], 1).gather(1, index)


def coarse(maps: Tensor) -> Tensor:
    """Maps ``(..., h, w)`` of at most 16 positions along a side."""
    if max(maps.shape[-2:]) <= _FINEST:
        return maps
    size = min(maps.shape[-2], _FINEST), min(maps.shape[-1], _FINEST)
    return F.adaptive_avg_pool2d(maps.flatten(0, -3), size).view(*maps.shape[:-2], *size)


class Examples:
    """Images that were confused, and right answers that were nearly wrong: the clearest of each pair of classes.

    Args:
        most: Of all pairs together.
        of_each: Of one pair.
    """

    def __init__(self, most: int, of_each: int) -> None:
        self._most, self._of_each = most, of_each
        self.rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows["place"]) if self.rows else 0

    def add(self, batch: Batch, first: int) -> None:
        """Take a batch in, whose first image has the place ``first`` in the loader."""
        labels: Tensor = batch.labels  # type: ignore[assignment]
        logits = batch.logits.float()
        if logits.shape[1] < 2:
            return
        rival = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
        rows = torch.arange(len(labels), device=labels.device)
        margin = logits[rows, rival] - logits[rows, labels]
        wrong = margin > 0
        # of the right answers only those that could be kept: the closest of the batch
        close = margin.masked_fill(wrong, -torch.inf).topk(min(len(margin), 4 * logits.shape[1])).indices
        chosen = torch.cat([wrong.nonzero().flatten(), close[~wrong[close]]])
        chosen = chosen[: self._most + 4 * logits.shape[1]]
        part = batch._replace(
            features=batch.features[chosen], maps=None if batch.maps is None else batch.maps[chosen], inputs=()
        )
        found = {
            "place": chosen + first,
            "true": labels[chosen],
            "rival": rival[chosen],
            "margin": margin[chosen],
            "wrong": wrong[chosen],
            "features": batch.features[chosen].float(),
            "logits": logits[chosen].topk(min(5, logits.shape[1])).values,
            "best": logits[chosen].topk(min(5, logits.shape[1])).indices,
        }
        found = {name: value.cpu() for name, value in found.items()}
        maps = self._maps(part, rival[chosen], labels[chosen])
        if maps is not None:
            found["maps"] = maps
        if self.rows and self.rows.keys() != found.keys():
            found = {name: value for name, value in found.items() if name in self.rows}
            self.rows = {name: self.rows[name] for name in found}
        if self.rows and any(self.rows[name].shape[1:] != value.shape[1:] for name, value in found.items()):
            self.rows.pop("maps", None)  # images of another size
            found.pop("maps", None)
        joined = {name: torch.cat([self.rows[name], value]) if self.rows else value for name, value in found.items()}
        kept = torch.from_numpy(self._kept(joined))
        self.rows = {name: value[kept] for name, value in joined.items()}

    def _kept(self, rows: dict[str, Tensor]) -> np.ndarray[Any, Any]:
        """Which rows stay: the first of each pair before the second of any, the clearest first."""
        true, rival, wrong = (rows[name].numpy() for name in ("true", "rival", "wrong"))
        margin = rows["margin"].numpy()
        # right answers are grouped by their class alone
        pair = np.where(wrong, true * (int(max(true.max(initial=0), rival.max(initial=0))) + 1) + rival, -1 - true)
        order = np.lexsort((rows["place"].numpy(), -margin, pair))
        ordered = pair[order]
        starts = np.r_[0, np.flatnonzero(np.diff(ordered)) + 1] if len(ordered) else np.zeros(0, int)
        sizes = np.diff(np.r_[starts, len(ordered)])
        rank = np.arange(len(ordered)) - np.repeat(starts, sizes)
        limit = np.where(ordered >= 0, self._of_each, _CLOSE_CALLS)
        inside = rank < limit
        order, rank = order[inside], rank[inside]
        first = np.lexsort((order, rank, ~wrong[order]))[: self._most]
        return np.sort(order[first])

    def _maps(self, part: Batch, won: Tensor, lost: Tensor) -> Tensor | None:
        """``(n, 2, h, w)``: what each position adds by the channels that speak for the rival, and for the truth."""
        if part.maps is None or part.maps.dim() != 4 or not len(part.features):
            return None
        weight = part.head.weight.double()
        difference = weight[won] - weight[lost]
        speaks = difference * part.features.double() > 0
        sides = [position_map(part, difference * side, exact=False) for side in (speaks, ~speaks)]
        if sides[0] is None or sides[1] is None:
            return None
        return coarse(torch.cat(sides, 1)).cpu()  # type: ignore[arg-type]


class Judged(NamedTuple):
    """What the judged images gave."""

    head: Head
    samples: np.ndarray[Any, Any]  # (C,)
    right: np.ndarray[Any, Any]  # (C,)
    matrix: np.ndarray[Any, Any]  # (C, C), true by predicted
    curve: pd.DataFrame
    suspects: pd.DataFrame
    mean_maps: Tensor | None  # (C, most, h, w)
    top_images: TopImages
    examples: Examples
    pictures: Pictures
    weight: Tensor  # (C, K)
    bias: Tensor  # (C,)
    adds_up: bool
    notes: list[str]


def judge_pass(head_pass: HeadPass, filters: ClassFilters, options: ReportOptions) -> Judged:
    """Everything that the page shows of the judged images, from one pass."""
    most = min(options.most, filters.num_channels)
    top = filters.top(most)
    shown = torch.unique(top[filters.seen])
    top_images = TopImages(shown, options.images)
    examples = Examples(options.examples, options.of_each_pair)
    pictures = Pictures(options.tile, options.pixels)
    ks = _ks(filters.num_channels, most)
    first, classes = 0, filters.num_classes
    counts: KeepCounts | None = None
    suspects: SuspectSums | None = None
    matrix: Tensor | None = None
    head: Head | None = None
    notes: list[str] = []
    with head_pass.batches(need_maps=None, description="report: judged images") as stream:
        for batch in stream:
            if counts is None or suspects is None or matrix is None:
                head = batch.head
                check_table(filters, head)
                device = batch.features.device
                counts = KeepCounts(head, {filters.method: filters}, ks, options.control)
                suspects = SuspectSums(top, filters.num_channels, options.control, device)
                matrix = torch.zeros(classes * classes, dtype=torch.int64, device=device)
            labels: Tensor = batch.labels  # type: ignore[assignment]
            counts.add(batch)
            matrix += torch.bincount(labels * classes + batch.logits.argmax(1), minlength=classes * classes)
            images = images_of(batch.inputs)
            suspects.add(batch, None if images is None else pictures.unit(images))
            top_images.add(batch, first)
            examples.add(batch, first)
            if images is not None:
                wanted = set(top_images.places.flatten().tolist())
                wanted |= set(examples.rows["place"].tolist()) if len(examples) else set()
                pictures.take(images, first, wanted)
            first += len(labels)
    if not len(pictures):
        notes.append("There are no pictures: the network's inputs are not images of one or three colours.")
    if head.feature_map is None or top_images.maps is None:  # type: ignore[union-attr]
        why = head.no_map if head is not None and head.no_map else "the map has no two axes"
        notes.append(f"There are no maps over the pictures, and suspects are ranked without places: {why}.")
    square = matrix.view(classes, classes).cpu().numpy()  # type: ignore[union-attr]
    mean_maps = suspects.mean_maps()  # type: ignore[union-attr]
    return Judged(
        head,  # type: ignore[arg-type]
        square.sum(1),
        square.diagonal().copy(),
        square,
        counts.frame(filters.class_names),  # type: ignore[union-attr]
        suspects.frame(filters.class_names, also_in(top)),  # type: ignore[union-attr]
        mean_maps,
        top_images,
        examples,
        pictures,
        head.weight.float().cpu(),  # type: ignore[union-attr]
        head.bias.float().cpu(),  # type: ignore[union-attr]
        bool(head.feature_map is not None and head.feature_map.exact),  # type: ignore[union-attr]
        notes,
    )


def also_in(top: Tensor) -> Tensor:
    """``(C, M)``: how many other classes have each channel among their M."""
    seen = top >= 0
    times = torch.bincount(top[seen], minlength=int(top.max()) + 1 if bool(seen.any()) else 1)
    return (times[top.clamp(min=0)] - 1) * seen


def _ks(channels: int, most: int) -> list[int]:
    return sorted({k for k in (1, 2, 3, 5, 10, 20, most) if k <= channels})


def interval(right: int, samples: int) -> dict[str, Any]:
    """A share with its Wilson interval, for the page."""
    low, high = wilson(right, samples)
    share = right / samples if samples else None
    return {"value": share, "low": float(low) if samples else None, "high": float(high) if samples else None}
