"""What do single filters stand for? Where they respond, whether a concept is there, and what covering it changes.

`fields.py` reads and enlarges maps, `scores.py` compares them with masks of concepts, `occlusion.py` covers concepts.
"""

from captum_classfilters.concepts.fields import activation_thresholds, field_iou, receptive_fields
from captum_classfilters.concepts.occlusion import Occlusion as Occlusion
from captum_classfilters.concepts.occlusion import concept_representation, occlude, occlusion
from captum_classfilters.concepts.scores import collate_concepts, concept_scores, layer_scores

__all__ = [
    "activation_thresholds",
    "collate_concepts",
    "concept_representation",
    "concept_scores",
    "field_iou",
    "layer_scores",
    "occlude",
    "occlusion",
    "receptive_fields",
]
