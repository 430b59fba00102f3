"""Compare all methods, and any Captum layer attribution, on one network and loader."""

from captum_classfilters.comparison.aggregate import aggregate
from captum_classfilters.comparison.compare import compare, method_overlap

__all__ = ["aggregate", "compare", "method_overlap"]
