"""What a table of class filters is worth: any `ClassFilters`, a model and a loader in, a pandas DataFrame out.

Every table has its random control and its interval.
"""

# these live in `concepts`; `metrics.concept_scores` and so on keep working
from captum_classfilters.concepts import Occlusion as Occlusion
from captum_classfilters.concepts import activation_thresholds as activation_thresholds
from captum_classfilters.concepts import collate_concepts as collate_concepts
from captum_classfilters.concepts import concept_representation as concept_representation
from captum_classfilters.concepts import concept_scores as concept_scores
from captum_classfilters.concepts import field_iou as field_iou
from captum_classfilters.concepts import layer_scores as layer_scores
from captum_classfilters.concepts import occlude as occlude
from captum_classfilters.concepts import occlusion as occlusion
from captum_classfilters.concepts import receptive_fields as receptive_fields
from captum_classfilters.core.intervals import mean_interval as mean_interval
from captum_classfilters.core.intervals import wilson as wilson
from captum_classfilters.decoupling.path_measures import path_accuracy, path_information
from captum_classfilters.gating.measures import density, feature_clusters, gate_leakage, gate_similarity
from captum_classfilters.metrics.accuracy import accuracy_curve
from captum_classfilters.metrics.confusion import Confusion as Confusion
from captum_classfilters.metrics.confusion import explain_confusion
from captum_classfilters.metrics.correlation import correlated_share, filter_correlation, inter_class_correlation
from captum_classfilters.metrics.information import mutual_information
from captum_classfilters.metrics.interventions import channel_deletion, class_ablation, class_masking, masked_confusion
from captum_classfilters.metrics.localisation import foreground, localisation
from captum_classfilters.metrics.robustness import attack_success
from captum_classfilters.metrics.sets import overlap, stability
from captum_classfilters.splitting.evidence import ald_evidence, pruning_curve

__all__ = [
    "accuracy_curve",
    "ald_evidence",
    "attack_success",
    "channel_deletion",
    "class_ablation",
    "class_masking",
    "correlated_share",
    "density",
    "explain_confusion",
    "feature_clusters",
    "filter_correlation",
    "foreground",
    "gate_leakage",
    "gate_similarity",
    "inter_class_correlation",
    "localisation",
    "masked_confusion",
    "mutual_information",
    "overlap",
    "path_accuracy",
    "path_information",
    "pruning_curve",
    "stability",
]
