"""`ClassFilters`: the one shape in which every method answers which channels work for which class.

A ``C x K`` table and what is needed to rank, compare, merge and store it. How the scores come about is known in the
method's own room. C classes, K channels.
"""

import difflib
import html
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from captum_classfilters.core.check import integer, one_of
from captum_classfilters.core.class_sums import class_correlation
from captum_classfilters.core.errors import (
    MergeError,
    OptionError,
    ShapeError,
    UnseenClassWarning,
    quoted,
)
from captum_classfilters.core.files import checked_tensor, contents, read, text, texts, write
from captum_classfilters.core.head import Head
from captum_classfilters.core.outputs import innermost
from captum_classfilters.core.ranks import sum_over

if TYPE_CHECKING:
    import pandas as pd

_KIND, _VERSION = "ClassFilters", 2
# Files of version 1 say in their meta how tables merge, and hold no further sums
_OLD_VERSION = 1

# How tables of disjoint shards become one: scores add up over samples; scores are of the weights and must be the same;
# scores are a correlation, which follows from sums; they do not merge
MERGE_RULES = ("sum", "same", "correlation", "none")
_CORRELATION_SUMS = ("total", "squares")
# Of a table that was made without a model, such as that of a gate set by hand: it goes by its shape
UNKNOWN_LAYER = "unknown"


