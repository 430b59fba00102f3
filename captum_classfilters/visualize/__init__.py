"""Results in, matplotlib Axes out: tables, curves, gates, paths, split heads, and maps on photographs.

Every function takes ``ax``, draws there, and returns it; without ``ax`` it makes a figure of fitting size. None shows
or saves a figure, or changes matplotlib's settings. The only room that imports matplotlib. `kit.py` has what the
pictures share; each other file is one family of pictures.
"""

from captum_classfilters.visualize.calculation_paths import (
    filter_states,
    gate_strip,
    integral_paths,
    path_embedding,
    path_profiles,
)
from captum_classfilters.visualize.cards import filter_cards
from captum_classfilters.visualize.curves import (
    accuracy_curve,
    auc_matrix,
    correlated_share,
    k_grid,
    macs_accuracy,
    roc,
)
from captum_classfilters.visualize.gates import cluster_centres, confusion, correlation, gate, similarity
from captum_classfilters.visualize.images import branch_maps, occlusion
from captum_classfilters.visualize.images import switched_off as switched_off
from captum_classfilters.visualize.splitting import ald_fit, ald_tree
from captum_classfilters.visualize.tables import class_filters, overlap
from captum_classfilters.visualize.unfamiliar import unfamiliar

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
    "unfamiliar",
]
