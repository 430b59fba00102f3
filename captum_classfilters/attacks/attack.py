"""`Attack`: one way to call attacks of any package, with checks of the images that they return.

Captum's attacks take a radius or an epsilon and a target, others take ``(images, labels)``.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from captum.robust import FGSM, Perturbation
from torch import Tensor, nn

from captum_classfilters.attacks.oracle import Bounds, check_bounds, check_images
from captum_classfilters.core.check import number
from captum_classfilters.core.errors import DeviceError, NonFiniteError, OptionError, ShapeError

# Names of the arguments for the size of the change, and for the labels
_SIZES = ("epsilon", "radius", "eps")
_LABELS = ("target", "labels", "label", "y")
# Default number of steps of a projected gradient; Captum's attack has no default
_STEPS = 10
# A share of epsilon that rounding may add to it
_ROUNDING = 1e-3


class Attack(Perturbation):
    """A `captum.robust.Perturbation`, or any function ``(images, labels) -> images``, with its budget.

    Args:
        perturbation: An instance of an attack: ``PGD(model, ...)``.
        epsilon: The most that a pixel may change, in units of the pixels. It is passed to the attack under the attack's
            own name for it, and checked. None: the attack decides.
        bounds: Smallest and largest value of a pixel.
        options: The attack's other arguments: ``step_num``, ``step_size``, ``norm``, ... For an attack that takes
            ``step_num`` and ``step_size`` the defaults are 10 and ``2.5 * epsilon / step_num``.

    Raises:
        OptionError: ``perturbation`` is not an attack; it lacks an argument, or does not have one of ``options``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> fgsm = FGSM(model, torch.nn.CrossEntropyLoss(reduction="none"), lower_bound=0, upper_bound=1)
        >>> images = torch.full((1, 1, 2, 2), 0.5)
        >>> changed = Attack(fgsm, epsilon=0.25)(images, torch.tensor([0]))
        >>> (changed - images).abs().flatten().tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(
        self,
        perturbation: Callable[..., Tensor],
        epsilon: float | None = None,
        bounds: Bounds = (0.0, 1.0),
        **options: Any,
    ) -> None:
        self.bounds = check_bounds(bounds)
        self.perturbation = perturbation
        self._call = perturbation.perturb if isinstance(perturbation, Perturbation) else perturbation
        if not callable(self._call):
            raise OptionError(
                "the attack must be a captum.robust.Perturbation or a function (images, labels) -> images, got "
                f"{type(perturbation).__name__}"
            )
        if isinstance(perturbation, type | nn.Module):
            raise OptionError(f"expected an attack that was made, as PGD(model), got {perturbation!r:.60}")
        if epsilon is not None:
            epsilon = number(epsilon, "epsilon", 0, open_ends=True, meaning="or None, which leaves it to the attack")
        fgsm = getattr(perturbation, "fgsm", perturbation)  # PGD has one inside
        self._logarithm_of = fgsm.forward_func if isinstance(fgsm, FGSM) and fgsm.loss_func is None else None
        self.name = type(perturbation).__name__ if isinstance(perturbation, Perturbation) else "the attack"
        self.epsilon = epsilon
        parameters = _parameters(self._call)
        self.options = self._complete(dict(options), parameters)
        self._label = next((name for name in _LABELS if name in parameters), None)

    def _complete(self, options: dict[str, Any], parameters: dict[str, inspect.Parameter]) -> dict[str, Any]:
        """Add the size of the change and the steps to the options; refuse options that the attack does not have."""
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if unknown := [name for name in options if name not in parameters and not takes_any]:
            raise OptionError(f"{self.name} has no argument {unknown[0]!r}; it has {list(parameters)}")
        if reserved := [name for name in (*_LABELS, "targeted") if name in options]:
            raise OptionError(
                f"{reserved[0]} cannot be passed, because the attack takes its labels from the loader; leave it out"
            )
        size = next((name for name in _SIZES if name in parameters), None)
        if size in options and self.epsilon is None:
            self.epsilon = options[size]
        if size is not None and size not in options:
            if self.epsilon is not None:
                options[size] = self.epsilon
            elif parameters[size].default is inspect.Parameter.empty:
                raise OptionError(f"{self.name} needs to know how much a pixel may change; pass epsilon=, as 2 / 255")
        if size in options and "step_num" in parameters and "step_size" in parameters:
            options.setdefault("step_num", _STEPS)
            options.setdefault("step_size", 2.5 * options[size] / options["step_num"])
        return options

    def perturb(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attack images ``(N, colours, H, W)`` of classes ``(N,)``.

        Returns:
            Images of the same shape, device and dtype, in the bounds, changed by at most epsilon.

        Raises:
            ShapeError, DeviceError, NonFiniteError, OptionError: The attack gave images that do not fit.
        """
        self._check_default_loss(inputs)
        # a copy, because an attack may write into it
        copy = inputs.detach().clone()
        with warnings.catch_warnings():
            # Captum's attacks warn of this for all images
            warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")
            if self._label is None:
                attacked = self._call(copy, labels, **self.options)
            else:
                attacked = self._call(copy, **{self._label: labels}, **self.options)
        return self._checked(attacked, inputs)

    def _checked(self, attacked: Any, images: Tensor) -> Tensor:
        """The attacked images, checked, in the dtype of the images."""
        if not isinstance(attacked, Tensor) or attacked.shape != images.shape:
            got = tuple(attacked.shape) if isinstance(attacked, Tensor) else type(attacked).__name__
            raise ShapeError(f"{self.name} must give images of shape {tuple(images.shape)}, got {got}")
        if attacked.device != images.device:
            raise DeviceError(
                f"{self.name} gave images on {attacked.device}, expected {images.device}; move them there"
            )
        attacked = attacked.detach()
        if not torch.isfinite(attacked).all():
            raise NonFiniteError(
                f"{self.name} gave NaN or infinite pixels; Captum's FGSM and PGD take the logarithm of the model's "
                'output unless told otherwise: pass loss_func=torch.nn.CrossEntropyLoss(reduction="none")'
            )
        remedy = "make the attack with these bounds: Captum's have none by default"
        check_images(attacked, self.bounds, what=f"images from {self.name}", remedy=remedy)
        # half precision is compared in float32, and float64 in float64
        wide = torch.promote_types(images.dtype, torch.float32)
        change = (attacked.to(wide) - images.to(wide)).abs().max().item() if len(images) else 0.0
        slack = torch.finfo(images.dtype).eps * max(map(abs, (*self.bounds, 1.0))) * 4
        if self.epsilon is not None and change > self.epsilon * (1 + _ROUNDING) + slack:
            raise OptionError(
                f"{self.name} changed a pixel by {change:.6g}, more than epsilon={self.epsilon:.6g}; pass the epsilon "
                "it was made with, or None"
            )
        result: Tensor = attacked.to(images.dtype)
        return result

    def _check_default_loss(self, images: Tensor) -> None:
        """Refuse Captum's default loss for logits: their logarithm is NaN, and no pixel would change."""
        if self._logarithm_of is None or not len(images):
            return
        with torch.no_grad():
            output = self._logarithm_of(images[:1])
        if bool((output < 0).any() | (output > 1 + 1e-3).any()):
            raise OptionError(
                f"{self.name} was made without loss_func and takes the logarithm of the model's output, which is not a "
                'probability; pass loss_func=torch.nn.CrossEntropyLoss(reduction="none")'
            )


def _parameters(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(call).parameters)
    except (TypeError, ValueError):  # written in C
        return {}
