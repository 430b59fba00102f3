"""How much does a channel's activation tell about whether an image is of a class? N samples, C classes, K channels."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
from sklearn.feature_selection import mutual_info_classif
from torch import nn

from captum_classfilters.class_filters import names_of
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head_pass import batches

_REPLICATES = 1000


def mutual_information(
    model: Any,
    loader: Iterable[Any],
    *,
    max_samples: int | None = None,
    n_neighbors: int = 3,
    class_names: Sequence[str] | None = None,
    layer: nn.Module | str | None = None,
    draws: int = 1,
    seed: int = 0,
    show_progress: bool = False,
) -> pd.DataFrame:
    """Mutual information score: what the head's channels tell of the one class each tells most of.

    Source: Liang et al. 2020, "Training interpretable convolutional neural networks by differentiating class-specific
    filters" (ECCV): the mean over channels k of the maximum over classes c of ``MI(a_k; 1[y = c])``, with the estimator
    of Ross 2014 (k nearest neighbours, scikit-learn's), in nats. Differs: a control and an interval. The largest of C
    estimates lies above 0 by chance alone; the control says how far. All features are kept: N x K float32 numbers.

    Args:
        model: The network; borrowed.
        loader: Batches ``(inputs, labels)``.
        max_samples: Keep a random sample of so many, by which time and memory are bounded; None: all.
        n_neighbors: Of the estimator.
        class_names: C names; otherwise numbers.
        layer: The head, if it cannot be found.
        draws: Permutations of the labels for the control, at least 1; each takes as long as the score itself.
        seed: Of these, of the sample, of the estimator's noise that tells equal values apart, and of the bootstrap.
        show_progress: A tqdm bar.

    Returns:
        One row for all channels, ``"all"``, and one for each: ``channel``, ``class_name`` of the largest, ``mi`` (all:
        the score), ``random``: the same with labels permuted, mean over draws; for all ``low``, ``high``,
        ``random_low``, ``random_high``: central 95 % of 1,000 bootstrap means over channels, NaN for single channels;
        ``samples``. Classes without samples are left out.

    Raises:
        OptionError: An option out of range, or samples of fewer than two classes.
    """
    for name, value, least in (("n_neighbors", n_neighbors, 1), ("draws", draws, 1), ("max_samples", max_samples, 2)):
        fits = not isinstance(value, bool) and isinstance(value, Integral) and value >= least
        if not fits and not (name == "max_samples" and value is None):
            raise OptionError(f"{name} must be an integer of at least {least}, got {value!r}")
    sample = _Sample(max_samples, seed)
    with batches(model, loader, layer=layer, show_progress=show_progress, description="mutual_information") as stream:
        for batch in stream:
            names = names_of(class_names, batch.head.num_classes)
            sample.add(batch.features.float().cpu().numpy(), batch.labels.cpu().numpy())  # type: ignore[union-attr]
    features, labels = sample.features, sample.labels
    present = np.unique(labels)
    if len(present) < 2:
        raise OptionError(f"classes are told apart, but the loader has samples of {len(present)}; pass at least two")
    options = {"n_neighbors": n_neighbors, "seed": seed}
    table = class_information(features, labels, present, **options)
    generator = np.random.default_rng([seed, 1])
    permuted = [generator.permutation(labels) for _ in range(draws)]
    chance = np.mean([class_information(features, other, present, **options).max(0) for other in permuted], axis=0)
    channels = table.shape[1]
    again = generator.integers(channels, size=(_REPLICATES, channels))
    rows = {}
    for name, values in (("", table.max(0)), ("random_", chance)):
        low, high = np.quantile(values[again].mean(1), [0.025, 0.975])
        rows[name or "mi"] = [values.mean(), *values]
        rows[f"{name}low"], rows[f"{name}high"] = ([bound, *[np.nan] * channels] for bound in (low, high))
    return pd.DataFrame(
        {
            "channel": ["all", *range(channels)],
            "class_name": ["all", *np.array(names)[present[table.argmax(0)]]],
            "mi": rows["mi"],
            "low": rows["low"],
            "high": rows["high"],
            "random": rows["random_"],
            "random_low": rows["random_low"],
            "random_high": rows["random_high"],
            "samples": len(labels),
        }
    )


def class_information(features: Any, labels: Any, classes: Any, *, n_neighbors: int = 3, seed: int = 0) -> Any:
    """``MI(a_k; 1[y = c])`` in nats, estimated.

    Args:
        features: ``(N, K)``.
        labels: ``(N,)``.
        classes: Which c.
        n_neighbors: Of the estimator.
        seed: Of the noise that tells equal values apart.

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
    """Features and labels of a random sample, in the loader's order; the same for every batch size."""

    def __init__(self, size: int | None, seed: int) -> None:
        self._size = size
        self._generator = np.random.default_rng(seed)
        self._parts: list[tuple[Any, Any, Any]] = []
        self._kept = 0

    def add(self, features: Any, labels: Any) -> None:
        # every sample draws a number; those with the smallest stay
        self._parts.append((features, labels, self._generator.random(len(labels))))
        self._kept += len(labels)
        # not at every batch: what is dropped was copied first
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
