"""Which channels of a network work for which class? A plugin for Captum.

    from captum_classfilters import InfluentialFeatures
    filters = InfluentialFeatures(model).attribute(loader)

Rooms that need Captum, pandas or matplotlib load when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captum_classfilters._version import __version__

if TYPE_CHECKING:
    from captum_classfilters.cam import LayerGradCamPlusPlus as LayerGradCamPlusPlus
    from captum_classfilters.cam import LayerSmoothGradCamPlusPlus as LayerSmoothGradCamPlusPlus
    from captum_classfilters.class_filters import ClassFilters as ClassFilters
    from captum_classfilters.comparison import aggregate as aggregate
    from captum_classfilters.comparison import compare as compare
    from captum_classfilters.core.batches import Batches as Batches
    from captum_classfilters.core.control import Control as Control
    from captum_classfilters.core.errors import ClassFiltersError as ClassFiltersError
    from captum_classfilters.core.errors import SingularMomentsWarning as SingularMomentsWarning
    from captum_classfilters.core.errors import UnseenClassWarning as UnseenClassWarning
    from captum_classfilters.core.head import AuxiliaryHead as AuxiliaryHead
    from captum_classfilters.core.head_pass import HeadPass as HeadPass
    from captum_classfilters.core.outputs import WithOutput as WithOutput
    from captum_classfilters.core.training import Checkpoint as Checkpoint
    from captum_classfilters.decoupling import PathAttribution as PathAttribution
    from captum_classfilters.decoupling import PathDecoupler as PathDecoupler
    from captum_classfilters.decoupling import Paths as Paths
    from captum_classfilters.detection import FamiliarityDetector as FamiliarityDetector
    from captum_classfilters.detection import PathDetector as PathDetector
    from captum_classfilters.detection import PathOutlierDetector as PathOutlierDetector
    from captum_classfilters.detection import PathPairs as PathPairs
    from captum_classfilters.detection import adversarial_paths as adversarial_paths
    from captum_classfilters.detection import explain_alarm as explain_alarm
    from captum_classfilters.gating import FilterAmbiguity as FilterAmbiguity
    from captum_classfilters.gating import GatePenalty as GatePenalty
    from captum_classfilters.gating import GateSchedule as GateSchedule
    from captum_classfilters.gating import LabelSensitiveGate as LabelSensitiveGate
    from captum_classfilters.gating import LabelSensitiveTraining as LabelSensitiveTraining
    from captum_classfilters.gating import filter_ambiguity as filter_ambiguity
    from captum_classfilters.heads import DecomposedLinear as DecomposedLinear
    from captum_classfilters.heads import HeadMoments as HeadMoments
    from captum_classfilters.heads import RefitOptions as RefitOptions
    from captum_classfilters.heads import decompose as decompose
    from captum_classfilters.heads import recover as recover
    from captum_classfilters.influential import InfluentialFeatures as InfluentialFeatures
    from captum_classfilters.metrics import explain_confusion as explain_confusion
    from captum_classfilters.report import Report as Report
    from captum_classfilters.report import ReportOptions as ReportOptions
    from captum_classfilters.report import report as report
    from captum_classfilters.splitting import ALDSplitter as ALDSplitter
    from captum_classfilters.splitting import ALDTree as ALDTree

_HOMES = {
    "ALDSplitter": "splitting",
    "ALDTree": "splitting",
    "AuxiliaryHead": "core.head",
    "Batches": "core.batches",
    "Checkpoint": "core.training",
    "ClassFilters": "class_filters",
    "ClassFiltersError": "core.errors",
    "SingularMomentsWarning": "core.errors",
    "UnseenClassWarning": "core.errors",
    "Control": "core.control",
    "DecomposedLinear": "heads",
    "HeadMoments": "heads",
    "RefitOptions": "heads",
    "HeadPass": "core.head_pass",
    "FamiliarityDetector": "detection",
    "FilterAmbiguity": "gating",
    "GatePenalty": "gating",
    "GateSchedule": "gating",
    "InfluentialFeatures": "influential",
    "LabelSensitiveGate": "gating",
    "LabelSensitiveTraining": "gating",
    "LayerGradCamPlusPlus": "cam",
    "LayerSmoothGradCamPlusPlus": "cam",
    "PathAttribution": "decoupling",
    "PathDecoupler": "decoupling",
    "PathDetector": "detection",
    "PathOutlierDetector": "detection",
    "PathPairs": "detection",
    "Paths": "decoupling",
    "Report": "report",
    "ReportOptions": "report",
    "WithOutput": "core.outputs",
    "adversarial_paths": "detection",
    "aggregate": "comparison",
    "attacks": "attacks",
    "cam": "cam",
    "compare": "comparison",
    "comparison": "comparison",
    "concepts": "concepts",
    "decompose": "heads",
    "detection": "detection",
    "explain_alarm": "detection",
    "explain_confusion": "metrics",
    "filter_ambiguity": "gating",
    "heads": "heads",
    "metrics": "metrics",
    "recover": "heads",
    "report": "report",
    "splitting": "splitting",
    "visualize": "visualize",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"{__name__}.{_HOMES[name]}")
    value = home if name == _HOMES[name] else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