@dataclass(frozen=True, eq=False)
class ClassFilters:
    """Which channels work for which class.

    Attributes:
        scores: ``(C, K)`` float64; the bigger, the more this channel works for this class. A sum over samples where the
            method counts or adds (``merge_rule == "sum"``): divide by ``counts`` for rates.
        mass: ``(C, K)`` float64, accumulated ``|feature|``; breaks ties.
        counts: ``(C,)`` int64, samples behind each row. A class without samples is in no `top` or `mask`.
        method: Which method, such as ``"histogram"``.
        layer: Name of the layer whose input channels these are.
        class_names: C names, unique.
        meta: How the table was made; what JSON can hold.
        merge_rule: How tables of disjoint shards become one. ``"sum"``: the scores add up over samples; ``"same"``:
            they do not depend on samples; ``"correlation"``: they follow from ``sums``; ``"none"``: they do not merge.
        sums: What the scores follow from where they do not add up themselves: ``(C, K)`` float64 each.

    Raises:
        ShapeError: The shapes do not agree.
        OptionError: Class names are repeated, or the merge rule is unknown.

    Example:
        >>> scores = torch.tensor([[5.0, 1.0, 3.0], [0.0, 4.0, 3.0]], dtype=torch.float64)
        >>> filters = ClassFilters(scores, scores, torch.tensor([5, 5]), "histogram", "fc", ("cat", "dog"))
        >>> filters.top(2).tolist()
        [[0, 2], [1, 2]]
        >>> filters.contrast("cat", "dog", k=2).tolist()
        [0]
    """

    scores: Tensor
    mass: Tensor
    counts: Tensor
    method: str
    layer: str
    class_names: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    merge_rule: str = "sum"
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scores.dim() != 2 or self.mass.shape != self.scores.shape:
            raise ShapeError(
                f"scores and mass must both have shape (C, K), got {tuple(self.scores.shape)} and "
                f"{tuple(self.mass.shape)}"
            )
        if self.counts.shape != self.scores.shape[:1] or len(self.class_names) != len(self.scores):
            raise ShapeError(
                f"expected {len(self.scores)} counts and class names, one for each row of scores; got counts of shape "
                f"{tuple(self.counts.shape)} and {len(self.class_names)} names"
            )
        check_names(self.class_names)
        one_of(self.merge_rule, "merge_rule", MERGE_RULES)
        expected = set(_CORRELATION_SUMS) if self.merge_rule == "correlation" else set()
        if set(self.sums) != expected or any(table.shape != self.scores.shape for table in self.sums.values()):
            raise ShapeError(
                f"sums must be {sorted(expected)} of the shape of scores for the merge rule {self.merge_rule!r}; got "
                f"{ {name: tuple(table.shape) for name, table in self.sums.items()} }"
            )

    def __repr__(self) -> str:
        unseen = int((self.counts == 0).sum())
        return (
            f"ClassFilters({self.method!r}, {self.num_classes} classes x {self.num_channels} channels of "
            f"{self.layer!r}, "
            f"{int(self.counts.sum())} samples{f', {unseen} classes unseen' if unseen else ''})"
        )

    def _repr_html_(self) -> str:
        """The strongest channels of the first classes, for notebooks."""
        shown, k = min(20, self.num_classes), min(5, self.num_channels)
        rows = [
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{samples}</td><td style='text-align:left'>"
            + (", ".join(map(str, channels)) if samples else "no samples")
            + "</td></tr>"
            for name, samples, channels in zip(
                self.class_names[:shown], self.counts[:shown].tolist(), self.top(k)[:shown].tolist(), strict=True
            )
        ]
        more = f"<p>and {self.num_classes - shown} more classes</p>" if self.num_classes > shown else ""
        return (
            f"<p>{html.escape(repr(self))}</p><table><thead><tr><th>class</th><th>samples</th>"
            f"<th>{k} strongest channels</th></tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"
        )

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.scores.shape[0])

    @property
    def num_channels(self) -> int:
        """K."""
        return int(self.scores.shape[1])

    @property
    def seen(self) -> Tensor:
        """``(C,)`` bool: classes with at least one sample."""
        return self.counts > 0

    def ranking(self) -> Tensor:
        """``(C, K)`` int64, all channels, strongest first: by score, then by mass, then by lower index."""
        return self._ranking().clone()

    def _ranking(self) -> Tensor:
        """As `ranking`; sorted once, and again only where scores or mass were written into since."""
        inference = self.scores.is_inference() or self.mass.is_inference()
        versions = None if inference else (self.scores._version, self.mass._version)
        cached = self.__dict__.get("_sorted")
        if versions is not None and cached is not None and cached[0] == versions:
            return cached[1]  # type: ignore[no-any-return]
        by_mass = self.mass.sort(dim=1, descending=True, stable=True).indices
        by_score = self.scores.gather(1, by_mass).sort(dim=1, descending=True, stable=True).indices
        ranking = by_mass.gather(1, by_score)
        object.__setattr__(self, "_sorted", (versions, ranking))
        return ranking

    def top(self, k: int) -> Tensor:
        """The k strongest channels of each class, ``(C, k)`` int64; -1 throughout for a class without samples.

        Always k of them: where fewer have a score above zero, the next in the ranking fill up.

        Raises:
            OptionError: k is not in ``[1, K]``.
        """
        self._check_k(k)
        return self._ranking()[:, :k].masked_fill(~self.seen[:, None], -1)

    def mask(self, k: int) -> Tensor:
        """`top` as a table, ``(C, K)`` bool; a class without samples has no channel."""
        self._check_k(k)
        mask = torch.zeros_like(self.scores, dtype=torch.bool)
        return mask.scatter_(1, self._ranking()[:, :k], True) & self.seen[:, None]

    def to_frame(self, k: int | None = None) -> "pd.DataFrame":
        """The table as rows of a pandas DataFrame: each class's k strongest channels, strongest first.

        Args:
            k: How many channels of each class; None: all.

        Returns:
            ``class_name``, ``rank`` (1 is the strongest), ``channel``, ``score``, ``mass``, ``samples``. A class
            without samples has no rows.

        Raises:
            OptionError: k is not in ``[1, K]``.

        Example:
            >>> scores = torch.tensor([[5.0, 1.0, 3.0], [0.0, 4.0, 3.0]], dtype=torch.float64)
            >>> filters = ClassFilters(scores, scores, torch.tensor([5, 5]), "histogram", "fc", ("cat", "dog"))
            >>> filters.to_frame(1)
              class_name  rank  channel  score  mass  samples
            0        cat     1        0    5.0   5.0        5
            1        dog     1        1    4.0   4.0        5
        """
        import pandas as pd  # slow to import, and of no use to most who make a table

        k = self.num_channels if k is None else k
        rows = self.seen.nonzero().flatten()
        channels = self.top(k)[rows]
        names = [self.class_names[row] for row in rows.tolist()]
        return pd.DataFrame(
            {
                "class_name": [name for name in names for _ in range(k)],
                "rank": torch.arange(1, k + 1).repeat(len(rows)).numpy(),
                "channel": channels.flatten().numpy(),
                "score": self.scores[rows].gather(1, channels).flatten().numpy(),
                "mass": self.mass[rows].gather(1, channels).flatten().numpy(),
                "samples": self.counts[rows].repeat_interleave(k).numpy(),
            }
        )

    def overlap(self, k: int) -> Tensor:
        """Jaccard index of each two classes' top-k sets, ``(C, C)`` float64; NaN for a class without samples."""
        chosen = self.mask(k).double()
        shared = chosen @ chosen.T
        return (shared / (2 * k - shared)).masked_fill(~(self.seen[:, None] & self.seen), torch.nan)

    def contrast(self, a: str | int, b: str | int, k: int) -> Tensor:
        """Channels among the top k of class ``a`` and not of ``b``, strongest for ``a`` first; 1-D int64, at most k.

        Args:
            a: Class by name or index.
            b: The class to tell it from.
            k: How many channels of each are looked at.

        Raises:
            OptionError: Unknown class, ``a`` is ``b``, or k is not in ``[1, K]``.
        """
        first, second = self.index(a), self.index(b)
        if first == second:
            raise OptionError(f"contrast needs two different classes, got {a!r} and {b!r}")
        for name, row in ((a, first), (b, second)):
            if not self.seen[row]:
                raise OptionError(
                    f"class {name!r} has no samples, so nothing is known of its channels; show some first"
                )
        top, mask = self.top(k), self.mask(k)
        return top[first][~mask[second][top[first]]]

    def index(self, name: str | int) -> int:
        """The row of a class given by name or index; the case of letters does not matter where one name fits.

        Raises:
            OptionError: No such class; names those that are spelt nearly so.

        Example:
            >>> scores = torch.zeros(2, 3, dtype=torch.float64)
            >>> ClassFilters(scores, scores, torch.tensor([5, 5]), "histogram", "fc", ("cat", "dog")).index("Dog")
            1
        """
        if isinstance(name, str):
            if name in self.class_names:
                return self.class_names.index(name)
            folded = [entry.casefold() for entry in self.class_names]
            if folded.count(name.casefold()) == 1:
                return folded.index(name.casefold())
            near = difflib.get_close_matches(name.casefold(), folded, 3)
            meant = [entry for entry, lower in zip(self.class_names, folded, strict=True) if lower in near]
            shown = ", ".join(self.class_names[:10]) + (", ..." if self.num_classes > 10 else "")
            raise OptionError(
                f"no class is named {name!r}; "
                + (f"did you mean {' or '.join(map(repr, meant))}? " if meant else "")
                + f"the names are: {shown}"
            )
        return integer(name, "a class", 0, self.num_classes - 1, meaning="its index, or a name")

    @staticmethod
    def merge(*parts: "ClassFilters") -> "ClassFilters":
        """Put tables of disjoint shards together; exactly what one pass over all of them gives.

        Sums lie on a grid on which addition is exact, so that neither the split nor the order matters (sums of
        ``|feature|`` up to 5e8 per cell; beyond, they round as any float64 does).

        Raises:
            MergeError: No parts, or parts of different methods, layers, classes or options.
        """
        if not parts:
            raise MergeError("merge needs at least one table, got none")
        for part in parts:
            if not isinstance(part, ClassFilters):
                raise MergeError(f"merge takes tables one by one, merge(*parts); got {type(part).__name__}")
        first = parts[0]
        for part in parts[1:]:
            for what in ("method", "layer", "class_names", "merge_rule"):
                if getattr(part, what) != getattr(first, what):
                    raise MergeError(
                        f"{what} differs: {getattr(first, what)!r} and {getattr(part, what)!r}; merge tables of one run"
                    )
            if part.scores.shape != first.scores.shape:
                raise MergeError(
                    f"shapes differ: {tuple(first.scores.shape)} and {tuple(part.scores.shape)}; merge tables of "
                    "one model"
                )
            if dict(part.meta) != dict(first.meta):
                odd = sorted(key for key in {*part.meta, *first.meta} if part.meta.get(key) != first.meta.get(key))
                raise MergeError(f"options differ in {odd}; merge tables made with the same options")
        if first.merge_rule == "none":
            raise MergeError(
                f"tables of method {first.method!r} cannot be merged: their scores do not add up over samples"
            )
        if first.merge_rule == "same" and any(not torch.equal(part.scores, first.scores) for part in parts[1:]):
            raise MergeError(
                f"scores of method {first.method!r} do not depend on samples, yet differ: other weights or seed"
            )
        mass = torch.stack([part.mass for part in parts]).sum(0)
        counts = torch.stack([part.counts for part in parts]).sum(0)
        sums = {name: torch.stack([part.sums[name] for part in parts]).sum(0) for name in first.sums}
        scores = first.scores if first.merge_rule == "same" else torch.stack([part.scores for part in parts]).sum(0)
        return first._with(scores, mass, counts, sums)

    def without(self, part: "ClassFilters") -> "ClassFilters":
        """The table of the other samples, where ``part`` is that of some of them: sums subtract as exactly as they add.

        Raises:
            MergeError: The scores do not follow from sums over samples.
        """
        if self.merge_rule not in ("sum", "correlation"):
            raise MergeError(f"scores of method {self.method!r} are no sums over samples: no part can be taken away")
        sums = {name: table - part.sums[name] for name, table in self.sums.items()}
        return self._with(self.scores - part.scores, self.mass - part.mass, self.counts - part.counts, sums)

    def _with(self, scores: Tensor, mass: Tensor, counts: Tensor, sums: Mapping[str, Tensor]) -> "ClassFilters":
        """The same table of other samples."""
        if self.merge_rule == "correlation":
            scores = class_correlation(counts, *(sums[name] for name in _CORRELATION_SUMS))
        return replace(self, scores=scores, mass=mass, counts=counts, sums=sums)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a safetensors file; whole or not at all."""
        tensors = {"scores": self.scores, "mass": self.mass, "counts": self.counts}
        tensors |= {f"sums {name}": table for name, table in self.sums.items()}
        about = {
            "method": self.method,
            "layer": self.layer,
            "class_names": list(self.class_names),
            "meta": dict(self.meta),
            "merge_rule": self.merge_rule,
        }
        write(path, tensors, kind=_KIND, version=_VERSION, meta=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ClassFilters":
        """Read what `save` wrote; runs no code of the file.

        Raises:
            FileNotFoundError: No such file.
            FileFormatError: Broken, truncated, foreign, or of another schema version.
        """
        tensors, about = read(path, kind=_KIND, version=(_VERSION, _OLD_VERSION))
        with contents(path, "a whole table"):
            about["class_names"] = texts(about["class_names"], "class_names")
            for name in ("method", "layer"):
                text(about[name], name)
            if not isinstance(about["meta"], dict):
                raise TypeError("meta must be a table")
            if "merge_rule" not in about:
                old_rule = about["meta"].pop("merge", "sum")
                about["merge_rule"] = old_rule if old_rule in ("sum", "same") else "none"
            shape = (len(about["class_names"]), tensors["scores"].shape[-1])
            checked_tensor(tensors, "counts", torch.int64, shape[0])
            for name in tensors.keys() - {"counts"}:
                checked_tensor(tensors, name, torch.float64, *shape)
            sums = {name.removeprefix("sums "): tensors.pop(name) for name in list(tensors) if name[:5] == "sums "}
            return cls(**{**tensors, **about, "sums": sums})

    def report(
        self, model: Any, loader: Any, path: str | os.PathLike[str] = "report.html", *, options: Any = None
    ) -> Any:
        """Write one HTML file that shows this table, its channels, confusions and suspects; see `report`.

        Args:
            model: The network that the table is of; borrowed.
            loader: Batches ``(inputs, labels)`` to judge and to show; not those that the table was made from.
            path: The file to write.
            options: `ReportOptions`; None: as they are by default.

        Returns:
            A `Report`.

        Raises:
            As `report` does.
        """
        # the room of reports is above this floor
        room: Any = import_module("captum_classfilters.report")
        chosen = room.ReportOptions() if options is None else options
        return room.report(model, None, loader, path, filters=self, options=chosen)

    def _check_k(self, k: int) -> None:
        check_k(k, self.num_channels, "k")


def merge_ranks(group: Any, mine: Mapping[Any, ClassFilters] | None, network: Any = None) -> dict[Any, ClassFilters]:
    """`ClassFilters.merge` over the ranks of a process group, by all-reduce: every rank gets the tables of all.

    Args:
        group: The process group.
        mine: This rank's tables; None where its shard was empty.
        network: What they were made with; those of all ranks must have the same weights.

    Raises:
        MergeError: The tables do not belong together, or a rank did not come.
        EmptyLoaderError: All shards were empty.
    """
    tensors: dict[str, Tensor] = {}
    about = []
    for index, (key, table) in enumerate((mine or {}).items()):
        tensors |= {f"{index} {what}": getattr(table, what) for what in ("scores", "mass", "counts")}
        tensors |= {f"{index} sums {name}": sums for name, sums in table.sums.items()}
        # what does not add up is compared instead
        check = float(table.scores.sum()) if table.merge_rule == "same" else None
        names = tuple(table.sums)
        about.append(
            (key, table.method, table.layer, table.class_names, dict(table.meta), table.merge_rule, names, check)
        )
    same = [f"{index} scores" for index, entry in enumerate(about) if entry[-1] is not None]
    total, about = sum_over(group, None if mine is None else tensors, about, same=same, network=network)
    merged = {}
    for i, (key, method, layer, class_names, meta, merge_rule, names, _) in enumerate(about):
        sums = {name: total[f"{i} sums {name}"] for name in names}
        scores, mass, counts = (total[f"{i} {what}"] for what in ("scores", "mass", "counts"))
        table = ClassFilters(scores, mass, counts, method, layer, class_names, meta, merge_rule, sums)
        merged[key] = table._with(scores, mass, counts, sums)
    return merged


def check_k(k: Any, channels: int, name: str = "k") -> int:
    """A number of channels in ``[1, K]``."""
    return integer(k, name, 1, channels, meaning="the number of channels")


def check_names(names: Sequence[str]) -> None:
    """Refuse repeated class names, and the one that the metrics use themselves."""
    if len(set(names)) != len(names):
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        raise OptionError(f"class names must be unique, got {quoted(twice)} more than once; number them apart")
    if "all" in names:
        raise OptionError("no class may be named 'all': the metrics use it for all classes together; rename it")


def names_of(requested: Sequence[str] | None, classes: int, loader: Any = None, model: Any = None) -> tuple[str, ...]:
    """The class names that were asked for, checked; else those of the loader's data set or of the model; else numbers.

    Args:
        requested: C names in the order of the class indices, or a dict of names and indices; None: others stand in.
        classes: C.
        loader: A DataLoader whose data set may have ``.classes``: names, numbers, a dict, their count, or a method
            that returns one of these. A class called ``"all"`` there gets its index behind it. None: nobody else
            names the classes.
        model: A model whose ``config.id2label`` may name them, as Hugging Face models do.

    Raises:
        OptionError: ``requested`` has not C names, or repeats one.
    """
    names = _dataset_names(loader, classes) if requested is None else _in_index_order(requested)
    if names is None and requested is None:
        return _model_names(model, classes) or tuple(map(str, range(classes)))
    if names is None:
        raise OptionError(
            f"class_names must be {classes} names in the order of the class indices, or a dict of names and indices; "
            f"got {requested!r:.80}"
        )
    if len(names) != classes:
        raise OptionError(f"class_names must be {classes}, one for each class; got {len(names)}")
    check_names(names)
    return names


def _dataset_names(loader: Any, classes: int) -> tuple[str, ...] | None:
    """The names that a data set has, told apart; None where it has none, or not as many as the head has outputs."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if callable(names) and not isinstance(names, type):
        try:
            names = names()
        except Exception:  # a method of the user's that does something else
            return None
    in_order = _in_index_order(names)
    count = len(in_order) if in_order is not None else names
    if isinstance(count, int) and not isinstance(count, bool) and count != classes:
        warnings.warn(
            f"the data set names {count} classes, the head has {classes} outputs: its labels may not be the "
            "head's class indices; pass class_names= if they are",
            UserWarning,
            stacklevel=8,
        )
        return None
    return None if in_order is None else _told_apart(in_order)


