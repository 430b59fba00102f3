"""What a table of class filters is worth: any `ClassFilters`, a model and a loader in, a pandas DataFrame out.

Every table has its random control and its interval.
"""

from captum_classfilters.metrics.ablation import class_ablation
from captum_classfilters.metrics.accuracy import accuracy_curve
from captum_classfilters.metrics.correlation import correlated_share, filter_correlation, inter_class_correlation
from captum_classfilters.metrics.gates import density, feature_clusters, gate_similarity
from captum_classfilters.metrics.information import mutual_information
from captum_classfilters.metrics.intervals import mean_interval, wilson
from captum_classfilters.metrics.leakage import gate_leakage
from captum_classfilters.metrics.localisation import foreground, localisation
from captum_classfilters.metrics.masking import class_masking, masked_confusion
from captum_classfilters.metrics.robustness import attack_success
from captum_classfilters.metrics.sets import overlap, stability

__all__ = [
    "accuracy_curve",
    "attack_success",
    "class_ablation",
    "class_masking",
    "correlated_share",
    "density",
    "feature_clusters",
    "filter_correlation",
    "foreground",
    "gate_leakage",
    "gate_similarity",
    "inter_class_correlation",
    "localisation",
    "masked_confusion",
    "mean_interval",
    "mutual_information",
    "overlap",
    "stability",
    "wilson",
]
