"""The running sums behind `InfluentialFeatures`: one ``C x K`` table for each selector and k1.

State does not grow with the number of samples. `selectors.py` says what a sample adds.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from captum_classfilters.class_filters import ClassFilters, check_k
from captum_classfilters.core.check import integer, number, one_of, some_of
from captum_classfilters.core.class_sums import ClassSums
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head import Head
from captum_classfilters.influential.selectors import RECORDS, SELECTORS, VOTING, Sample, Totals, importance_of, votes

K1 = int | float


class Options(NamedTuple):
    """What is asked for, checked."""

    names: tuple[str, ...]  # selectors, each once
    k1s: tuple[K1 | None, ...]  # for the selectors that vote; None stands for round(sqrt(K))
    importance: str
    label_source: str
    seed: int = 0

    @classmethod
    def checked(
        cls, names: Any, k1s: Sequence[Any], importance: Any, label_source: Any = "target", seed: Any = 0
    ) -> "Options":
        """Refuse what can be known to be wrong before any work starts.

        Raises:
            OptionError: An unknown selector, importance or label source, or a k1 out of range or without a selector
                that votes.
        """
        names = some_of(names, "selector", SELECTORS)
        one_of(importance, "importance", ("abs", "signed"))
        one_of(label_source, "label_source", ("target", "prediction"))
        needing = [name for name in names if RECORDS[name].needs_labels]
        if needing and label_source != "target":
            raise OptionError(
                f'selectors {needing} tell classes apart by true labels; pass label_source="target", or leave them out'
            )
        votes_asked = any(RECORDS[name].votes for name in names)
        if not votes_asked and any(k1 is not None for k1 in k1s):
            raise OptionError(f"k1 belongs to the selectors {list(VOTING)}, not to {names}; leave it out")
        plain = [k1 if k1 is None else _k1(k1) for k1 in k1s]
        return cls(tuple(names), tuple(dict.fromkeys(plain)), importance, label_source, integer(seed, "seed"))


def _k1(k1: Any) -> K1:
    meaning = "a share of each sample's l1 mass; or an integer of at least 1, a number of features"
    if isinstance(k1, float) or not hasattr(k1, "__index__"):
        return number(k1, "k1", 0, 1, open_ends=True, meaning=meaning)
    return integer(k1, "k1", 1)


class Tables:
    """Sums over samples, for all selectors and every k1 at once.

    Args:
        head: The classifier head; gives C, K, weights and device.
        options: Selectors, k1 and importance.
    """

    def __init__(self, head: Head, options: Options) -> None:
        self.head, self.options = head, options
        self.k1s: list[K1] = [round(head.num_features**0.5) if k1 is None else k1 for k1 in options.k1s]
        for k1 in self.k1s:
            if isinstance(k1, int):
                check_k(k1, head.num_features, "k1")
        self._weight = head.weight
        keys = [(name, k1, part) for name, k1 in self.keys() for part in RECORDS[name].rows]
        unrounded = [key for key in keys if RECORDS[key[0]].merge_rule == "correlation"]
        size = head.num_classes, head.num_features
        self._sums = ClassSums(*size, ["mass", *keys], self._weight.device, unrounded)

    def keys(self) -> Iterator[tuple[str, K1]]:
        """Selector and k1 of each table; k1 is 0 for a selector that does not vote."""
        for name in self.options.names:
            for k1 in self.k1s if RECORDS[name].votes else [0]:
                yield name, k1

    def add(self, features: Tensor, logits: Tensor, classes: Tensor, own: Tensor | None = None) -> None:
        """Take a batch in: features ``(N, K)``, logits ``(N, C)``, the class of each sample ``(N,)``.

        Of many labels a sample comes once for each of its classes; ``own`` says which these are, ``(N, C)`` bool.
        """
        rows: dict[Any, Tensor] = {"mass": features.abs()}
        sample = Sample(features, logits, classes, self._weight, self.options.importance, None, own)
        ballots: dict[K1, Tensor] = {}
        for name in self.options.names:
            record = RECORDS[name]
            if record.votes and not ballots:
                importance = importance_of(features, self.options.importance)
                ballots = dict(zip(self.k1s, votes(importance, self.k1s), strict=True))
            for k1 in self.k1s if record.votes else [0]:
                voting = sample._replace(votes=ballots.get(k1))
                rows |= {(name, k1, part): of(voting) for part, of in record.rows.items()}
        self._sums.add(classes, rows)

    def filters(self, class_names: tuple[str, ...], meta: dict[str, Any]) -> dict[tuple[str, K1], ClassFilters]:
        """The tables so far, on the CPU."""
        return {(name, k1): self._table(name, k1, class_names, meta) for name, k1 in self.keys()}

    def _table(self, name: str, k1: K1, class_names: tuple[str, ...], meta: dict[str, Any]) -> ClassFilters:
        record, options = RECORDS[name], self.options
        sums = {part: self._sums[name, k1, part] for part in record.rows}
        scores = record.scores(Totals(sums, self._sums.counts, self._weight, options.importance, k1, options.seed))
        kept = sums if record.merge_rule == "correlation" else {}
        return ClassFilters(
            scores=scores.cpu(),
            mass=self._sums["mass"].cpu().clone(),
            counts=self._sums.counts.cpu().clone(),
            method=name,
            layer=self.head.name,
            class_names=class_names,
            meta={
                **meta,
                **({"k1": k1} if record.votes else {}),
                **({"seed": options.seed} if name == "random" else {}),
                "importance": options.importance,
            },
            merge_rule=record.merge_rule,
            sums={part: table.cpu().clone() for part, table in kept.items()},
        )
