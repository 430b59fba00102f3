"""Channels that look like shortcuts: one class leans on them, and they fire where other evidence is not.

N images, C classes, K channels, M channels of each class that are looked at, h x w positions of the map.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.core.control import Control
from captum_classfilters.core.head_pass import Batch
from captum_classfilters.core.intervals import wilson

_CELLS = 2**23  # logits that are held at once
_FINEST = 14  # positions along a side: finer maps are averaged to this


class SuspectSums:
    """Sums over a loader for each class and each of its strongest channels.

    The suspicion of a channel is (the share of the class that is lost without it, at the lower end of its interval
    and beyond what a random channel costs, plus its share of the class's lead over its best rival) times (the larger
    of ``beside`` and ``elsewhere``).

    Args:
        top: ``(C, M)`` int64, the channels; -1 throughout for a class without samples.
        channels: K.
        control: Random channels of each class, for comparison.
        device: Where the sums are.
    """

    def __init__(self, top: Tensor, channels: int, control: Control, device: torch.device) -> None:
        self._classes, self._most = top.shape
        self._seen = (top[:, 0] >= 0).to(device)
        self._top = top.clamp(min=0).to(device)
        drawn = torch.rand(self._classes, channels, generator=control.generator()).argsort(1)[:, : control.draws]
        self._looked_at = torch.cat([self._top, drawn.to(device)], 1)
        columns = self._looked_at.shape[1]
        self.samples = torch.zeros(self._classes, dtype=torch.int64, device=device)
        self.right = torch.zeros_like(self.samples)
        # right without one channel; right with the full head and wrong without it
        self.right_without = torch.zeros(self._classes, columns, dtype=torch.int64, device=device)
        self._lost = torch.zeros_like(self.right_without)
        self._share = torch.zeros(self._classes, self._most, dtype=torch.float64, device=device)
        self._places: dict[str, Tensor] = {}
        self._device = device
        self.size: tuple[int, int] | None = None

    def add(self, batch: Batch, pixels: Tensor | None) -> None:
        """Take a batch in; ``pixels`` are its images in [0, 1], ``(N, 1 or 3, H, W)``."""
        labels: Tensor = batch.labels  # type: ignore[assignment]
        known = self._seen[labels]
        if not bool(known.all()):
            batch = batch._replace(
                features=batch.features[known],
                logits=batch.logits[known],
                labels=labels[known],
                maps=None if batch.maps is None else batch.maps[known],
            )
            pixels = None if pixels is None else pixels[known]
        labels = batch.labels  # type: ignore[assignment]
        weight, maps = batch.head.weight, batch.maps
        has_places = maps is not None and maps.dim() == 4 and maps[0, 0].numel() > 1
        step = max(1, _CELLS // (self._looked_at.shape[1] * self._classes))
        for start in range(0, len(labels), step):
            part = slice(start, start + step)
            self._count(batch.features[part], batch.logits[part], labels[part], weight)
            if maps is not None and has_places:
                self._locate(maps[part], labels[part], weight, None if pixels is None else pixels[part])

    def _count(self, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor) -> None:
        features, logits, weight = features.float(), logits.float(), weight.float()
        channels = self._looked_at[labels]  # (N, M + draws)
        without = logits[:, None] - weight.T[channels] * features.gather(1, channels)[:, :, None]
        right, right_without = logits.argmax(1) == labels, without.argmax(2) == labels[:, None]
        self.samples.index_add_(0, labels, torch.ones_like(labels))
        self.right.index_add_(0, labels, right.long())
        self.right_without.index_add_(0, labels, right_without.long())
        self._lost.index_add_(0, labels, (right[:, None] & ~right_without).long())
        # what each channel adds to the class's lead over the best other class
        rival = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
        lead = ((weight[labels] - weight[rival]) * features).clamp(min=0)
        share = lead.gather(1, channels[:, : self._most]) / lead.sum(1, keepdim=True).clamp(min=1e-12)
        self._share.index_add_(0, labels, share.double())

    def _locate(self, maps: Tensor, labels: Tensor, weight: Tensor, pixels: Tensor | None) -> None:
        if max(maps.shape[2:]) > _FINEST:
            maps = F.adaptive_avg_pool2d(maps, (min(maps.shape[2], _FINEST), min(maps.shape[3], _FINEST)))
        size = (maps.shape[2], maps.shape[3])
        if self.size not in (None, size):
            return  # images of another size: their places cannot be compared
        self.size = size
        channels = self._top[labels]
        rows = torch.arange(len(maps), device=maps.device)[:, None]
        weight = weight[labels].float()
        adds = maps[rows, channels].float() * weight.gather(1, channels)[:, :, None, None]
        rest = torch.einsum("nkhw,nk->nhw", maps.float(), weight)[:, None] - adds
        here, there = adds.clamp(min=0).flatten(2), rest.clamp(min=0).flatten(2)  # (N, M, h w)
        fires = (here.sum(2) > 0) & (there.sum(2) > 0)
        here = here / here.sum(2, keepdim=True).clamp(min=1e-12) * fires[:, :, None]
        there = there / there.sum(2, keepdim=True).clamp(min=1e-12) * fires[:, :, None]
        edge = torch.ones(size, device=maps.device)
        edge[1:-1, 1:-1] = 0
        values = {
            "fires": fires.float(),
            "here": here,
            "there": there,
            "beside": (1 - torch.minimum(here, there).sum(2)) * fires,
            "border": (here * edge.flatten()).sum(2),
            "border_rest": (there * edge.flatten()).sum(2),
        }
        if pixels is not None:
            colours = F.adaptive_avg_pool2d(pixels.float(), size).flatten(2)  # (N, c, h w)
            under = torch.einsum("nmp,ncp->nmc", here, colours)
            everywhere = colours.mean(2)[:, None] * fires[:, :, None]
            spread = colours.square().mean(2)[:, None] * fires[:, :, None]
            values |= {"colour": under, "colour2": under.square(), "any": everywhere, "any2": spread}
        for name, value in values.items():
            if name not in self._places:
                self._places[name] = torch.zeros(
                    self._classes, *value.shape[1:], dtype=torch.float64, device=self._device
                )
            if self._places[name].shape[1:] == value.shape[1:]:
                self._places[name].index_add_(0, labels, value.double())

    def frame(self, class_names: tuple[str, ...], also_in: Tensor) -> pd.DataFrame:
        """One row for each class and channel, the most suspicious first; see `Report.suspects`.

        Args:
            class_names: C names.
            also_in: ``(C, M)``, how many other classes have the channel among their strongest.
        """
        samples = self.samples.cpu().numpy()
        classes = np.flatnonzero((samples > 0) & self._seen.cpu().numpy())
        count = np.maximum(samples, 1)[:, None]
        right, without = self.right.cpu().numpy(), self.right_without.cpu().numpy()
        recall = right[:, None] / count
        drop = recall - without / count
        lost_low = wilson(self._lost.cpu().numpy()[:, : self._most], count)[0]
        random_drop = drop[:, self._most :].mean(1, keepdims=True)
        low, high = wilson(without[:, : self._most], count)
        columns: dict[str, Any] = {
            "recall": np.broadcast_to(recall, low.shape),
            "without": without[:, : self._most] / count,
            "low": low,
            "high": high,
            "random": np.broadcast_to(recall - random_drop, low.shape),
            "lost_low": lost_low,
            "share": self._share.cpu().numpy() / count,
            **self._place_measures(),
        }
        # without maps nothing is known of places; with maps a channel that never fires is not odd
        odd = np.nan_to_num(np.fmax(columns["beside"], columns["elsewhere"]), nan=0.0 if self._places else 1.0)
        # the lower end of the interval: of a handful of images one that is lost says nothing
        leans = np.clip(lost_low - np.clip(random_drop, 0, None), 0, None) + columns["share"]
        columns["suspicion"] = leans * odd
        top = self._top.cpu().numpy()
        frame = pd.DataFrame(
            {
                "class_name": np.repeat([class_names[row] for row in classes], self._most),
                "channel": top[classes].ravel(),
                "suspicion": columns.pop("suspicion")[classes].ravel(),
                "also_in": also_in.numpy()[classes].ravel(),
                **{name: np.asarray(value)[classes].ravel() for name, value in columns.items()},
                "samples": np.repeat(samples[classes], self._most),
            }
        )
        return frame.sort_values("suspicion", ascending=False, kind="stable", ignore_index=True)

    def _place_measures(self) -> dict[str, Any]:
        """Where the channels fire, ``(C, M)`` each; NaN where there are no maps."""
        names = ("beside", "elsewhere", "border", "border_rest", "one_place", "one_colour", "fires")
        if "fires" not in self._places:
            return {name: np.full((self._classes, self._most), np.nan) for name in names}
        sums = {name: value.cpu().numpy() for name, value in self._places.items()}
        with np.errstate(invalid="ignore", divide="ignore"):
            fires = np.where(sums["fires"] > 0, sums["fires"], np.nan)
            result = {name: sums[name] / fires for name in ("beside", "border", "border_rest")}
            place = sums["here"] / fires[:, :, None]
            result["elsewhere"] = _elsewhere(place, sums["there"], sums["fires"])
            entropy = -(place * np.log(np.maximum(place, 1e-12))).sum(2)
            result["one_place"] = 1 - entropy / np.log(place.shape[2])
            result["one_colour"] = np.full_like(fires, np.nan)
            if "colour" in sums:
                deviation = [
                    np.sqrt(
                        np.clip(sums[f"{name}2"] / fires[..., None] - (sums[name] / fires[..., None]) ** 2, 0, None)
                    )
                    for name in ("colour", "any")
                ]
                result["one_colour"] = np.clip(1 - (deviation[0] / np.maximum(deviation[1], 1e-9)).mean(2), 0, 1)
            result["fires"] = sums["fires"] / np.maximum(self.samples.cpu().numpy(), 1)[:, None]
        return result

    def mean_maps(self) -> Tensor | None:
        """``(C, M, h, w)``: where on average each channel fires on images of its class, summing to 1."""
        if "here" not in self._places or self.size is None:
            return None
        fires = self._places["fires"].clamp(min=1)[:, :, None]
        return (self._places["here"] / fires).view(self._classes, self._most, *self.size).float().cpu()


def _elsewhere(place: Any, there: Any, fires: Any) -> Any:
    """``(C, M)``: share of a channel's mean map that lies where the evidence for the other classes is not."""
    seen = fires.sum(1) > 0
    evidence = there.sum(1) / np.maximum(fires.sum(1), 1)[:, None]  # (C, h w)
    others = (evidence[seen].sum(0) - np.where(seen[:, None], evidence, 0)) / np.maximum(seen.sum() - seen, 1)[:, None]
    shared = np.minimum(place, others[:, None]).sum(2)
    return np.where((fires > 0) & (seen.sum() > 1), 1 - shared, np.nan)
