"""Attacks: black-box ones of this package, which ask a network for its output on images and for nothing else, and
those of other packages behind one adapter each.

Each is a `captum.robust.Perturbation`: ``attack(images, labels)`` gives images of the same shape, changed where the
network was fooled and as they came where it was not. `metrics.attack_success` counts.
"""

from captum_classfilters.attacks.local_search import LocalSearch
from captum_classfilters.attacks.normalized import Normalized
from captum_classfilters.attacks.one_pixel import OnePixel
from captum_classfilters.attacks.toolboxes import ARTAttack, FoolboxAttack

__all__ = ["ARTAttack", "FoolboxAttack", "LocalSearch", "Normalized", "OnePixel"]
