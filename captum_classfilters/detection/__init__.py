"""Adversarial images, detected by their calculation paths."""

from captum_classfilters.detection.adaptive import AdaptivePGD, PathMatching, distil
from captum_classfilters.detection.detectors import PathDetector, PathOutlierDetector
from captum_classfilters.detection.features import ClassProfiles
from captum_classfilters.detection.pairs import PathPairs, adversarial_paths

__all__ = [
    "AdaptivePGD",
    "ClassProfiles",
    "PathDetector",
    "PathMatching",
    "PathOutlierDetector",
    "PathPairs",
    "adversarial_paths",
    "distil",
]