def _model_names(model: Any, classes: int) -> tuple[str, ...] | None:
    """The names in the config of a Hugging Face model; None where it has none, or other than C."""
    names = _in_index_order(getattr(getattr(innermost(model), "config", None), "id2label", None))
    return _told_apart(names) if names is not None and len(names) == classes else None


def _in_index_order(names: Any) -> tuple[str, ...] | None:
    """Names as text, in the order of the class indices; None for what is no list of names.

    A dict is read by its indices, ``{name: index}`` or ``{index: name}``: its own order says nothing.
    """
    if isinstance(names, Mapping):
        pairs = list(names.items())
        expected = set(range(len(pairs)))
        for index_of, name_of in ((1, 0), (0, 1)):
            indices = [pair[index_of] for pair in pairs]
            if all(isinstance(index, Integral) for index in indices) and set(map(int, indices)) == expected:
                return tuple(_as_text(pair[name_of]) for pair in sorted(pairs, key=lambda pair: int(pair[index_of])))
        return None
    if hasattr(names, "tolist"):
        names = names.tolist()
    if isinstance(names, str | bytes) or not isinstance(names, Sequence):
        return None
    return tuple(map(_as_text, names))


def _as_text(name: Any) -> str:
    """One name; torchvision's ImageNet has tuples of synonyms."""
    if isinstance(name, bytes):
        return name.decode("utf-8", errors="replace")
    return ", ".join(map(str, name)) if isinstance(name, tuple | list) else str(name)


