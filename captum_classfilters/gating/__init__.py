"""Training that makes channels class-specific: a gate that knows the label stands before the head in some epochs."""

from captum_classfilters.gating.ambiguity import FilterAmbiguity as FilterAmbiguity
from captum_classfilters.gating.ambiguity import filter_ambiguity
from captum_classfilters.gating.gate import GatePenalty, LabelSensitiveGate
from captum_classfilters.gating.label_sensitive import GateSchedule, LabelSensitiveTraining

__all__ = [
    "GatePenalty",
    "GateSchedule",
    "LabelSensitiveGate",
    "LabelSensitiveTraining",
    "filter_ambiguity",
]
