"""The selectors, one record each: what every sample of a class adds, and how scores follow from the sums.

To add a selector, add a record to `RECORDS`; nothing else needs to know of it. Nothing here sees a model, a loader or a
file. Source of the histogram: Badola et al. 2022, "Decomposing the Deep", Algorithm 1. The others are ours, to compare
with. N samples, K features, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from captum_classfilters.core.class_sums import class_correlation


class Sample(NamedTuple):
    """What a selector may look at in a batch."""

    features: Tensor  # (N, K)
    logits: Tensor  # (N, C)
    classes: Tensor  # (N,) int64
    weight: Tensor  # (C, K)
    importance: str  # "abs" or "signed"
    votes: Tensor | None  # (N, K) bool, of the selectors that vote
    own: Tensor | None = None  # (N, C) bool, all classes of a sample that has many labels


class Totals(NamedTuple):
    """What scores may follow from after the last batch."""

    sums: Mapping[str, Tensor]  # (C, K) float64, as the record names them
    counts: Tensor  # (C,) int64
    weight: Tensor  # (C, K)
    importance: str
    k1: int | float
    seed: int


class Selector(NamedTuple):
    """How one selector scores channels."""

    # the quantities that are added up by class: what a batch adds, (N, K) each
    rows: Mapping[str, Callable[[Sample], Tensor]]
    # (C, K) float64 from the totals
    scores: Callable[[Totals], Tensor]
    # it looks at the k1 strongest features of each sample
    votes: bool = False
    # a class is told from others by true labels: the model's predictions do not do
    needs_labels: bool = False
    # as `ClassFilters.merge_rule`
    merge_rule: str = "sum"


def importance_of(features: Tensor, importance: str) -> Tensor:
    """``abs``: the l1 norm of a single number (the paper). ``signed``: the number itself (the published code)."""
    return features.abs() if importance == "abs" else features


def votes(importance: Tensor, k1s: Sequence[int | float]) -> list[Tensor]:
    """Each sample votes for its ``k1`` most important features; one sort serves every k1.

    Source: Badola et al. 2022, section 4.4, Algorithm 1, line 5. Differs from the paper: a feature that is zero (or,
    signed, not above zero) gets no vote, and equal features are taken by lower index; the paper says nothing of either.

    Args:
        importance: Shape ``(N, K)``.
        k1s: Each an int, or a share in (0, 1): then as many features as cover that share of the sample's total.

    Returns:
        For each k1 a ``(N, K)`` bool table.

    Example:
        >>> table = torch.tensor([[4.0, 1.0, 3.0, 0.0]])
        >>> [v.long().tolist() for v in votes(table, [1, 0.6, 4])]
        [[[1, 0, 0, 0]], [[1, 0, 1, 0]], [[1, 1, 1, 0]]]
    """
    values, order = importance.sort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    positive = importance > 0
    tables = []
    for k1 in k1s:
        if isinstance(k1, int):
            limit: int | Tensor = k1
        else:
            covered = values.clamp(min=0).double().cumsum(1)
            limit = (covered < k1 * covered[:, -1:]).sum(1, keepdim=True) + 1
        tables.append((rank < limit) & positive)
    return tables


def contribution(sample: Sample) -> Tensor:
    """``W_yj f_j``: with the bias, the row sums to the class's logit. Shape ``(N, K)``."""
    return sample.weight[sample.classes].double() * sample.features.double()


def margin(sample: Sample) -> Tensor:
    """``(W_yj - W_rj) f_j`` with r the strongest other class: what tells y from its rival. Shape ``(N, K)``.

    Of many labels r is the strongest class that the sample has not; one that has all classes has no rival.
    """
    if sample.own is not None:
        others = sample.logits.masked_fill(sample.own, -torch.inf)
        alone = sample.own.all(1, keepdim=True)
        rivals = sample.weight[others.argmax(1)].masked_fill(alone, 0)
        return (sample.weight[sample.classes] - rivals).double() * sample.features.double()
    others = sample.logits.scatter(1, sample.classes[:, None], -torch.inf)
    rival = others.argmax(1)
    return (sample.weight[sample.classes] - sample.weight[rival]).double() * sample.features.double()


