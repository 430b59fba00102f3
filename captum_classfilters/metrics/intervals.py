"""Old place of `core/intervals.py`; goes away."""

from captum_classfilters.core.intervals import Floats, draws_interval, mean_interval, wilson, with_all

__all__ = ["Floats", "draws_interval", "mean_interval", "wilson", "with_all"]
