"""Attacks of other packages: the Adversarial Robustness Toolbox (ART) and Foolbox.

`ARTAttack` and `FoolboxAttack` run their attacks as they are; `OnePixel` runs ART's one-pixel attack with more care.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from captum.robust import Perturbation
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from captum_classfilters.attacks.oracle import Bounds, Oracle, check_bounds, check_images, in_top
from captum_classfilters.core.check import integer
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.labels import check_labels, check_range

# ART's one-pixel attack uses whole numbers from 0 to this
_WHITE = 255.0


class ARTAttack(Perturbation):
    """Any untargeted evasion attack of the Adversarial Robustness Toolbox that takes a PyTorch classifier.

    Needs ART: ``pip install captum-classfilters[attacks]``.

    Args:
        forward_func: The network, images to logits ``(N, C)``; borrowed in eval mode, given back as it was.
        attack: A name or class of ``art.attacks.evasion``: ``"CarliniL2Method"``.
        bounds: Smallest and largest value of a pixel.
        num_classes: C, which ART asks for.
        seed: Seed of numpy's and torch's global state, from which ART draws; both are restored afterwards.
        options: The attack's own options, such as ``max_iter=100``.

    Raises:
        OptionError: There is no such attack, it refuses an option, or ART is not installed.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        attack: Any,
        bounds: Bounds = (0.0, 1.0),
        *,
        num_classes: int,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.bounds = check_bounds(bounds)
        self.num_classes, self.seed = integer(num_classes, "num_classes", 2), integer(seed, "seed")
        evasion, _ = _art()
        kind: Any = getattr(evasion, attack, None) if isinstance(attack, str) else attack
        if not hasattr(kind, "attack_params"):
            raise OptionError(f'attack must be of art.attacks.evasion, as "CarliniL2Method", got {attack!r}')
        if unknown := [name for name in options if name not in kind.attack_params]:
            raise OptionError(f"{kind.__name__} has no option {unknown[0]!r}; it has {kind.attack_params}")
        self.forward_func, self.attack, self.options = forward_func, kind, options

    def perturb(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attack each image.

        Args:
            inputs: ``(N, colours, H, W)``, floating, in the bounds.
            labels: True classes, ``(N,)``.

        Returns:
            Same shape, dtype and device, in the bounds.

        Raises:
            ShapeError, OptionError, LabelError: Images or labels do not fit.
        """
        check_images(inputs, self.bounds)
        labels = check_labels(labels, len(inputs))
        if not len(inputs):
            return inputs.detach().clone()
        oracle = Oracle(self.forward_func)
        with oracle.open(grad=True), _seeded([self.seed]):
            # not torch.manual_seed, because only this generator is restored
            torch.default_generator.manual_seed(self.seed)
            check_range(labels, classes := oracle.logits(inputs[:1]).shape[1])
            if classes != self.num_classes:
                raise OptionError(f"the model gives {classes} classes, got num_classes={self.num_classes}")
            classifier = _classifier(_Hidden.around(oracle), inputs, classes, self.bounds)
            quiet = {"verbose": False} if "verbose" in self.attack.attack_params else {}
            attack = self.attack(classifier, **quiet | self.options)
            one_hot = nn.functional.one_hot(labels.cpu(), self.num_classes).numpy()
            attacked = attack.generate(inputs.detach().float().cpu().numpy(), one_hot)
        return torch.from_numpy(attacked).to(inputs).clamp(*self.bounds)


class OnePixel(Perturbation):
    """Search by differential evolution for one pixel, its place and colour, that changes the predicted class.

    Source: Su, Vargas & Sakurai 2019 (arXiv 1710.08864), untargeted; the search is ART's
    ``art.attacks.evasion.PixelAttack`` with ``es=1``. ART differs from the paper:

    - It has 400 candidates in each generation, as in the paper (399 for one colour). It mutates the best candidate with
      a random factor in [0.5, 1] instead of a random candidate with 0.5, and starts from a Latin hypercube.
    - Colours have 255 steps and are cut, not rounded: a pixel reaches 254/255, never the upper bound.

    This adapter adds images in any range, other pixels that stay bit for bit, networks of two classes (which ART
    refuses), and one seed instead of numpy's global state; the network is not moved or changed. Candidates are compared
    by the logarithm of the probability, so that their order is kept where float32 rounds to 1.

    Needs ART: ``pip install captum-classfilters[attacks]``.

    Args:
        forward_func: The network, images to logits ``(N, C)``; borrowed in eval mode, given back as it was.
        bounds: Smallest and largest value of a pixel.
        th: How many pixels may be changed (ART's name for it); 1 is the one-pixel attack.
        max_iter: Generations at most (ART's name). The network sees at most about ``401 max_iter + 400`` candidates for
            each image.
        seed: Seed of the search. The search of each image is seeded by this and by its position in the batch.

    Raises:
        OptionError: An option is out of range, or ART is not installed.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        bounds: Bounds = (0.0, 1.0),
        *,
        th: int = 1,
        max_iter: int = 100,
        seed: int = 0,
    ) -> None:
        self.bounds = check_bounds(bounds)
        self.th, self.max_iter, self.seed = (
            integer(th, "th", 1),
            integer(max_iter, "max_iter", 1),
            integer(seed, "seed"),
        )
        _art()
        self.forward_func = forward_func

    def perturb(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attack each image.

        Args:
            inputs: ``(N, colours, H, W)``, floating, in the bounds.
            labels: True classes, ``(N,)``.

        Returns:
            Same shape, dtype and device. An image that was not classified as its label, or still is at the end, comes
            back unchanged; every image that differs fools the network.

        Raises:
            ShapeError: Images do not have that shape, or the network does not give logits ``(N, C)``.
            OptionError: A pixel is out of range.
            LabelError: Labels have another shape, or one is out of range.
        """
        check_images(inputs, self.bounds)
        labels = check_labels(labels, len(inputs)).to(inputs.device)
        images = inputs.detach().clone()
        if not len(images):
            return images
        with Oracle(self.forward_func).open() as oracle:
            logits = oracle.logits(images)
            check_range(labels, logits.shape[1])
            attack = self._attack(oracle, images, logits.shape[1])
            for index in in_top(logits, labels).nonzero()[:, 0].tolist():
                one = slice(index, index + 1)
                attacked = self._attacked(attack, images[one], index)
                # the network runs again, because the other pixels are now exactly the image's and not ART's copy
                if not in_top(oracle.logits(attacked), labels[one]).item():
                    images[one] = attacked
        return images

    def _attack(self, oracle: Oracle, images: Tensor, classes: int) -> Any:
        def log_probabilities(scaled: Tensor) -> Tensor:
            return oracle.logits(self._from_art(scaled).to(images)).log_softmax(1)

        classifier = _classifier(_Hidden(log_probabilities), images, classes, (0.0, _WHITE))
        evasion, _ = _art()
        return evasion.PixelAttack(classifier, th=self.th, es=1, max_iter=self.max_iter, verbose=False)

    def _attacked(self, attack: Any, image: Tensor, index: int) -> Tensor:
        """The image with ART's pixel in it; the unchanged image if ART found none."""
        scaled = self._to_art(image)
        with _seeded([self.seed, index]):
            # no labels, because with labels ART refuses networks of two classes; it uses the predicted ones
            changed = attack.generate(scaled)
        pixels = torch.from_numpy((changed != scaled).any(1, keepdims=True)).to(image.device)
        pasted = torch.where(pixels, self._from_art(torch.from_numpy(changed).to(image.device)), image.double())
        return pasted.to(image.dtype).clamp(*self.bounds)

    def _to_art(self, images: Tensor) -> np.ndarray[Any, Any]:
        low, high = self.bounds
        scaled: np.ndarray[Any, Any] = ((images.double() - low) / (high - low) * _WHITE).float().cpu().numpy()
        return scaled

    def _from_art(self, scaled: Tensor) -> Tensor:
        low, high = self.bounds
        return scaled.double() / _WHITE * (high - low) + low


class FoolboxAttack(Perturbation):
    """Any attack of Foolbox.

    Needs Foolbox: ``pip install captum-classfilters[attacks]``.

    Args:
        forward_func: The network, images to logits ``(N, C)``; borrowed in eval mode, given back as it was.
        attack: An instance of an attack in ``foolbox.attacks``: ``foolbox.attacks.LinfPGD()``.
        bounds: Smallest and largest value of a pixel.

    Raises:
        OptionError: ``attack`` is no attack of Foolbox, or Foolbox is not installed.
    """

    def __init__(self, forward_func: nn.Module, attack: Any, bounds: Bounds = (0.0, 1.0)) -> None:
        self.bounds = check_bounds(bounds)
        if not isinstance(attack, _foolbox().attacks.base.Attack):
            raise OptionError(f"attack must be one of foolbox.attacks, made, as LinfPGD(), got {attack!r}")
        self.forward_func, self.attack = forward_func, attack

    def perturb(self, inputs: Tensor, labels: Tensor, epsilon: float | None = None) -> Tensor:
        """Attack each image.

        Args:
            inputs: ``(N, colours, H, W)``, floating, in the bounds.
            labels: True classes, ``(N,)``.
            epsilon: The size of the change in the attack's own norm; None: attacks that minimise the change find it.

        Returns:
            Same shape, dtype and device, in the bounds.

        Raises:
            ShapeError, OptionError, LabelError: Images or labels do not fit.
        """
        check_images(inputs, self.bounds)
        labels = check_labels(labels, len(inputs)).to(inputs.device)
        if epsilon is None and isinstance(self.attack, _foolbox().attacks.base.FixedEpsilonAttack):
            raise OptionError(f"{type(self.attack).__name__} needs to know how large a change may be; pass epsilon=")
        if not len(inputs):
            return inputs.detach().clone()
        oracle = Oracle(self.forward_func)
        with oracle.open(grad=True):
            check_range(labels, oracle.logits(inputs[:1]).shape[1])
            hidden = _Hidden.around(oracle).eval()
            model = _foolbox().PyTorchModel(hidden, self.bounds, device=inputs.device)
            # Foolbox does not tolerate pixels that rounding left outside
            within = inputs.detach().clamp(*self.bounds)
            _, attacked, _ = self.attack(model, within, labels, epsilons=epsilon)
        changed: Tensor = attacked.detach().to(inputs).clamp(*self.bounds)
        return changed


class _Hidden(nn.Module):
    """A module that a toolbox may move and switch between modes, without an effect on the network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # a function, because a toolbox would find, move and switch a module
        self._function = function

    @classmethod
    def around(cls, oracle: Oracle) -> "_Hidden":
        """The network's logits, with gradients, on the device of the images."""
        return cls(lambda images: oracle.forward(images).to(images))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, C)``."""
        if not images.requires_grad:
            return self._function(images)
        output: Tensor = _OfImagesAlone.apply(images, self._function)
        return output


class _OfImagesAlone(torch.autograd.Function):
    """A network whose parameters get no ``.grad``, although toolboxes call ``backward``."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            ctx.output = function(ctx.images)
        output: Tensor = ctx.output.detach()
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # the graph is kept, because ART calls backward once for each class
        (result,) = torch.autograd.grad(ctx.output, ctx.images, gradient, retain_graph=True, materialize_grads=True)
        return result, None


def _classifier(network: _Hidden, images: Tensor, classes: int, bounds: Bounds) -> Any:
    """ART's view of a network."""
    _, classification = _art()
    return classification.PyTorchClassifier(
        model=network,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=classes,
        clip_values=bounds,
        device_type="cpu",
    )


@contextmanager
def _seeded(seed: list[int]) -> Iterator[None]:
    """Seed numpy's global state, from which ART draws, and restore it; also restore torch's, which its loaders use."""
    state = np.random.get_state()
    # ART divides by the deviation of a population, which is 0 if all members are equal
    with torch.random.fork_rng(devices=[]), np.errstate(all="ignore"):
        np.random.seed(np.random.SeedSequence(seed).generate_state(4))
        try:
            yield
        finally:
            np.random.set_state(state)


def _art() -> tuple[Any, Any]:
    """ART's attacks and classifiers, imported on use because it takes seconds."""
    try:
        from art.attacks import evasion
        from art.estimators import classification
    except ImportError as error:
        raise OptionError(
            f"this attack needs the Adversarial Robustness Toolbox, which could not be loaded ({error}); install it: "
            "pip install 'captum-classfilters[attacks]'"
        ) from error
    return evasion, classification


def _foolbox() -> Any:
    try:
        import foolbox
    except ImportError as error:
        raise OptionError(
            f"FoolboxAttack needs Foolbox, which could not be loaded ({error}); install it: "
            "pip install 'captum-classfilters[attacks]'"
        ) from error
    return foolbox
