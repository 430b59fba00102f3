"""Calculation paths: gates that open and close channels for every image."""

from captum_classfilters.decoupling.attribution import PathAttribution
from captum_classfilters.decoupling.controller import DecouplingLoss as DecouplingLoss
from captum_classfilters.decoupling.costs import Costs as Costs
from captum_classfilters.decoupling.decoupler import PathDecoupler
from captum_classfilters.decoupling.path_options import DecouplingOptions
from captum_classfilters.decoupling.paths import Paths

__all__ = ["DecouplingOptions", "PathAttribution", "PathDecoupler", "Paths"]
