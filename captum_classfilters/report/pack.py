"""What was gathered as JSON and as chunks of bytes that the page decodes when it needs them, within a size.

Head weights and features take 16 bits: whole numbers times a scale of their row, which is 30 times closer than float16.
C classes, K channels.
"""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.core.errors import printable
from captum_classfilters.report.gather import PARTS, Judged, Trained, interval, stability
from captum_classfilters.report.options import ReportOptions

_IN_A_CHUNK = 96  # pictures
_ROWS = 64  # rows of the head, or examples, in a chunk
_MATRIX = 50  # classes up to which the whole matrix is in the page
_PAIRS = 2000  # of classes, where there is no matrix
_SUSPECTS = 200
_QUALITIES = (80, 65, 50, 35)
_PAGE = 160_000  # bytes of page, style and script


@dataclass
class Packed:
    """What goes into the page."""

    data: dict[str, Any]
    chunks: dict[str, bytes]
    dropped: list[str] = field(default_factory=list)


def packed(trained: Trained, judged: Judged, options: ReportOptions, about: Mapping[str, Any]) -> Packed:
    """The data of the page and its chunks, at most ``options.max_mb`` large unless it goes into a folder."""
    filters = trained.filters
    names = [printable(name) for name in filters.class_names]
    most = min(options.most, filters.num_channels)
    data: dict[str, Any] = {
        "about": dict(about),
        "names": names,
        "k": min(options.k, most),
        "most": most,
        "channels": filters.num_channels,
        "trained": filters.counts.tolist(),
        "samples": judged.samples.tolist(),
        "right": judged.right.tolist(),
        "all": interval(int(judged.right.sum()), int(judged.samples.sum())),
        "recall": [interval(int(r), int(n)) for r, n in zip(judged.right, judged.samples, strict=True)],
        "curve": _curve(judged, filters),
        **_confusions(judged.matrix),
        **_tops(trained, judged, most),
        "suspects": _suspects(judged, filters, most),
        "addsUp": judged.adds_up,
        "method": filters.method,
        "perImage": filters.merge_rule == "sum",
        "methods": _frame(options.methods),
    }
    limit = math.inf if options.folder else options.max_mb * 1e6
    chunks: dict[str, bytes] = {}
    _add_head(data, chunks, judged.weight, judged.bias)
    result = Packed(data, chunks)
    _add_pictures(result, judged, options, limit)
    return result


def size_of(packed: Packed) -> int:
    """Bytes of the page, about."""
    return _PAGE + len(as_script_json(packed.data).encode()) + sum(map(_encoded, packed.chunks.values()))


