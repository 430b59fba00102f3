"""What a table of class filters is worth: any `ClassFilters`, a model and a loader in, a pandas DataFrame out.

Every table has its random control and its interval.
"""

from captum_classfilters.concepts import (
    Occlusion,
    activation_thresholds,
    collate_concepts,
    concept_representation,
    concept_scores,
    field_iou,
    layer_scores,
    occlude,
    occlusion,
    receptive_fields,
)
from captum_classfilters.decoupling.path_measures import path_accuracy, path_information
from captum_classfilters.gating.measures import density, feature_clusters, gate_leakage, gate_similarity
from captum_classfilters.metrics.accuracy import accuracy_curve
from captum_classfilters.metrics.confusion import Confusion, explain_confusion
from captum_classfilters.metrics.correlation import correlated_share, filter_correlation, inter_class_correlation
from captum_classfilters.metrics.information import mutual_information
from captum_classfilters.metrics.intervals import mean_interval, wilson
from captum_classfilters.metrics.interventions import channel_deletion, class_ablation, class_masking, masked_confusion
from captum_classfilters.metrics.localisation import foreground, localisation
from captum_classfilters.metrics.robustness import attack_success
from captum_classfilters.metrics.sets import overlap, stability
from captum_classfilters.splitting.evidence import ald_evidence, pruning_curve

__all__ = [
    "Confusion",
    "Occlusion",
    "accuracy_curve",
    "activation_thresholds",
    "ald_evidence",
    "attack_success",
    "channel_deletion",
    "class_ablation",
    "class_masking",
    "collate_concepts",
    "concept_representation",
    "concept_scores",
    "correlated_share",
    "density",
    "explain_confusion",
    "feature_clusters",
    "field_iou",
    "filter_correlation",
    "foreground",
    "gate_leakage",
    "gate_similarity",
    "inter_class_correlation",
    "layer_scores",
    "localisation",
    "masked_confusion",
    "mean_interval",
    "mutual_information",
    "occlude",
    "occlusion",
    "overlap",
    "path_accuracy",
    "path_information",
    "pruning_curve",
    "receptive_fields",
    "stability",
    "wilson",
]
