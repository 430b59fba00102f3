"""How much does a channel's activation say about the class of an image? N samples, C classes, K channels."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from sklearn.feature_selection import mutual_info_classif
from torch import nn

from captum_classfilters.class_filters import names_of
from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head_pass import HeadPass

_REPLICATES = 1000


def mutual_information(
    model: Any,
    loader: Iterable[Any] | None = None,
    *,
    max_samples: int | None = None,
    n_neighbors: int = 3,
    layer: nn.Module | str | None = None,
    draws: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Mutual information score: the information of a channel about one class, maximum over classes, mean over channels.

    Source: Liang et al. 2020, "Training interpretable convolutional neural networks by differentiating class-specific
    filters" (ECCV): the mean over channels k of the maximum over classes c of ``MI(a_k; 1[y = c])``, with the estimator
    of Ross 2014 (k nearest neighbours, scikit-learn's), in nats. Differs: a control and an interval. The largest of C
    estimates exceeds 0 by chance alone; the control says by how much. All features are kept: N x K float32 numbers.

    Args:
        model: The network; borrowed. Or a `HeadPass`, which may name the classes; then ``loader`` and ``layer`` are
            left out.
        loader: Batches ``(inputs, labels)``.
        max_samples: Keep a random sample of this size, which bounds time and memory; None: all.
        n_neighbors: Neighbours that the estimator looks at.
        layer: The head, if it cannot be found.
        draws: Permutations of the labels for the control, at least 1; each takes as long as the score itself. This is
            no `Control`: the interval is over channels, not over draws, so one draw is enough.
        seed: Seed of all random draws.

    Returns:
        One row for ``"all"`` channels and one for each channel: ``channel``, ``control``, ``class_name`` (of the
        maximum), ``mi`` (in the row ``"all"``: the score); ``low``, ``high``: central 95 % of 1,000 bootstrap means
        over channels, NaN for single channels; ``samples``. The control rows follow: labels are permuted, values are
        means over draws, and single channels have no class. Classes without samples are left out.

    Raises:
        OptionError: An option is out of range, or fewer than two classes have samples.
    """
    n_neighbors, draws = integer(n_neighbors, "n_neighbors", 1), integer(draws, "draws", 1)
    if max_samples is not None:
        max_samples = integer(max_samples, "max_samples", 2)
    head_pass = HeadPass.of(model, loader, layer)
    sample = _Sample(max_samples, seed)
    with head_pass.batches(description="mutual_information") as stream:
        for batch in stream:
            names = names_of(head_pass.class_names, batch.head.num_classes, head_pass.loader, head_pass.model)
            sample.add(batch.features.float().cpu().numpy(), batch.labels.cpu().numpy())  # type: ignore[union-attr]
    features, labels = sample.features, sample.labels
    present = np.unique(labels)
    if len(present) < 2:
        raise OptionError(
            f"expected samples of at least two classes, got samples of {len(present)}; pass a loader with more classes"
        )
    options = {"n_neighbors": n_neighbors, "seed": seed}
    table = class_information(features, labels, present, **options)
    generator = np.random.default_rng([seed, 1])
    permuted = [generator.permutation(labels) for _ in range(draws)]
    chance = np.mean([class_information(features, other, present, **options).max(0) for other in permuted], axis=0)
    channels = table.shape[1]
    resampled = generator.integers(channels, size=(_REPLICATES, channels))
    best = np.array(names)[present[table.argmax(0)]]
    frames = []
    for control, values, classes in ((False, table.max(0), best), (True, chance, [None] * channels)):
        low, high = np.quantile(values[resampled].mean(1), [0.025, 0.975])
        columns = {"channel": ["all", *range(channels)], "control": control, "class_name": ["all", *classes]}
        columns |= {"mi": [values.mean(), *values]}
        columns |= {name: [bound, *[np.nan] * channels] for name, bound in (("low", low), ("high", high))}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True).assign(samples=len(labels))


def class_information(features: Any, labels: Any, classes: Any, *, n_neighbors: int = 3, seed: int = 0) -> Any:
    """Estimates of ``MI(a_k; 1[y = c])`` in nats.

    Args:
        features: ``(N, K)``.
        labels: ``(N,)``.
        classes: The classes c.
        n_neighbors: Neighbours that the estimator looks at.
        seed: Seed of the noise that makes equal values different.

    Returns:
        ``(len(classes), K)``, not below 0.
    """
    return np.stack(
        [
            mutual_info_classif(
                features, labels == c, discrete_features=False, n_neighbors=n_neighbors, random_state=seed
            )
            for c in classes
        ]
    )


class _Sample:
    """Features and labels of a random sample in the loader's order. It does not depend on the batch size."""

    def __init__(self, size: int | None, seed: int) -> None:
        self._size = size
        self._generator = np.random.default_rng(seed)
        self._parts: list[tuple[Any, Any, Any]] = []
        self._kept = 0

    def add(self, features: Any, labels: Any) -> None:
        # every sample draws a number, and the samples with the smallest numbers stay
        self._parts.append((features, labels, self._generator.random(len(labels))))
        self._kept += len(labels)
        # not at every batch, because shrinking copies all that is kept
        if self._size is not None and self._kept > 2 * self._size:
            self._shrink()

    def _shrink(self) -> None:
        features, labels, keys = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        if self._size is not None and len(keys) > self._size:
            chosen = np.sort(np.argpartition(keys, self._size - 1)[: self._size])
            features, labels, keys = features[chosen], labels[chosen], keys[chosen]
        self._parts, self._kept = [(features, labels, keys)], len(keys)

    @property
    def features(self) -> Any:
        self._shrink()
        return self._parts[0][0]

    @property
    def labels(self) -> Any:
        self._shrink()
        return self._parts[0][1]
