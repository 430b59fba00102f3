"""Results in, matplotlib Axes out: tables, curves and the images behind a channel.

Every function takes ``ax``, draws there, and returns it; without ``ax`` it makes a figure of fitting size. None shows
or saves a figure, or changes matplotlib's settings. The only room that imports matplotlib.
"""

from captum_classfilters.visualize.cards import filter_cards
from captum_classfilters.visualize.curves import accuracy_curve
from captum_classfilters.visualize.gates import (
    cluster_centres,
    confusion,
    correlated_share,
    correlation,
    gate,
    similarity,
)
from captum_classfilters.visualize.grid import k_grid
from captum_classfilters.visualize.tables import class_filters, overlap

__all__ = [
    "accuracy_curve",
    "class_filters",
    "cluster_centres",
    "confusion",
    "correlated_share",
    "correlation",
    "filter_cards",
    "gate",
    "k_grid",
    "overlap",
    "similarity",
]
