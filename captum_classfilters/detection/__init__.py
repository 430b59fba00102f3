"""Alarms: images unlike the training images, and adversarial images by their calculation paths."""

from captum_classfilters.detection.adaptive import AdaptivePGD, PathMatching, distil
from captum_classfilters.detection.alarms import Alarm, explain_alarm
from captum_classfilters.detection.detectors import PathDetector, PathOutlierDetector
from captum_classfilters.detection.familiarity import FamiliarityDetector
from captum_classfilters.detection.features import ClassProfiles
from captum_classfilters.detection.pairs import PathPairs, adversarial_paths

__all__ = [
    "AdaptivePGD",
    "Alarm",
    "ClassProfiles",
    "FamiliarityDetector",
    "PathDetector",
    "PathMatching",
    "PathOutlierDetector",
    "PathPairs",
    "adversarial_paths",
    "distil",
    "explain_alarm",
]
