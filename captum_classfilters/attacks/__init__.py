"""Black-box attacks: they ask a network for its output on images, and for nothing else.

Each is a `captum.robust.Perturbation`: ``attack(images, labels)`` gives images of the same shape, changed where the
network was fooled and as they came where it was not. `metrics.attack_success` counts.
"""

from captum_classfilters.attacks.local_search import LocalSearch
from captum_classfilters.attacks.one_pixel import OnePixel

__all__ = ["LocalSearch", "OnePixel"]
