"""How well logits tell the samples that have a label from those that have not, for networks of many labels.

Average precision goes by the order of a class's logits, balanced accuracy by their sign. Intervals are bootstrap ones
over samples. N samples, C classes, B resamples.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_classfilters.core.head_pass import Batch
from captum_classfilters.core.intervals import Floats, mean_interval

RESAMPLES = 200
# How many weights of resamples are held at once
_CELLS = 2**23


def average_precision(scores: Floats, labels: NDArray[np.bool_], weights: Floats) -> Floats:
    """`sklearn.metrics.average_precision_score` of one class, for many weightings of the samples at once.

    Args:
        scores: ``(N,)``.
        labels: Which samples have the label, ``(N,)``.
        weights: How often each sample counts, ``(B, N)``.

    Returns:
        ``(B,)`` in [0, 1]; NaN where no sample has the label.

    Example:
        >>> labels = np.array([True, False, True])
        >>> average_precision(np.array([0.9, 0.8, 0.1]), labels, np.ones((1, 3))).round(3).tolist()
        [0.833]
    """
    order = np.argsort(-scores, kind="stable")
    # equal scores are one threshold
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    ordered = weights[:, order]
    hits = np.cumsum(ordered * labels[order], 1)[:, last]
    count = np.cumsum(ordered, 1)[:, last]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(count > 0, hits / count, 0)
        recall = hits / hits[:, -1:]
    result: Floats = (np.diff(recall, axis=1, prepend=0) * precision).sum(1)
    return result


def balanced_accuracy(positive: NDArray[np.bool_], labels: NDArray[np.bool_], weights: Floats) -> Floats:
    """`sklearn.metrics.balanced_accuracy_score` of each class: mean of the shares of both sides that are told right.

    Args:
        positive: Which samples the network gives the label, ``(N, C)``.
        labels: Which have it, ``(N, C)``.
        weights: As for `average_precision`.

    Returns:
        ``(B, C)`` in [0, 1]; NaN where all samples have the label, or none.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (weights @ (positive & labels)) / (weights @ labels)
        left = (weights @ (~positive & ~labels)) / (weights @ ~labels)
    result: Floats = (found + left) / 2
    return result


class Quality(NamedTuple):
    """Average precision and balanced accuracy, each ``(B, 1 + C)``: the mean over classes, then each class."""

    precision: Floats
    accuracy: Floats


def quality(logits: Tensor, labels: Tensor, resamples: int = 0, seed: int = 0) -> Quality:
    """Both numbers of the samples as they are (row 0), and of ``resamples`` draws with replacement.

    Args:
        logits: ``(N, C)``.
        labels: ``(N, C)`` bool.
        resamples: B - 1.
        seed: Seed of the draws.
    """
    scores, has = logits.double().cpu().numpy(), labels.cpu().numpy()
    count = len(scores)
    generator = np.random.default_rng(seed)
    parts: list[tuple[Floats, Floats]] = []
    for start in range(0, resamples + 1, step := max(1, _CELLS // max(1, count))):
        rows = min(step, resamples + 1 - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=rows).astype(np.float64)
        if start == 0:
            weights[0] = 1
        columns = [average_precision(scores[:, c], has[:, c], weights) for c in range(scores.shape[1])]
        parts.append((np.stack(columns, 1), balanced_accuracy(scores > 0, has, weights)))
    return Quality(*(_with_mean(np.concatenate(part)) for part in zip(*parts, strict=True)))


class ManyScores:
    """What a pass of many labels keeps: an average precision needs all logits at once.

    Args:
        batches: With labels ``(N, C)`` bool.
        seed: Seed of the bootstrap.

    Attributes:
        first: The first batch.
        head: The head.
    """

    def __init__(self, batches: Sequence[Batch], seed: int = 0) -> None:
        self._batches, self._seed, self.first, self.head = batches, seed, batches[0], batches[0].head

    @classmethod
    def read(cls, stream: Iterator[Batch], seed: int) -> tuple["ManyScores | None", Iterator[Batch]]:
        """Tell many labels from one for each sample: the scores of many, or None and the batches of one.

        Rows of which each has one class, in the whole loader, are one label for each sample.
        """
        first = next(stream)
        if first.labels is None or first.labels.dim() == 1:
            return None, chain([first], stream)
        kept = [batch._replace(inputs=(), extras=(), maps=None) for batch in chain([first], stream)]
        if not all(bool((batch.labels.sum(1) == 1).all()) for batch in kept if batch.labels is not None):
            return cls(kept, seed), iter(())
        return None, (
            batch._replace(labels=batch.labels.long().argmax(1)) for batch in kept if batch.labels is not None
        )

    @property
    def features(self) -> Tensor:
        """``(N, K)``."""
        return torch.cat([batch.features for batch in self._batches])

    @property
    def logits(self) -> Tensor:
        """``(N, C)``, of the full head."""
        return torch.cat([batch.logits for batch in self._batches])

    @property
    def labels(self) -> Tensor:
        """``(N, C)`` bool."""
        return torch.cat([batch.labels for batch in self._batches if batch.labels is not None])

    @property
    def samples(self) -> Any:
        """How many samples, then how many have each label: ``(1 + C,)``."""
        labels = self.labels
        return np.concatenate([[len(labels)], labels.sum(0).cpu().numpy()])

    def columns(self, logits: Tensor) -> dict[str, Any]:
        """Columns of a frame, ``(1 + C,)`` each, with bootstrap 95 % intervals over samples."""
        result = quality(logits, self.labels, RESAMPLES, self._seed)
        return _named(_bootstrapped(result.precision), _bootstrapped(result.accuracy))

    def chance_columns(self, draws: Iterable[Tensor]) -> dict[str, Any]:
        """The same of a control: means over its draws with their Student-t intervals."""
        results = [quality(logits, self.labels) for logits in draws]
        return _named(
            mean_interval(np.stack([result.precision[0] for result in results])),
            mean_interval(np.stack([result.accuracy[0] for result in results])),
        )


def _named(precision: tuple[Any, Any, Any], accuracy: tuple[Any, Any, Any]) -> dict[str, Any]:
    names = ("average_precision", "ap_low", "ap_high", "balanced_accuracy", "low", "high")
    return dict(zip(names, (*precision, *accuracy), strict=True))


def _bootstrapped(values: Floats) -> tuple[Any, Any, Any]:
    """The value of row 0 and the central 95 % of the other rows."""
    known = ~np.isnan(values).all(0)
    low, high = np.full((2, values.shape[1]), np.nan)
    low[known], high[known] = np.nanquantile(values[1:][:, known], [0.025, 0.975], axis=0)
    return values[0], low, high


def _with_mean(values: Floats) -> Floats:
    """``(B, C)`` with the mean over the classes that have a value put in front."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0).sum(1) / known.sum(1)
    return np.concatenate([mean[:, None], values], 1)
