"""Attacks on images: black-box attacks of this package, and adapters for attacks of other packages.

A black-box attack uses only the network's output on images. Each attack is a `captum.robust.Perturbation`:
``attack(images, labels)`` gives images of the same shape. `metrics.attack_success` counts how often attacks succeed.
"""

from captum_classfilters.attacks.attack import Attack
from captum_classfilters.attacks.local_search import LocalSearch, SearchSettings
from captum_classfilters.attacks.oracle import Normalized
from captum_classfilters.attacks.toolboxes import ARTAttack, FoolboxAttack, OnePixel

__all__ = ["ARTAttack", "Attack", "FoolboxAttack", "LocalSearch", "Normalized", "OnePixel", "SearchSettings"]