def ablation(sample: Sample, cells: int | None = None) -> Tensor:
    """Loss of log-probability of y when feature j alone is set to zero. Shape ``(N, K)``.

    The probability is that of a softmax; of many labels, where each class has its own, that of a sigmoid.

    Exact for each single feature, not an approximation: the logits without j are ``z - W_:j f_j``. Costs ``N C K``;
    done in slices of at most ``cells`` numbers, by default such as a CPU's cache takes, and bigger ones on a GPU.
    """
    if sample.own is not None:
        z = sample.logits.double().gather(1, sample.classes[:, None])
        return logsigmoid(z) - logsigmoid(z - contribution(sample))
    if cells is None:
        cells = 2**20 if sample.features.device.type == "cpu" else 2**24
    count, (classes, features) = len(sample.features), sample.weight.shape
    step = max(1, cells // (classes * features))
    logits, weight = sample.logits.double(), sample.weight.double()
    rows = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        y = sample.classes[part]
        z = logits[part, :, None]
        without = z - weight * sample.features[part, None, :].double()  # (n, C, K)
        index = y[:, None, None].expand(-1, 1, features)
        after = without.gather(1, index).squeeze(1) - without.logsumexp(1)
        before = z.squeeze(2).gather(1, y[:, None]) - z.squeeze(2).logsumexp(1, keepdim=True)
        rows.append(before - after)
    return torch.cat(rows)


def heaviest(weight: Tensor, k: int, importance: str) -> Tensor:
    """The k largest weights of each class, ``(C, K)`` bool."""
    chosen = importance_of(weight, importance).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, chosen, True)


def _votes_of(sample: Sample) -> Tensor:
    return sample.votes.double()  # type: ignore[union-attr]


def _votes_for_heavy_weights(totals: Totals) -> Tensor:
    # a share of the l1 mass is another number in every sample; weights have none
    k1 = totals.k1 if isinstance(totals.k1, int) else round(totals.weight.shape[1] ** 0.5)
    return totals.sums["score"] * heaviest(totals.weight, k1, totals.importance)


def _random(totals: Totals) -> Tensor:
    generator = torch.Generator().manual_seed(totals.seed)
    return torch.rand(totals.weight.shape, generator=generator, dtype=torch.float64)


def _summed(rows: Callable[[Sample], Tensor]) -> Selector:
    """Scores are the sum of these rows over the samples of a class."""
    return Selector({"score": rows}, lambda totals: totals.sums["score"].clone())


# The correlation of a channel with being of a class: 1 where the channel is high for this class and low for all others
_CORRELATION = Selector(
    {"total": lambda sample: sample.features.double(), "squares": lambda sample: sample.features.double() ** 2},
    lambda totals: class_correlation(totals.counts, totals.sums["total"], totals.sums["squares"]),
    needs_labels=True,
    merge_rule="correlation",
)

RECORDS: dict[str, Selector] = {
    "histogram": Selector({"score": _votes_of}, lambda totals: totals.sums["score"].clone(), votes=True),
    "mean_activation": _summed(lambda sample: importance_of(sample.features, sample.importance)),
    "weight": Selector({}, lambda totals: importance_of(totals.weight, totals.importance).double(), merge_rule="same"),
    "contribution": _summed(contribution),
    "weight_and_activation": Selector({"score": _votes_of}, _votes_for_heavy_weights, votes=True),
    "margin": _summed(margin),
    "ablation": _summed(ablation),
    "correlation": _CORRELATION,
    "random": Selector({}, _random, merge_rule="same"),
}
SELECTORS = tuple(RECORDS)
VOTING = tuple(name for name, record in RECORDS.items() if record.votes)
# Those that look at no samples
STATIC = tuple(name for name, record in RECORDS.items() if not record.rows)
