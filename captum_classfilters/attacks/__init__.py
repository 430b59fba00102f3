"""Attacks on images: black-box ones of this package, and those of other packages behind one adapter each.

A black-box attack asks a network for its output on images and for nothing else. Each attack is a
`captum.robust.Perturbation`: ``attack(images, labels)`` gives images of the same shape, changed where the network was
fooled and unchanged where it was not. `metrics.attack_success` counts.
"""

from captum_classfilters.attacks.attack import Attack
from captum_classfilters.attacks.local_search import LocalSearch, SearchSettings
from captum_classfilters.attacks.oracle import Normalized
from captum_classfilters.attacks.toolboxes import ARTAttack, FoolboxAttack, OnePixel

__all__ = ["ARTAttack", "Attack", "FoolboxAttack", "LocalSearch", "Normalized", "OnePixel", "SearchSettings"]
