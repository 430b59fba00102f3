"""Results in, matplotlib Axes out: tables, curves, paths, detectors, split heads and the images behind a channel.

Every function takes ``ax``, draws there, and returns it; without ``ax`` it makes a figure of fitting size. None shows
or saves a figure, or changes matplotlib's settings. The only room that imports matplotlib.
"""

from captum_classfilters.visualize.branches import branch_maps
from captum_classfilters.visualize.cards import filter_cards
from captum_classfilters.visualize.costs import macs_accuracy
from captum_classfilters.visualize.curves import accuracy_curve
from captum_classfilters.visualize.detection import auc_matrix, integral_paths, roc
from captum_classfilters.visualize.fields import gate_strip, occlusion, switched_off
from captum_classfilters.visualize.gates import (
    cluster_centres,
    confusion,
    correlated_share,
    correlation,
    gate,
    similarity,
)
from captum_classfilters.visualize.grid import k_grid
from captum_classfilters.visualize.paths import filter_states, path_embedding, path_profiles
from captum_classfilters.visualize.splitting import ald_fit, ald_tree
from captum_classfilters.visualize.tables import class_filters, overlap

__all__ = [
    "accuracy_curve",
    "ald_fit",
    "ald_tree",
    "auc_matrix",
    "branch_maps",
    "class_filters",
    "cluster_centres",
    "confusion",
    "correlated_share",
    "correlation",
    "filter_cards",
    "filter_states",
    "gate",
    "gate_strip",
    "integral_paths",
    "k_grid",
    "macs_accuracy",
    "occlusion",
    "overlap",
    "path_embedding",
    "path_profiles",
    "roc",
    "similarity",
    "switched_off",
]
