"""Splits each class's final-layer weights into the most discriminative and the most confusing neurons."""

from captum_classfilters.splitting.ald_splitter import ALDSplitter
from captum_classfilters.splitting.ald_tree import ALDNode, ALDTree
from captum_classfilters.splitting.laplace import AsymmetricLaplace
from captum_classfilters.splitting.splits import Splits, split_weights

__all__ = ["ALDNode", "ALDSplitter", "ALDTree", "AsymmetricLaplace", "Splits", "split_weights"]
