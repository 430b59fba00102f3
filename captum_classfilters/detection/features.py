"""What a detector reads from paths: bits, gates' logits, and the distance of a path from those of its class.

N paths, C classes, L layers with K_l channels, K in all layers together.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from captum_classfilters.core.check import number, some_of
from captum_classfilters.core.errors import MergeError, OptionError
from captum_classfilters.decoupling import Paths

Array = np.ndarray[Any, Any]

FEATURES = ("bits", "logits", "profiles")


class ClassProfiles:
    """The share of clean images of each class that open each channel, and how unlikely a path is under these shares.

    If a share p of the class opens a channel, the channel counts ``-log p`` if it is open and ``-log(1 - p)`` if it is
    closed; a layer's distance is the mean over its channels. Shares are smoothed: ``smoothing`` images with the shares
    of all classes together are added to each class, so that no share is 0 or 1.

    The class of a path is the predicted one, which for an adversarial image is the wrong class.

    Args:
        paths: Paths of clean images, if possible of many.
        smoothing: Number of images that are added, above 0.

    Raises:
        OptionError: There are no paths, or ``smoothing`` is not above 0.
    """

    def __init__(self, paths: Paths, smoothing: float = 2.0) -> None:
        if not isinstance(paths, Paths) or not len(paths):
            got = "none" if isinstance(paths, Paths) else type(paths).__name__
            raise OptionError(f"expected Paths of clean images, got {got}; collect them with decoupler.paths(loader)")
        smoothing = number(smoothing, "smoothing", 0, open_ends=True)
        bits, classes = _numbers(paths)
        members = np.eye(paths.num_classes)[classes]
        self.sums, self.counts = members.T @ bits, members.sum(0)
        # never 0 or 1, because the logarithm of 0 is infinite
        self.everyone = (bits.sum(0) + 0.5) / (len(bits) + 1)
        self.smoothing = smoothing
        self.layers, self.channels, self.fingerprint = paths.layers, paths.channels, paths.fingerprint

    def __repr__(self) -> str:
        return f"ClassProfiles({int(self.counts.sum())} paths, {len(self.counts)} classes, {len(self.layers)} layers)"

    def distances(self, paths: Paths, *, among: bool = False) -> Array:
        """How far each path lies from those of its class, layer by layer: ``(N, L)``.

        Args:
            paths: Paths of the same network.
            among: Pass True if the profiles are made of these paths; then each path is judged by the others.

        Raises:
            MergeError: The paths belong to another network.
        """
        check_same(paths, self)
        bits, classes = _numbers(paths)
        distances = np.empty((len(bits), len(self.channels)))
        starts = np.cumsum([0, *self.channels[:-1]])
        for label in np.unique(classes):
            rows = bits[classes == label]
            shares = self._shares(label, rows) if among else self._shares(label)
            unlikely = -np.where(rows > 0.5, np.log(shares), np.log1p(-shares))
            distances[classes == label] = np.add.reduceat(unlikely, starts, axis=1) / np.asarray(self.channels)
        return distances

    def whole(self, distances: Array) -> Array:
        """Distances of layers, ``(N, L)``, as one over all channels, ``(N,)``."""
        return np.average(distances, axis=1, weights=self.channels)

    def features(self, paths: Paths) -> Array:
        """``(N, L + 2)``: `distances`, `whole`, and `whole` minus the same distance to the nearest other class."""
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
        """Smoothed share of the class's images that open each channel, ``(K,)``, or a row for each path left out."""
        sums, count = self.sums[label], self.counts[label]
        if without is not None:
            sums, count = sums - without, count - 1
        shares: Array = (sums + self.smoothing * self.everyone) / (count + self.smoothing)
        return shares


class PathTable:
    """Reads chosen features from `Paths` of one network.

    Args:
        features: One of ``"bits"`` (K), ``"logits"`` (K) and ``"profiles"`` (L + 2), or several.
        paths: Paths of the network.
        profiles: The profiles for ``"profiles"``.

    Raises:
        OptionError: A feature is unknown, or ``"profiles"`` is requested without ``profiles``.
        MergeError: ``profiles`` belong to another network.
    """

    def __init__(self, features: str | Sequence[str], paths: Paths, profiles: ClassProfiles | None) -> None:
        self.features = check_features(features)
        self.fingerprint, self.layers, self.profiles = paths.fingerprint, paths.layers, profiles
        if "profiles" in self.features and not isinstance(profiles, ClassProfiles):
            raise OptionError(
                'features="profiles" needs the profiles of clean images, best of many others than these; pass '
                f"profiles=ClassProfiles(decoupler.paths(loader)), got {profiles!r}"
            )
        if isinstance(profiles, ClassProfiles):
            check_same(paths, profiles)

    def read(self, paths: Paths) -> Array:
        """The table, ``(N, features)``.

        Raises:
            MergeError: The paths belong to another network.
            OptionError: Logits are requested, and the paths have none.
        """
        check_same(paths, self)
        return np.column_stack([self._read(name, paths) for name in self.features])

    def _read(self, name: str, paths: Paths) -> Array:
        if name == "bits":
            return np.asarray(paths)
        if name == "profiles":
            profiles: Any = self.profiles
            return np.asarray(profiles.features(paths))
        if paths.logits is None:
            raise OptionError('features="logits" needs the gates\' logits; collect paths with logits=True')
        return paths.logits.numpy()


def check_features(features: str | Sequence[str]) -> tuple[str, ...]:
    """Names of features as a tuple; refuse unknown ones."""
    return tuple(some_of(features, "features", FEATURES))


def as_array(X: Any) -> Any:  # noqa: N803
    """Tensors as arrays, `Paths` as their bits; scikit-learn judges anything else."""
    if isinstance(X, Tensor):
        return X.detach().cpu().numpy()
    return np.asarray(X) if isinstance(X, Paths) else X


def check_same(paths: Paths, fitted: Any) -> None:
    """Refuse paths of another network than that of ``fitted``, which has ``layers`` and ``fingerprint``."""
    if paths.layers != fitted.layers:
        raise MergeError("these paths are of other layers than those the detector was fitted on; fit it anew")
    if paths.fingerprint != fitted.fingerprint:
        raise MergeError(
            f"these paths are of another network than those the detector was fitted on (fingerprints "
            f"{paths.fingerprint} and {fitted.fingerprint}); collect them with the same decoupler, or fit it anew"
        )


def _numbers(paths: Paths) -> tuple[Array, Array]:
    return np.asarray(paths, dtype=float), paths.predictions.numpy()
