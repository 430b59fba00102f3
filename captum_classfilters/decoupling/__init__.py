"""Calculation paths: gates that open and close channels for every image."""

from captum_classfilters.decoupling.attribution import PathAttribution
from captum_classfilters.decoupling.controller import hard_gates, random_half, saturating_sigmoid, semantic_hash
from captum_classfilters.decoupling.decoupler import PathDecoupler
from captum_classfilters.decoupling.losses import (
    DecouplingLoss,
    divergence_loss,
    mutual_information_loss,
    sparsity_loss,
)
from captum_classfilters.decoupling.macs import Costs
from captum_classfilters.decoupling.paths import Paths

__all__ = [
    "Costs",
    "DecouplingLoss",
    "PathAttribution",
    "PathDecoupler",
    "Paths",
    "divergence_loss",
    "hard_gates",
    "mutual_information_loss",
    "random_half",
    "saturating_sigmoid",
    "semantic_hash",
    "sparsity_loss",
]
