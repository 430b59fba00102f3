"""Training that makes channels class-specific: a gate that knows the label stands before the head in some epochs."""

from captum_classfilters.gating.ambiguity import FilterAmbiguity, filter_ambiguity
from captum_classfilters.gating.gate import LabelSensitiveGate, density_penalty, gated, project
from captum_classfilters.gating.training import LabelSensitiveTraining

__all__ = [
    "FilterAmbiguity",
    "LabelSensitiveGate",
    "LabelSensitiveTraining",
    "density_penalty",
    "filter_ambiguity",
    "gated",
    "project",
]
