"""Splits each class's final-layer weights into the most discriminative and the most confusing neurons."""

from captum_classfilters.splitting.ald_splitter import ALDSplitter
from captum_classfilters.splitting.ald_tree import ALDNode as ALDNode
from captum_classfilters.splitting.ald_tree import ALDTree

__all__ = ["ALDSplitter", "ALDTree"]