def as_script_json(data: Any) -> str:
    r"""JSON that may stand inside a script element, whatever names are in it.

    Example:
        >>> as_script_json(["</script>", "<!--"])
        '["\\u003c/script>","\\u003c!--"]'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # half of a letter, as undecodable folder names have, cannot be written as UTF-8
    text = text.encode("utf-8", "backslashreplace").decode()
    # in JSON these can stand in strings only, where an escape means the same
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _encoded(chunk: bytes) -> int:
    """Bytes in base64, with the tag around."""
    return 4 * ((len(chunk) + 2) // 3) + 60


def sixteen_bits(rows: Tensor) -> tuple[bytes, list[float]]:
    """Rows of numbers as int16, and the scale of each row.

    Example:
        >>> data, scales = sixteen_bits(torch.tensor([[1.0, -2.0]]))
        >>> (np.frombuffer(data, "<i2") * scales[0]).round(4).tolist()
        [1.0, -2.0]
    """
    values = rows.double().numpy()
    scales = np.maximum(np.abs(values).max(1, initial=0), 1e-30) / 32767
    return np.rint(values / scales[:, None]).astype("<i2").tobytes(), scales.tolist()


def _add_head(data: dict[str, Any], chunks: dict[str, bytes], weight: Tensor, bias: Tensor) -> None:
    scales: list[float] = []
    for start in range(0, len(weight), _ROWS):
        chunks[f"w{start // _ROWS}"], part = sixteen_bits(weight[start : start + _ROWS])
        scales += part
    data["head"] = {"rows": _ROWS, "scales": [float(f"{scale:.9g}") for scale in scales], "bias": bias.tolist()}


def _add_pictures(result: Packed, judged: Judged, options: ReportOptions, limit: float) -> None:
    """Pictures, maps and examples: in ever smaller form until they fit."""
    base = size_of(result)
    examples, images = len(judged.examples), judged.top_images.values.shape[1]
    stays = base
    qualities = list(_QUALITIES)
    lengths: dict[int, int] = {}

    def needed(images: int, examples: int) -> set[int]:
        wanted = set(judged.top_images.places[:, :images].flatten().tolist())
        wanted |= set(judged.examples.rows["place"][:examples].tolist()) if examples else set()
        return {place for place in wanted if place in judged.pictures}

    def total(images: int, examples: int) -> float:
        pictures = sum(lengths[place] for place in needed(images, examples)) * 4 / 3
        maps = judged.top_images.maps
        positions = 0 if maps is None else maps.shape[2] * maps.shape[3]
        of_maps = len(judged.top_images.channels) * images * (positions * 4 / 3 + 30)
        of_examples = examples * (2 * judged.weight.shape[1] * 4 / 3 + positions * 8 / 3 + 200)
        return stays + 1.02 * pictures + of_maps + of_examples + 14 * len(needed(images, examples))

    order = _examples_by_worth(judged)
    judged.examples.rows = {name: value[order] for name, value in judged.examples.rows.items()}
    encoded: dict[int, bytes] = {}
    wanted_images, wanted_examples = images, examples
    while True:
        quality = qualities.pop(0)
        encoded = {place: judged.pictures.encoded(place, quality) for place in sorted(needed(images, examples))}
        lengths = {place: len(data) for place, data in encoded.items()}
        if total(images, examples) <= limit or not qualities:
            break
        # each step takes a quarter off; if that cannot be enough, the next steps follow at once
        while len(qualities) > 1 and total(images, examples) * 0.8 ** (1 + len(_QUALITIES) - len(qualities)) > limit:
            qualities.pop(0)
    while total(images, examples) > limit and examples > 50:
        examples = max(50, int(examples * 0.8))
    while total(images, examples) > limit and images > 1:
        images -= 1
    while total(images, examples) > limit and examples > 0:
        examples = int(examples * 0.7)
    if quality < _QUALITIES[0]:
        result.dropped.append(f"Pictures are stored more coarsely (WebP quality {quality} of 100).")
    if images < wanted_images:
        result.dropped.append(f"Each channel has {images} of {wanted_images} pictures.")
    if examples < wanted_examples:
        result.dropped.append(f"{examples} of {wanted_examples} confused images are in the page.")
    if total(images, examples) > limit:
        result.dropped.append(
            f"Even so the page is larger than {options.max_mb:g} MB: the head of {judged.weight.shape[0]} classes and "
            f"{judged.weight.shape[1]} channels alone takes {stays / 1e6:.1f} MB. Raise max_mb, or write a folder."
        )
    _store(result, judged, encoded, images, examples)


def _examples_by_worth(judged: Judged) -> Tensor:
    """Confused images before right ones, the first of each pair before the second of any."""
    rows = judged.examples.rows
    if not rows:
        return torch.zeros(0, dtype=torch.int64)
    seen: dict[Any, int] = {}
    rank = []
    margins = rows["margin"].argsort(descending=True).tolist()
    true, rival, wrong = (rows[name].tolist() for name in ("true", "rival", "wrong"))
    for index in margins:
        pair = (true[index], rival[index], wrong[index])
        rank.append((not wrong[index], seen.get(pair, 0), index))
        seen[pair] = seen.get(pair, 0) + 1
    return torch.tensor([index for *_, index in sorted(rank)], dtype=torch.int64)


def _store(result: Packed, judged: Judged, encoded: dict[int, bytes], images: int, examples: int) -> None:
    gallery, data, chunks = judged.top_images, result.data, result.chunks
    rows = {name: value[:examples] for name, value in judged.examples.rows.items()}
    order: dict[int, int] = {}
    for place in [*gallery.places[:, :images].flatten().tolist(), *(rows["place"].tolist() if rows else [])]:
        if place in encoded:
            order.setdefault(place, len(order))
    places = list(order)
    data["pictures"] = {"lengths": [len(encoded[place]) for place in places], "chunk": _IN_A_CHUNK}
    small = max((max(judged.pictures.shape(place)) for place in places), default=0)
    data["pictures"]["small"] = small <= 40
    for start in range(0, len(places), _IN_A_CHUNK):
        chunks[f"t{start // _IN_A_CHUNK}"] = b"".join(encoded[place] for place in places[start : start + _IN_A_CHUNK])
    data["shown"] = {
        str(channel): [
            [order.get(place, -1), _short(value), label]
            for place, value, label in zip(
                gallery.places[row, :images].tolist(),
                gallery.values[row, :images].tolist(),
                gallery.labels[row, :images].tolist(),
                strict=True,
            )
        ]
        for row, channel in enumerate(gallery.channels.tolist())
    }
    data["perChannel"] = gallery.places[:, :images].shape[1]
    data["maps"] = None
    if gallery.maps is not None:
        maps = gallery.maps[:, :images]
        largest = maps.abs().flatten(1).amax(1).clamp(min=1e-12)
        # 128 is zero
        bytes_ = (maps / largest[:, None, None, None] * 127 + 128).round().clamp(1, 255).byte().numpy()
        data["maps"] = {
            "size": list(maps.shape[2:]),
            "rows": _IN_A_CHUNK,
            "largest": [_short(value) for value in largest.tolist()],
            "signed": bool((maps < 0).any()),
        }
        for start in range(0, len(bytes_), _IN_A_CHUNK):
            chunks[f"m{start // _IN_A_CHUNK}"] = bytes_[start : start + _IN_A_CHUNK].tobytes()
    _store_examples(data, chunks, rows, order)


def _store_examples(
    data: dict[str, Any], chunks: dict[str, bytes], rows: dict[str, Tensor], order: dict[int, int]
) -> None:
    data["examples"] = []
    data["exampleMaps"] = None
    if not rows or not len(rows["place"]):
        return
    scales: list[float] = []
    for start in range(0, len(rows["features"]), _ROWS):
        chunks[f"f{start // _ROWS}"], part = sixteen_bits(rows["features"][start : start + _ROWS])
        scales += part
    for index, place in enumerate(rows["place"].tolist()):
        data["examples"].append(
            {
                "picture": order.get(place, -1),
                "place": place,
                "true": int(rows["true"][index]),
                "rival": int(rows["rival"][index]),
                "wrong": bool(rows["wrong"][index]),
                "scale": float(f"{scales[index]:.9g}"),
                "best": rows["best"][index].tolist(),
                "logits": [float(f"{value:.8g}") for value in rows["logits"][index].tolist()],
            }
        )
    if "maps" in rows:
        maps = rows["maps"]
        largest = maps.abs().flatten(1).amax(1).clamp(min=1e-12)
        bytes_ = (maps / largest[:, None, None, None] * 127 + 128).round().clamp(1, 255).byte().numpy()
        data["exampleMaps"] = {
            "size": list(maps.shape[2:]),
            "rows": _ROWS,
            "largest": [_short(value) for value in largest.tolist()],
        }
        for start in range(0, len(bytes_), _ROWS):
            chunks[f"e{start // _ROWS}"] = bytes_[start : start + _ROWS].tobytes()


# -- tables ------------------------------------------------------------------------------------------------------------


def _curve(judged: Judged, filters: ClassFilters) -> list[dict[str, Any]]:
    frame = judged.curve[judged.curve.class_name == "all"]
    return [
        {
            "kind": "dense" if row["filters"] == "dense" else "random" if row["control"] else "filters",
            "k": int(row["k"]),
            "value": _short(row["accuracy"]),
            "low": _short(row["low"]),
            "high": _short(row["high"]),
        }
        for row in frame.to_dict("records")
    ]


def _confusions(matrix: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The whole matrix of few classes, and the most confused pairs."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    true, predicted = np.nonzero(wrong)
    times = wrong[true, predicted]
    order = np.lexsort((predicted, true, -times))[:_PAIRS]
    return {
        "matrix": matrix.tolist() if len(matrix) <= _MATRIX else None,
        "pairs": [[int(true[i]), int(predicted[i]), int(times[i])] for i in order],
        "pairsLeftOut": max(0, len(times) - _PAIRS),
    }


def _tops(trained: Trained, judged: Judged, most: int) -> dict[str, Any]:
    filters = trained.filters
    top = filters.top(most)
    chosen = top.clamp(min=0)
    scores = filters.scores.gather(1, chosen)
    if filters.merge_rule == "sum":
        scores = scores / filters.counts.clamp(min=1)[:, None]
    within = stability(trained, most) if trained.parts else None
    places = None
    if judged.mean_maps is not None:
        flat = judged.mean_maps.flatten(2)
        largest = flat.amax(2, keepdim=True).clamp(min=1e-12)
        places = {
            "size": list(judged.mean_maps.shape[2:]),
            "values": base64.b64encode((flat / largest * 255).round().byte().numpy().tobytes()).decode()
            if flat.numel() <= 1_500_000
            else None,
        }
    return {
        "top": [row if row[0] >= 0 else [] for row in top.tolist()],
        "scores": [[_short(value) for value in row] for row in scores.tolist()],
        "stability": None
        if within is None
        else [["".join(str(round(v * PARTS)) for v in cell) for cell in row] for row in within.tolist()],
        "parts": PARTS,
        "places": places,
    }


def _suspects(judged: Judged, filters: ClassFilters, most: int) -> list[dict[str, Any]]:
    frame = judged.suspects.head(_SUSPECTS)
    row_of = {name: index for index, name in enumerate(filters.class_names)}
    columns = [name for name in frame.columns if name not in ("class_name", "channel", "samples", "also_in")]
    return [
        {
            "class": row_of[row["class_name"]],
            "channel": int(row["channel"]),
            "alsoIn": int(row["also_in"]),
            "samples": int(row["samples"]),
            **{_camel(name): _short(row[name]) for name in columns},
        }
        for row in frame.to_dict("records")
    ]


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _frame(frame: Any) -> dict[str, Any] | None:
    """A frame as columns and rows of text."""
    if frame is None:
        return None
    rows = frame.reset_index() if any(name is not None for name in frame.index.names) else frame
    cells = [
        [_short(cell) if isinstance(cell, float) else printable(str(cell)) for cell in row]
        for row in rows.itertuples(index=False)
    ]
    return {"columns": [printable(str(column)) for column in rows.columns], "rows": cells}


def _short(value: Any) -> float | None:
    """Five digits; None for what is no number."""
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else None
