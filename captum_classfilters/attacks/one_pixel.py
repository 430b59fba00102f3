"""The one-pixel attack of Su et al. 2019, as the Adversarial Robustness Toolbox (ART) has it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from captum.robust import Perturbation
from torch import Tensor, nn

from captum_classfilters.attacks.oracle import Oracle, check_bounds, check_count, check_images, in_top
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.stream import check_labels, check_range

# ART's pixels are whole numbers from 0 to this
_WHITE = 255.0


class OnePixel(Perturbation):
    """Look for one pixel, its place and colour, that changes what the network sees; by differential evolution.

    Source: Su, Vargas & Sakurai 2019 (arXiv 1710.08864), untargeted; the search is ART's
    ``art.attacks.evasion.PixelAttack`` with ``es=1``. What differs from the paper lies in ART:

    - 400 candidates a generation as in the paper (399 for one colour), but mutants of the best candidate with a random
      factor in [0.5, 1] instead of a random candidate with 0.5, and a Latin hypercube at the start.
    - Colours are whole numbers of 255 steps, cut, not rounded: upper_bound itself is never reached, only 254/255.

    What this adapter adds: images in any range, all other pixels bit for bit as they were, networks of two classes,
    which ART refuses, one seed instead of numpy's global state, and a network left where and as it was. Candidates are
    compared by the logarithm of the probability: the same order, also where float32 rounds all to 1.

    Needs ART: ``pip install captum-classfilters[attacks]``.

    Args:
        forward_func: The network, images to logits ``(N, C)``; borrowed in eval mode, given back as it was.
        lower_bound: Smallest value of a pixel.
        upper_bound: Largest value of a pixel.
        th: Pixels that may be changed, ART's name; 1 is the attack of the title.
        max_iter: Generations at most, ART's name. It asks for at most about ``401 max_iter + 400`` images each.
        seed: Of the search, which each image of a call begins anew by its place.

    Raises:
        OptionError: An option out of range; ART is not installed.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        lower_bound: float = 0.0,
        upper_bound: float = 1.0,
        *,
        th: int = 1,
        max_iter: int = 100,
        seed: int = 0,
    ) -> None:
        check_bounds(lower_bound, upper_bound)
        check_count(th, "th")
        check_count(max_iter, "max_iter")
        check_count(seed, "seed", 0)
        art()
        self.forward_func, self.lower_bound, self.upper_bound = forward_func, lower_bound, upper_bound
        self.th, self.max_iter, self.seed = th, max_iter, seed

    def perturb(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attack each image.

        Args:
            inputs: ``(N, colours, H, W)``, floating, in [lower_bound, upper_bound].
            labels: True classes, ``(N,)``.

        Returns:
            Same shape, dtype and device. An image that was not classified as its label, or still is at the end, comes
            back as it was: what was changed, is fooled.

        Raises:
            ShapeError: Not images of that shape, or a network without logits ``(N, C)``.
            OptionError: A pixel out of range.
            LabelError: Labels of another shape, or out of range.
        """
        check_images(inputs, self.lower_bound, self.upper_bound)
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
                found = self._found(attack, images[one], index)
                # asked again: the other pixels are now exactly the image's, not ART's copy of it
                if not in_top(oracle.logits(found), labels[one]).item():
                    images[one] = found
        return images

    def _attack(self, oracle: Oracle, images: Tensor, classes: int) -> Any:
        attacks, classifiers = art()
        classifier = classifiers.PyTorchClassifier(
            model=_Answers(oracle, images, self._from_art),
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=classes,
            clip_values=(0.0, _WHITE),
            device_type="cpu",
        )
        return attacks.PixelAttack(classifier, th=self.th, es=1, max_iter=self.max_iter, verbose=False)

    def _found(self, attack: Any, image: Tensor, index: int) -> Tensor:
        """The image with ART's pixel in it; the same where ART found none."""
        scaled = self._to_art(image)
        with seeded([self.seed, index]):
            # no labels: they are the network's own, and given ones ART refuses where there are two classes
            changed = attack.generate(scaled)
        pixels = torch.from_numpy((changed != scaled).any(1, keepdims=True)).to(image.device)
        found: Tensor = torch.where(pixels, self._from_art(torch.from_numpy(changed).to(image.device)), image.double())
        return found.to(image.dtype).clamp(self.lower_bound, self.upper_bound)

    def _to_art(self, images: Tensor) -> np.ndarray[Any, Any]:
        shares = (images.double() - self.lower_bound) / (self.upper_bound - self.lower_bound)
        scaled: np.ndarray[Any, Any] = (shares * _WHITE).float().cpu().numpy()
        return scaled

    def _from_art(self, scaled: Tensor) -> Tensor:
        return scaled.double() / _WHITE * (self.upper_bound - self.lower_bound) + self.lower_bound


class _Answers(nn.Module):
    """What ART takes for the network: it may switch modes and move this, not the one behind it."""

    def __init__(self, oracle: Oracle, like: Tensor, from_art: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._oracle, self._like, self._from_art = oracle, like, from_art

    def forward(self, scaled: Tensor) -> Tensor:
        """Logarithms of probabilities, ``(N, C)``."""
        images = self._from_art(scaled).to(self._like)
        return self._oracle.logits(images).log_softmax(1)


def art() -> tuple[Any, Any]:
    """ART's attacks and classifiers, loaded on use: it takes seconds."""
    try:
        from art.attacks import evasion
        from art.estimators import classification
    except ImportError as error:
        raise OptionError(
            f"this attack needs the Adversarial Robustness Toolbox, which could not be loaded ({error}); install it: "
            "pip install 'captum-classfilters[attacks]'"
        ) from error
    return evasion, classification


@contextmanager
def seeded(seed: list[int]) -> Iterator[None]:
    """For ART, which draws from numpy's global state, in its data loaders from torch's: both are put back."""
    state = np.random.get_state()
    # a population that is all alike has no deviation: ART divides by it
    with torch.random.fork_rng(devices=[]), np.errstate(all="ignore"):
        np.random.seed(np.random.SeedSequence(seed).generate_state(4))
        try:
            yield
        finally:
            np.random.set_state(state)
