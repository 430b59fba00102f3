"""How far a path lies from those of the images that the network says the same of.

N paths, C classes, L layers with K_l channels, K in all.
"""

from typing import Any

import numpy as np

from captum_classfilters.core.errors import MergeError, OptionError
from captum_classfilters.decoupling import Paths

Array = np.ndarray[Any, Any]


class ClassProfiles:
    """The share of clean images of each class that open each channel; how unlikely a path is under them.

    A channel that a share p of the class opens is worth ``-log p`` where it is open and ``-log(1 - p)`` where it is
    closed; a layer's distance is the mean over its channels. Shares are drawn towards those of all classes together, as
    if ``smoothing`` images more had been seen: a class of one image is not the measure of all things.

    The class of a path is what the network says: an adversarial path takes after the wrong one.

    Args:
        paths: Of clean images, best of many.
        smoothing: Images that are added, above 0.

    Raises:
        OptionError: No paths, or ``smoothing`` is not above 0.
    """

    def __init__(self, paths: Paths, smoothing: float = 2.0) -> None:
        if not isinstance(paths, Paths) or not len(paths):
            got = "none" if isinstance(paths, Paths) else type(paths).__name__
            raise OptionError(f"expected Paths of clean images, got {got}")
        if not smoothing > 0:
            raise OptionError(f"smoothing must be above 0, got {smoothing!r}")
        bits, classes = _numbers(paths)
        members = np.eye(paths.num_classes)[classes]
        self.sums, self.counts = members.T @ bits, members.sum(0)
        # never 0 or 1, whose logarithm has no end
        self.everyone = (bits.sum(0) + 0.5) / (len(bits) + 1)
        self.smoothing = smoothing
        self.layers, self.channels, self.fingerprint = paths.layers, paths.channels, paths.fingerprint

    def __repr__(self) -> str:
        return f"ClassProfiles({int(self.counts.sum())} paths, {len(self.counts)} classes, {len(self.layers)} layers)"

    def distances(self, paths: Paths, *, among: bool = False) -> Array:
        """Of each path to its class, layer by layer: ``(N, L)``.

        Args:
            paths: Of the same network.
            among: The profiles are made of these very paths: each is judged by the others.

        Raises:
            MergeError: Of another network.
        """
        check_same(paths, self)
        bits, classes = _numbers(paths)
        found = np.empty((len(bits), len(self.channels)))
        starts = np.cumsum([0, *self.channels[:-1]])
        for label in np.unique(classes):
            rows = bits[classes == label]
            shares = self._shares(label, rows) if among else self._shares(label)
            unlikely = -np.where(rows > 0.5, np.log(shares), np.log1p(-shares))
            found[classes == label] = np.add.reduceat(unlikely, starts, axis=1) / np.asarray(self.channels)
        return found

    def whole(self, distances: Array) -> Array:
        """Those of layers, ``(N, L)``, as one over all channels, ``(N,)``."""
        return np.average(distances, axis=1, weights=self.channels)

    def features(self, paths: Paths) -> Array:
        """``(N, L + 2)``: `distances`, the `whole`, and how much less that is to the nearest other class."""
        distances = self.distances(paths)
        whole = self.whole(distances)
        return np.column_stack([distances, whole, whole - self._nearest_other(paths)])

    def _nearest_other(self, paths: Paths) -> Array:
        bits, classes = _numbers(paths)
        shares = np.stack([self._shares(label) for label in range(len(self.counts))])
        # -z log p - (1 - z) log(1 - p) is linear in z
        distances = (bits @ np.log((1 - shares) / shares).T - np.log1p(-shares).sum(1)) / bits.shape[1]
        distances[np.arange(len(bits)), classes] = np.inf
        nearest: Array = distances.min(1)
        return nearest

    def _shares(self, label: int, without: Any = None) -> Array:
        """Share of the class's images that open each channel, smoothed: ``(K,)``, or a row for each one left out."""
        sums, count = self.sums[label], self.counts[label]
        if without is not None:
            sums, count = sums - without, count - 1
        shares: Array = (sums + self.smoothing * self.everyone) / (count + self.smoothing)
        return shares


def check_same(paths: Paths, known: Any) -> None:
    """Refuse paths of another network than ``known``, which has ``layers`` and ``fingerprint``."""
    if paths.layers != known.layers:
        raise MergeError("these paths are of other layers than those the detector was fitted on; fit it anew")
    if paths.fingerprint != known.fingerprint:
        raise MergeError(
            f"these paths are of another network than those the detector was fitted on (fingerprints "
            f"{paths.fingerprint} and {known.fingerprint}); collect them with the same decoupler, or fit it anew"
        )


def _numbers(paths: Paths) -> tuple[Array, Array]:
    return np.asarray(paths, dtype=float), paths.predictions.numpy()
