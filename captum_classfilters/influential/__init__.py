"""Influential features: which few channels decide each class (Badola et al. 2022, "Decomposing the Deep")."""

from captum_classfilters.influential.influential_features import InfluentialFeatures
from captum_classfilters.influential.selectors import SELECTORS

__all__ = ["SELECTORS", "InfluentialFeatures"]
