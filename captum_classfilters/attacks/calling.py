"""How an attack is called, whoever wrote it; and what it may give back.

Captum's attacks take a radius or an epsilon and a target, others ``(images, labels)``.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from captum.robust import FGSM, Perturbation
from torch import Tensor, nn

from captum_classfilters.attacks.oracle import check_images
from captum_classfilters.core.errors import DeviceError, NonFiniteError, OptionError, ShapeError

# What an attack may call the size of its change, and the labels
_SIZES = ("epsilon", "radius", "eps")
_LABELS = ("target", "labels", "label", "y")
# of a projected gradient: Captum's has no default
_STEPS = 10
# A share of epsilon that rounding may add to it
_ROUNDING = 1e-3


class Attack:
    """A `captum.robust.Perturbation`, or any ``(images, labels) -> images``, called in one way.

    Args:
        perturbation: The attack.
        epsilon: The most that a pixel may change: given to the attack under the name that it has for it, and checked;
            None: as the attack was made.
        lower_bound: Smallest value of a pixel.
        upper_bound: Largest value of a pixel.
        options: More of the attack's own arguments. For one that takes ``step_num`` and ``step_size`` the defaults are
            10 and ``2.5 * epsilon / step_num``.

    Raises:
        OptionError: Not an attack; options that it does not have, or lacks.
    """

    def __init__(
        self,
        perturbation: Callable[..., Tensor],
        epsilon: float | None,
        lower_bound: float,
        upper_bound: float,
        options: Mapping[str, Any],
    ) -> None:
        self.call = perturbation.perturb if isinstance(perturbation, Perturbation) else perturbation
        if not callable(self.call):
            raise OptionError(
                f"the attack must be a captum.robust.Perturbation or a function (images, labels) -> images, got "
                f"{type(perturbation).__name__}"
            )
        if isinstance(perturbation, type | nn.Module):
            raise OptionError(f"expected an attack that was made, as PGD(model), got {perturbation!r:.60}")
        if epsilon is not None and (not isinstance(epsilon, Real) or not epsilon > 0):
            raise OptionError(f"epsilon must be above 0, got {epsilon!r}; None leaves it to the attack")
        fgsm = getattr(perturbation, "fgsm", perturbation)  # PGD has one inside
        self._logarithm_of = fgsm.forward_func if isinstance(fgsm, FGSM) and fgsm.loss_func is None else None
        self.name = type(perturbation).__name__ if isinstance(perturbation, Perturbation) else "the attack"
        self.epsilon, self.bounds = epsilon, (lower_bound, upper_bound)
        known = _parameters(self.call)
        self.options = self._complete(dict(options), known)
        self.label = next((name for name in _LABELS if name in known), None)

    def _complete(self, options: dict[str, Any], known: dict[str, inspect.Parameter]) -> dict[str, Any]:
        anything = any(each.kind is each.VAR_KEYWORD for each in known.values())
        if unknown := [name for name in options if name not in known and not anything]:
            raise OptionError(f"{self.name} has no argument {unknown[0]!r}; it has {list(known)}")
        if given := [name for name in (*_LABELS, "targeted") if name in options]:
            raise OptionError(
                f"{given[0]} is not to be passed: the attack is away from the labels that the loader gives"
            )
        size = next((name for name in _SIZES if name in known), None)
        if size in options and self.epsilon is None:
            self.epsilon = options[size]
        if size is not None and size not in options:
            if self.epsilon is not None:
                options[size] = self.epsilon
            elif known[size].default is inspect.Parameter.empty:
                raise OptionError(f"{self.name} needs to know how much a pixel may change; pass epsilon=, as 2 / 255")
        if size in options and "step_num" in known and "step_size" in known:
            options.setdefault("step_num", _STEPS)
            options.setdefault("step_size", 2.5 * options[size] / options["step_num"])
        return options

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Attacked images, of the same shape, device and dtype, in the bounds.

        Raises:
            ShapeError, DeviceError, NonFiniteError, OptionError: It gave something else.
        """
        self._check_default_loss(images)
        # a copy: an attack may write into it
        given = images.detach().clone()
        named = {} if self.label is None else {self.label: labels}
        with warnings.catch_warnings():
            # Captum's attacks say so of any images, also their own
            warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")
            found = self.call(given, **named, **self.options) if named else self.call(given, labels, **self.options)
        if not isinstance(found, Tensor) or found.shape != images.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(f"{self.name} must give images of shape {tuple(images.shape)}, got {got}")
        if found.device != images.device:
            raise DeviceError(f"{self.name} gave images on {found.device}, expected {images.device}; move them there")
        found = found.detach()
        if not torch.isfinite(found).all():
            raise NonFiniteError(
                f"{self.name} gave NaN or infinite pixels; Captum's FGSM and PGD take the logarithm of what the model "
                'gives unless told otherwise: pass loss_func=torch.nn.CrossEntropyLoss(reduction="none")'
            )
        remedy = "make the attack with these bounds: Captum's have none by default"
        check_images(found, *self.bounds, what=f"images from {self.name}", remedy=remedy)
        # half precision too, and no less than it came in
        wide = torch.promote_types(images.dtype, torch.float32)
        changed = (found.to(wide) - images.to(wide)).abs().max().item() if len(images) else 0.0
        slack = torch.finfo(images.dtype).eps * max(map(abs, (*self.bounds, 1.0))) * 4
        if self.epsilon is not None and changed > self.epsilon * (1 + _ROUNDING) + slack:
            raise OptionError(
                f"{self.name} changed a pixel by {changed:.6g}, more than epsilon={self.epsilon:.6g}; pass the epsilon "
                "it was made with, or None"
            )
        return found.to(images.dtype)

    def _check_default_loss(self, images: Tensor) -> None:
        """Captum's own loss is the logarithm of what the model gives: of logits that is NaN, which moves no pixel."""
        if self._logarithm_of is None or not len(images):
            return
        with torch.no_grad():
            output = self._logarithm_of(images[:1])
        if bool((output < 0).any() | (output > 1 + 1e-3).any()):
            raise OptionError(
                f"{self.name} was made without loss_func and takes the logarithm of what the model gives, which are no "
                'probabilities; pass loss_func=torch.nn.CrossEntropyLoss(reduction="none")'
            )


def _parameters(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(call).parameters)
    except (TypeError, ValueError):  # written in C
        return {}
