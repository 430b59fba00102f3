"""Attacks of other packages as `captum.robust.Perturbation`: ``attack(images, labels)``.

The Adversarial Robustness Toolbox (ART) and Foolbox, as they are; `OnePixel` has ART's one-pixel attack with care of
its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from captum.robust import Perturbation
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from captum_classfilters.attacks.one_pixel import art, seeded
from captum_classfilters.attacks.oracle import Oracle, check_bounds, check_count, check_images
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.stream import check_labels, check_range


class ARTAttack(Perturbation):
    """Any untargeted evasion attack of the Adversarial Robustness Toolbox that takes a PyTorch classifier.

    Needs ART: ``pip install captum-classfilters[attacks]``.

    Args:
        forward_func: The network, images to logits ``(N, C)``; borrowed in eval mode, given back as it was.
        attack: A name or class of ``art.attacks.evasion``: ``"CarliniL2Method"``.
        lower_bound: Smallest value of a pixel.
        upper_bound: Largest value of a pixel.
        num_classes: C, which ART asks for.
        seed: ART draws from numpy's and torch's global state: both are seeded with this, and put back.
        options: Of the attack, as ``max_iter=100``.

    Raises:
        OptionError: No such attack, an option it refuses, ART is not installed.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        attack: Any,
        lower_bound: float = 0.0,
        upper_bound: float = 1.0,
        *,
        num_classes: int,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_bounds(lower_bound, upper_bound)
        check_count(num_classes, "num_classes", 2)
        check_count(seed, "seed", 0)
        evasion, _ = art()
        kind: Any = getattr(evasion, attack, None) if isinstance(attack, str) else attack
        if not hasattr(kind, "attack_params"):
            raise OptionError(f'attack must be of art.attacks.evasion, as "CarliniL2Method", got {attack!r}')
        if unknown := [name for name in options if name not in kind.attack_params]:
            raise OptionError(f"{kind.__name__} has no option {unknown[0]!r}; it has {kind.attack_params}")
        self.attack = kind
        self.forward_func, self.lower_bound, self.upper_bound = forward_func, lower_bound, upper_bound
        self.num_classes, self.seed, self.options = num_classes, seed, options

    def perturb(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attack each image.

        Args:
            inputs: ``(N, colours, H, W)``, floating, in [lower_bound, upper_bound].
            labels: True classes, ``(N,)``.

        Returns:
            Same shape, dtype and device, in the bounds.

        Raises:
            ShapeError, OptionError, LabelError: Images or labels that do not fit.
        """
        check_images(inputs, self.lower_bound, self.upper_bound)
        labels = check_labels(labels, len(inputs))
        if not len(inputs):
            return inputs.detach().clone()
        _, classifiers = art()
        oracle = Oracle(self.forward_func)
        with oracle.open(grad=True), seeded([self.seed]):
            # not torch.manual_seed: only this generator is put back
            torch.default_generator.manual_seed(self.seed)
            check_range(labels, classes := oracle.logits(inputs[:1]).shape[1])
            if classes != self.num_classes:
                raise OptionError(f"the model gives {classes} classes, got num_classes={self.num_classes}")
            classifier = classifiers.PyTorchClassifier(
                model=_Hidden(oracle, self.forward_func),
                loss=nn.CrossEntropyLoss(),
                input_shape=tuple(inputs.shape[1:]),
                nb_classes=self.num_classes,
                clip_values=(self.lower_bound, self.upper_bound),
                device_type="cpu",
            )
            quiet = {"verbose": False} if "verbose" in self.attack.attack_params else {}
            attack = self.attack(classifier, **quiet | self.options)
            one_hot = nn.functional.one_hot(labels.cpu(), self.num_classes).numpy()
            found = attack.generate(inputs.detach().float().cpu().numpy(), one_hot)
        changed: Tensor = torch.from_numpy(found).to(inputs).clamp(self.lower_bound, self.upper_bound)
        return changed


class FoolboxAttack(Perturbation):
    """Any attack of Foolbox.

    Needs Foolbox: ``pip install captum-classfilters[attacks]``.

    Args:
        forward_func: The network, images to logits ``(N, C)``; borrowed in eval mode, given back as it was.
        attack: Of ``foolbox.attacks``, made: ``foolbox.attacks.LinfPGD()``.
        lower_bound: Smallest value of a pixel.
        upper_bound: Largest value of a pixel.

    Raises:
        OptionError: Not an attack of Foolbox, or it is not installed.
    """

    def __init__(
        self, forward_func: nn.Module, attack: Any, lower_bound: float = 0.0, upper_bound: float = 1.0
    ) -> None:
        check_bounds(lower_bound, upper_bound)
        if not isinstance(attack, _foolbox().attacks.base.Attack):
            raise OptionError(f"attack must be one of foolbox.attacks, made, as LinfPGD(), got {attack!r}")
        self.forward_func, self.attack = forward_func, attack
        self.lower_bound, self.upper_bound = lower_bound, upper_bound

    def perturb(self, inputs: Tensor, labels: Tensor, epsilon: float | None = None) -> Tensor:
        """Attack each image.

        Args:
            inputs: ``(N, colours, H, W)``, floating, in [lower_bound, upper_bound].
            labels: True classes, ``(N,)``.
            epsilon: The size of the change in the attack's own norm; None: as small as the attack finds, for those that
                look for it.

        Returns:
            Same shape, dtype and device, in the bounds.

        Raises:
            ShapeError, OptionError, LabelError: Images or labels that do not fit.
        """
        check_images(inputs, self.lower_bound, self.upper_bound)
        labels = check_labels(labels, len(inputs)).to(inputs.device)
        if epsilon is None and isinstance(self.attack, _foolbox().attacks.base.FixedEpsilonAttack):
            raise OptionError(f"{type(self.attack).__name__} needs to know how large a change may be; pass epsilon=")
        if not len(inputs):
            return inputs.detach().clone()
        oracle = Oracle(self.forward_func)
        with oracle.open(grad=True):
            check_range(labels, oracle.logits(inputs[:1]).shape[1])
            model = _foolbox().PyTorchModel(
                _Hidden(oracle, self.forward_func).eval(), (self.lower_bound, self.upper_bound), device=inputs.device
            )
            # Foolbox has no tolerance for what rounding left outside
            given = inputs.detach().clamp(self.lower_bound, self.upper_bound)
            _, found, _ = self.attack(model, given, labels, epsilons=epsilon)
        changed: Tensor = found.detach().to(inputs).clamp(self.lower_bound, self.upper_bound)
        return changed


class _Hidden(nn.Module):
    """What a toolbox takes for the network: it may switch modes and move this, not the one behind it."""

    def __init__(self, oracle: Oracle, forward_func: Callable[..., Any]) -> None:
        super().__init__()
        # behind a function: a module would be found, moved and switched
        self._logits: Callable[[Tensor], Tensor] = lambda images: forward_func(oracle.place(images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, C)``, with gradients, where the images are."""
        if not images.requires_grad:
            return self._logits(images).to(images)
        output: Tensor = _OfImagesAlone.apply(images, self._logits)
        return output.to(images)


class _OfImagesAlone(torch.autograd.Function):
    """A network whose parameters get no ``.grad``: toolboxes call ``backward``, which would leave some on them."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.given = images.detach().requires_grad_()
            ctx.output = logits(ctx.given)
        output: Tensor = ctx.output.detach()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # kept: ART goes back once for each class
        (found,) = torch.autograd.grad(ctx.output, ctx.given, gradient, retain_graph=True, materialize_grads=True)
        return found, None


def _foolbox() -> Any:
    try:
        import foolbox
    except ImportError as error:
        raise OptionError(
            f"FoolboxAttack needs Foolbox, which could not be loaded ({error}); install it: "
            "pip install 'captum-classfilters[attacks]'"
        ) from error
    return foolbox
