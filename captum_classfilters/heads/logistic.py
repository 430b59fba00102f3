"""Refits that learn from labels by multinomial logistic regression, each class reading only its own features.

N samples, K features, C classes, k of the features kept for each class.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.class_filters import check_k
from captum_classfilters.core.errors import LabelError, OptionError, ShapeError
from captum_classfilters.core.head_pass import HeadPass

# Strengths that are tried, strongest first: each fit starts where the one before ended
STRENGTHS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# This share of the training samples judges the strengths
_HELD_OUT = 0.2
# Logits that are computed at once
_CELLS = 2**22
# Steps of L-BFGS on the way, and at the end
_SOME, _MANY = 30, 200
# With which forward selection refits
_SELECTING = 1e-4


class _Block(NamedTuple):
    """Some samples."""

    table: Tensor  # (K, n), standardised features
    labels: Tensor  # (n,)


class LogisticRefitter:
    """Standardised features and labels of a loader, kept: ``N x K`` numbers.

    Args:
        head_pass: The network and labelled training images.
        l2: Strength of the penalty ``l2 / 2 sum w^2`` beside the mean loss, w on features of unit variance; None:
            that of 1e-2 to 1e-6 whose loss on a fifth of the samples, held out by seed, is least.
        seed: Of what is held out.

    Raises:
        OptionError: A class has no samples, or no labels came.
    """

    def __init__(self, head_pass: HeadPass, l2: float | None = None, seed: int = 0) -> None:
        features, labels = [], []
        with head_pass.batches(description="logistic refit") as stream:
            for batch in stream:
                if batch.labels is None or batch.labels.dim() != 1:
                    raise LabelError(
                        "a logistic refit takes one class for each sample; labels of many classes are not served: use "
                        'refit="least_squares" or refit="omp", which need no labels'
                    )
                features.append(batch.features.T.float() if batch.features.dtype.itemsize < 4 else batch.features.T)
                labels.append(batch.labels)
        self._set(torch.cat(features, 1), torch.cat(labels), head_pass.head.num_classes, l2, seed)

    @classmethod
    def of(
        cls, features: Tensor, labels: Tensor, num_classes: int, l2: float | None = None, seed: int = 0
    ) -> "LogisticRefitter":
        """From features ``(N, K)`` and labels ``(N,)`` that are at hand."""
        refitter = cls.__new__(cls)
        refitter._set(features.T.clone(), labels, num_classes, l2, seed)
        return refitter

    def _set(self, table: Tensor, labels: Tensor, num_classes: int, l2: float | None, seed: int) -> None:
        self.num_features, count = table.shape
        self._classes, self._l2 = num_classes, l2
        check_classes(labels.bincount(minlength=num_classes))
        self._mean = table.mean(1, dtype=torch.float64)
        table -= self._mean.to(table.dtype)[:, None]
        variance = torch.stack([row.double().square().mean() for row in table])
        usable = variance > 1e-12 * (variance + self._mean.square())
        self._scale = variance.sqrt().where(usable, 1.0)
        table *= (usable / self._scale).to(table.dtype)[:, None]
        held = torch.rand(count, generator=torch.Generator().manual_seed(seed)).to(table.device) < _HELD_OUT
        self._fitted_on = self._blocks(table, labels, ~held)
        self._judged_by = self._blocks(table, labels, held)

    def _blocks(self, table: Tensor, labels: Tensor, rows: Tensor) -> list[_Block]:
        size = max(1, _CELLS // self._classes)
        return [
            _Block(table[:, part].contiguous(), labels[part]) for part in torch.split(rows.nonzero().flatten(), size)
        ]

    def fit(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights ``(C, k)``, biases ``(C,)`` and ridges, all 0, on the features ``(C, k)``."""
        indices = indices.to(self._mean.device)
        weight, bias, _ = self.fit_with(indices)
        weight = weight / self._scale[indices]
        return weight, bias - (weight * self._mean[indices]).sum(1), torch.zeros_like(bias)

    def fit_with(self, indices: Tensor) -> tuple[Tensor, Tensor, float]:
        """Weights and biases for features of unit variance, and the strength chosen."""
        state = self._start(indices.shape[1])
        strength, best = self._l2, torch.inf
        if strength is None:
            path = state
            for tried in STRENGTHS:
                path = _minimised(self._fitted_on, indices, path, tried, _SOME)
                loss = _mean_loss(self._judged_by, indices, *path)
                if not loss < best:
                    # convex along the path in practice: once weaker is worse, it stays so
                    break
                strength, best, state = tried, loss, path
        everything = self._fitted_on + self._judged_by
        weight, bias = _minimised(everything, indices, state, strength or STRENGTHS[0], _MANY)
        # softmax does not see what all biases share
        return weight, bias - bias.mean(), strength or STRENGTHS[0]

    def pursue(self, k: int) -> Tensor:
        """Features of forward selection, ``(C, k)`` in the order chosen: with each, the loss falls most steeply."""
        check_k(k, self.num_features, "k")
        chosen = torch.empty(self._classes, 0, dtype=torch.int64, device=self._mean.device)
        everything = self._fitted_on + self._judged_by
        weight, bias = _minimised(everything, chosen, self._start(0), _SELECTING, _SOME)
        for place in range(k):
            slope = _slopes(everything, chosen, weight, bias).abs().scatter(1, chosen, -1.0)
            chosen = torch.cat([chosen, slope.argmax(1, keepdim=True)], 1)
            if place < k - 1:
                start = (F.pad(weight, (0, 1)), bias)
                weight, bias = _minimised(everything, chosen, start, _SELECTING, _SOME)
        return chosen

    def _start(self, k: int) -> tuple[Tensor, Tensor]:
        device = self._mean.device
        zeros = torch.zeros(self._classes, k, dtype=torch.float64, device=device)
        return zeros, torch.zeros(self._classes, dtype=torch.float64, device=device)


