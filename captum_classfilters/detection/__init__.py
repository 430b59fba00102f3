"""Adversarial images, detected by their calculation paths."""

from captum_classfilters.detection.adaptive import AdaptivePGD, PathMatching, distil
from captum_classfilters.detection.conformal import false_positive_interval, p_values
from captum_classfilters.detection.detector import PathDetector
from captum_classfilters.detection.outlier import PathOutlierDetector
from captum_classfilters.detection.pairs import PathPairs, adversarial_paths, stack_pairs
from captum_classfilters.detection.profiles import ClassProfiles

__all__ = [
    "AdaptivePGD",
    "ClassProfiles",
    "PathDetector",
    "PathMatching",
    "PathOutlierDetector",
    "PathPairs",
    "adversarial_paths",
    "distil",
    "false_positive_interval",
    "p_values",
    "stack_pairs",
]