def _told_apart(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names with their index behind those that repeat (ImageNet has two cranes), and behind ``"all"``."""
    repeated = {name for name, times in Counter(names).items() if times > 1} | {"all"}
    taken = set(names)
    result = []
    for index, name in enumerate(names):
        if name in repeated:
            name = f"{name} ({index})"
            while name in taken:
                name += "'"
            taken.add(name)
        result.append(name)
    return tuple(result)


def one_table(filters: Any) -> ClassFilters:
    """Refuse what is not a single table, such as the dict of several that `attribute` can return."""
    if not isinstance(filters, ClassFilters):
        make = (
            "; pass its table, .class_filters()"
            if hasattr(filters, "class_filters")
            else "; make one with InfluentialFeatures(model).attribute(loader)"
        )
        remedy = f"; of {list(filters)} pass one" if isinstance(filters, Mapping) else make
        raise OptionError(f"filters must be a ClassFilters, got {type(filters).__name__}{remedy}")
    return filters


def named_tables(filters: Any, taken: Sequence[str] = ()) -> dict[str, ClassFilters]:
    """Tables by name as text, without those of the random selector; a single table goes by its method.

    Args:
        filters: A table, or tables by name.
        taken: Names that the result uses itself.

    Raises:
        OptionError: No table, a name that is taken, or tables of different classes.
    """
    if isinstance(filters, ClassFilters):
        filters = {filters.method: filters}
    if not isinstance(filters, Mapping) or not all(isinstance(table, ClassFilters) for table in filters.values()):
        remedy = "; pass its table, .class_filters()" if hasattr(filters, "class_filters") else ""
        raise OptionError(
            f"filters must be a ClassFilters or {{name: ClassFilters}}, got {type(filters).__name__}{remedy}"
        )
    tables = {str(name): table for name, table in filters.items() if table.method != "random"}
    if not tables:
        raise OptionError("no table was given but the random selector's, for which the control stands; pass another")
    if len({str(name) for name in filters}) < len(filters):
        raise OptionError(f"the names {list(filters)} are not different as text; rename one")
    if len({table.class_names for table in tables.values()}) > 1:
        raise OptionError("the tables name their classes differently; pass tables of one data set")
    for name in tables:
        if name in taken:
            raise OptionError(f"a table may not be named {name!r}: the result uses that name itself; rename it")
    return tables


def check_table(filters: ClassFilters, head: Head) -> None:
    """Refuse a table of another network."""
    if filters.scores.shape != head.weight.shape or not (filters.layer == UNKNOWN_LAYER or head.goes_by(filters.layer)):
        raise ShapeError(
            f"the table is {filters.num_classes} classes x {filters.num_channels} channels of layer {filters.layer!r}, "
            f"the head {head.name!r} is {head.num_classes} x {head.num_features}; use the table made with this model "
            "(where only the name differs: dataclasses.replace(filters, layer=...))"
        )


def warn_unseen(filters: ClassFilters, stacklevel: int, result: Any = None) -> None:
    """One warning that names the classes without samples.

    Where warnings are errors, the finished ``result`` is the error's ``partial_result``.
    """
    unseen = [name for name, seen in zip(filters.class_names, filters.seen.tolist(), strict=True) if not seen]
    if unseen:
        shown = ", ".join(unseen[:10]) + (f", ... ({len(unseen)} in all)" if len(unseen) > 10 else "")
        try:
            warnings.warn(
                f"no sample of class {shown}: its count is 0, top() gives -1 and mask() nothing for it",
                UnseenClassWarning,
                stacklevel=stacklevel,
            )
        except UnseenClassWarning as error:
            error.partial_result = filters if result is None else result  # type: ignore[attr-defined]
            raise
