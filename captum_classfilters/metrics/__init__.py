"""What a table of class filters is worth: any `ClassFilters`, a model and a loader in, a pandas DataFrame out.

Every table has its random control and its interval.
"""

from captum_classfilters.metrics.ablation import class_ablation
from captum_classfilters.metrics.accuracy import accuracy_curve
from captum_classfilters.metrics.intervals import mean_interval, wilson
from captum_classfilters.metrics.localisation import foreground, localisation
from captum_classfilters.metrics.sets import overlap, stability

__all__ = [
    "accuracy_curve",
    "class_ablation",
    "foreground",
    "localisation",
    "mean_interval",
    "overlap",
    "stability",
    "wilson",
]