def check_classes(counts: Tensor) -> None:
    """Refuse labels in which a class has no sample."""
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (f", ... ({len(missing)} in all)" if len(missing) > 10 else "")
        raise OptionError(
            f"no sample of class {shown} among the labels: a refit from labels cannot learn it; give images of all "
            'classes, or pass refit="least_squares", which needs no labels'
        )


def _logits(block: _Block, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``(C, n)``."""
    dtype = block.table.dtype
    if indices.shape[1] == 0:
        return bias.to(dtype)[:, None].expand(-1, len(block.labels))
    sums = F.embedding_bag(indices, block.table, per_sample_weights=weight.to(dtype), mode="sum")
    return sums + bias.to(dtype)[:, None]


def _loss(block: _Block, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum of the samples' cross-entropies."""
    chances = F.log_softmax(_logits(block, indices, weight, bias), 0)
    return -chances.gather(0, block.labels[None]).sum(dtype=torch.float64)


def _mean_loss(blocks: Sequence[_Block], indices: Tensor, weight: Tensor, bias: Tensor) -> float:
    count = max(1, sum(len(block.labels) for block in blocks))
    return sum(float(_loss(block, indices, weight, bias)) for block in blocks) / count


def _minimised(
    blocks: Sequence[_Block], indices: Tensor, start: tuple[Tensor, Tensor], l2: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Weights and biases of least mean cross-entropy and penalty, by L-BFGS."""
    weight, bias = (part.clone().requires_grad_() for part in start)
    count = sum(len(block.labels) for block in blocks)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, max_eval=2 * steps, tolerance_grad=1e-7, tolerance_change=1e-10,
        history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = l2 / 2 * weight.square().sum()
        torch.autograd.backward(penalty)
        value = penalty.detach()
        for block in blocks:
            loss = _loss(block, indices, weight, bias) / count
            torch.autograd.backward(loss)
            value = value + loss.detach()
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _slopes(blocks: Sequence[_Block], indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """How the loss falls with a first weight on each standardised feature, ``(C, K)``."""
    total: Tensor | None = None
    for block in blocks:
        chances = _logits(block, indices, weight, bias).softmax(0)
        chances[block.labels, torch.arange(len(block.labels), device=chances.device)] -= 1
        part = (chances @ block.table.T).double()
        total = part if total is None else total + part
    if total is None:
        raise ShapeError("no sample")
    return total
