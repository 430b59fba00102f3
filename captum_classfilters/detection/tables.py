"""What a detector looks at: `Paths` read as a table of numbers, or a table as it comes.

N paths, K channels in all, L layers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from captum_classfilters.core.errors import OptionError
from captum_classfilters.decoupling import Paths
from captum_classfilters.detection.profiles import Array, ClassProfiles, check_same

FEATURES = ("bits", "logits", "profiles")


def as_array(X: Any) -> Any:  # noqa: N803
    """Tensors as arrays, bits for `Paths`; anything else is scikit-learn's to judge."""
    if isinstance(X, Tensor):
        return X.detach().cpu().numpy()
    return np.asarray(X) if isinstance(X, Paths) else X


class PathTable:
    """Reads chosen features off `Paths` of one network.

    Args:
        features: One of ``"bits"`` (K), ``"logits"`` (K) and ``"profiles"`` (L + 2), or several.
        paths: Of the network.
        profiles: What ``"profiles"`` are measured from.

    Raises:
        OptionError: Unknown features, or profiles without ``profiles``.
        MergeError: ``profiles`` of another network.
    """

    def __init__(self, features: str | Sequence[str], paths: Paths, profiles: ClassProfiles | None) -> None:
        self.features = check_features(features)
        self.fingerprint, self.layers, self.profiles = paths.fingerprint, paths.layers, profiles
        if "profiles" in self.features and not isinstance(profiles, ClassProfiles):
            raise OptionError(
                'features="profiles" need the profiles of clean images, best of many others than these: pass '
                f"profiles=ClassProfiles(decoupler.paths(loader)), got {profiles!r}"
            )
        if isinstance(profiles, ClassProfiles):
            check_same(paths, profiles)

    def read(self, paths: Paths) -> Array:
        """The table, ``(N, features)``.

        Raises:
            MergeError: Paths of another network.
            OptionError: Without logits, if those are asked for.
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
            raise OptionError('features="logits" need the gates\' logits; collect paths with logits=True')
        return paths.logits.numpy()


def check_features(features: str | Sequence[str]) -> tuple[str, ...]:
    """Names as a tuple, all of them known."""
    names = (features,) if isinstance(features, str) else tuple(features)
    if not names or any(name not in FEATURES for name in names):
        raise OptionError(f"features must be one of {list(FEATURES)}, or several of them, got {features!r}")
    return names
