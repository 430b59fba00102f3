"""The running sums behind `InfluentialFeatures`: one ``C x K`` table for each selector and k1.

State does not grow with the number of samples. `selectors.py` says what a sample adds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_classfilters.class_filters import ClassFilters, check_k, to_grid
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.head import Head
from captum_classfilters.influential import selectors
from captum_classfilters.influential.selectors import Sample, importance_of

K1 = int | float


class _State(NamedTuple):
    counts: Tensor  # (C,)
    mass: Tensor  # (C, K)
    sums: dict[tuple[str, K1], Tensor]  # (C, K) each


class Tables:
    """Sums over samples, for all selectors and every k1 at once.

    Args:
        head: The classifier head; gives C, K, weights and device.
        names: Selectors.
        k1s: For the selectors that vote; None stands for ``round(sqrt(K))``.
        importance: ``"abs"`` or ``"signed"``.
        seed: Of the random selector.
    """

    def __init__(self, head: Head, names: Sequence[str], k1s: Sequence[K1 | None], importance: str, seed: int) -> None:
        self.head, self.names, self.importance, self.seed = head, tuple(names), importance, seed
        features = head.num_features
        self.k1s: list[K1] = [round(features**0.5) if k1 is None else k1 for k1 in k1s]
        for k1 in self.k1s:
            if isinstance(k1, int):
                check_k(k1, features, "k1")
        self._weight = head.weight
        counts = self._weight.new_zeros(head.num_classes, dtype=torch.int64)
        summed = [key for key in self._keys() if key[0] not in selectors.STATIC]
        self._state = _State(counts, self._zeros(), {key: self._zeros() for key in summed})

    def add(self, features: Tensor, logits: Tensor, classes: Tensor) -> None:
        """Take a batch in: features ``(N, K)``, logits ``(N, C)``, the class of each sample ``(N,)``."""
        rows = self._rows(Sample(features, logits, classes, self._weight))
        counts, mass, sums = self._state
        # one assignment: whatever interrupts this, the state is that of whole batches
        self._state = _State(
            counts.index_add(0, classes, torch.ones_like(classes)),
            mass.index_add(0, classes, to_grid(features.abs())),
            {key: table.index_add(0, classes, rows[key]) for key, table in sums.items()},
        )

    def _rows(self, sample: Sample) -> dict[tuple[str, K1], Tensor]:
        """What each sample adds, ``(N, K)``, to each table."""
        importance = importance_of(sample.features, self.importance)
        rows: dict[tuple[str, K1], Tensor] = {
            (name, 0): to_grid(of(sample)) for name, of in selectors.PER_SAMPLE.items() if name in self.names
        }
        if "mean_activation" in self.names:
            rows["mean_activation", 0] = to_grid(importance)
        if any(name in selectors.VOTING for name in self.names):
            for k1, votes in zip(self.k1s, selectors.votes(importance, self.k1s), strict=True):
                rows |= {(name, k1): votes.double() for name in selectors.VOTING}
        return rows

    def filters(self, class_names: tuple[str, ...], meta: dict[str, Any]) -> dict[tuple[str, K1], ClassFilters]:
        """The tables so far, on the CPU."""
        return {
            (name, k1): ClassFilters(
                scores=self._scores(name, k1).cpu(),
                mass=self._state.mass.cpu().clone(),
                counts=self._state.counts.cpu().clone(),
                method=name,
                layer=self.head.name,
                class_names=class_names,
                meta={
                    **meta,
                    **({"k1": k1} if name in selectors.VOTING else {}),
                    **({"seed": self.seed} if name == "random" else {}),
                    "importance": self.importance,
                    "merge": "same" if name in selectors.STATIC else "sum",
                },
            )
            for name, k1 in self._keys()
        }

    def _keys(self) -> list[tuple[str, K1]]:
        return [(name, k1) for name in self.names for k1 in (self.k1s if name in selectors.VOTING else [0])]

    def _scores(self, name: str, k1: K1) -> Tensor:
        if name == "weight":
            return importance_of(self._weight, self.importance).double()
        if name == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(self._weight.shape, generator=generator, dtype=torch.float64)
        sums = self._state.sums[name, k1]
        if name == "weight_and_activation":
            # a share of the l1 mass is another number in every sample; weights have none
            k = k1 if isinstance(k1, int) else round(self.head.num_features**0.5)
            return sums * selectors.heaviest(self._weight, k, self.importance)
        return sums.clone()

    def _zeros(self) -> Tensor:
        return torch.zeros_like(self._weight, dtype=torch.float64)


def check_options(names: Sequence[str], k1s: Sequence[Any], importance: str, label_source: str) -> None:
    """Refuse what can be known to be wrong before any work starts."""
    for name in names:
        if name not in selectors.SELECTORS:
            raise OptionError(f"selector must be one of {list(selectors.SELECTORS)}, got {name!r}")
    if importance not in ("abs", "signed"):
        raise OptionError(f'importance must be "abs" or "signed", got {importance!r}')
    if label_source not in ("target", "prediction"):
        raise OptionError(f'label_source must be "target" or "prediction", got {label_source!r}')
    votes = any(name in selectors.VOTING for name in names)
    for k1 in k1s:
        if k1 is not None and not votes:
            raise OptionError(
                f"k1 belongs to the selectors {list(selectors.VOTING)}, not to {list(names)}; leave it out"
            )
        whole = isinstance(k1, int) and not isinstance(k1, bool) and k1 >= 1
        if not (k1 is None or whole or (isinstance(k1, float) and 0 < k1 < 1)):
            raise OptionError(
                f"k1 must be an integer of at least 1, or a share between 0 and 1 of each sample's l1 mass; got {k1!r}"
            )
