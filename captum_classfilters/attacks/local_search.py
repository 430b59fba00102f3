"""The local-search attack of Narodytska & Kasiviswanathan 2016, which changes a few pixels in each round.

N images, b colours, n pixels of an image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from captum.robust import Perturbation
from torch import Tensor
from torch.nn import functional as F

from captum_classfilters.attacks.oracle import Bounds, Oracle, check_bounds, check_images, in_top
from captum_classfilters.core.check import integer, number
from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.labels import check_labels, check_range
from captum_classfilters.core.wide import portions

# The share of an image's pixels among which the search starts
_START = 0.1


def pert(values: Tensor, p: float) -> Tensor:
    """Equation 1: ``p sign(I)``, for images centred at 0. A pixel of exactly 0 stays."""
    return p * values.sign()


def cyclic(values: Tensor, r: float) -> Tensor:
    """Algorithm 2: ``r I``; values that leave [-1/2, 1/2] enter again at the other end."""
    scaled = r * values
    return torch.where(scaled < -0.5, scaled + 1, torch.where(scaled > 0.5, scaled - 1, scaled))


@dataclass(frozen=True)
class SearchSettings:
    """What one round of `LocalSearch` does to an image; the letters are those of the paper.

    Attributes:
        pert: p, by which a pixel is judged. The paper fixes no value and tries 1 to 100 in section 4; Foolbox has 10.
        cyclic: r, by which a pixel is changed, in [0, 2].
        radius: d, half the side of the square around a changed pixel.
        pixels: t, how many pixels are changed in a round.
        rest: For how many rounds a changed pixel is left alone.

    Raises:
        OptionError: A setting is out of range.
    """

    pert: float = 5.0
    cyclic: float = 1.5
    radius: int = 5
    pixels: int = 5
    rest: int = 30

    def __post_init__(self) -> None:
        integer(self.pixels, "pixels", 1)
        integer(self.radius, "radius")
        integer(self.rest, "rest")
        number(self.cyclic, "cyclic", 0, 2, meaning="outside of which wrapping once leaves the range")
        number(self.pert, "pert", 0, open_ends=True)


class LocalSearch(Perturbation):
    """Change a few important pixels in each round, and search near them in the next.

    In a round each candidate pixel alone is set to ``p sign(I)``, which may lie far outside the image's range. The
    pixels for which the true class has the lowest probability are then set to ``r I``, wrapped around into the range.
    The pixels around them are the candidates of the next round. The search of an image ends when its class is no longer
    among the first k.

    Source: Narodytska & Kasiviswanathan 2016 (arXiv 1612.06299), section 5, algorithms 2 and 3, and section 6,
    "Implementing Algorithm LocSearchAdv". Where the paper is unclear or differs:

    - It sorts "by descending order of score" and takes the first; its text means the lowest probabilities.
    - Algorithm 3 puts the next candidates around the pixels of the round before; the text says those of this round.
    - The authors raise p when the chosen pixels' mean probability is close to 1 and lower it below 0.3, but do not say
      by how much, nor where it starts. Here p is constant.
    - As in the paper, p keeps the sign: a black pixel is judged by a blacker one, though `cyclic` makes it bright.
    - As in the paper, a changed pixel is not changed again for 30 rounds. The paper does not say what happens when
      that leaves no candidate; here all pixels around are candidates again.
    - Probabilities are compared as logarithms in float64, so that their order is kept where float32 rounds to 1.

    Args:
        forward_func: The network, images to logits ``(N, C)``; borrowed in eval mode, given back as it was.
        bounds: Smallest and largest value of a pixel. The paper's images lie in [-1/2, 1/2]: they are shifted inside.
        settings: What a round does.
        rounds: R, how many rounds at most.
        candidates: At most this many pixels are tried for each image and round, drawn at random; None, as in the
            paper: all, up to ``pixels (2 radius + 1)**2``. Foolbox draws 128.
        k: The attack succeeds when the true class is not among the first k.
        batch_size: Images in a forward pass.
        generator: Generator of all random draws, on the CPU. None: a generator of seed 0 in each call.

    Raises:
        OptionError: An option is out of range.

    Example:
        >>> corner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(100, 2))
        >>> _ = corner[1].weight.data.zero_()
        >>> corner[1].weight.data[1, 0] = -1.0  # class 1 is a dark first pixel
        >>> _ = corner[1].bias.data.copy_(torch.tensor([-0.25, 0.0]))
        >>> attack = LocalSearch(corner, rounds=20)
        >>> changed = attack(torch.full((1, 1, 10, 10), 0.3), torch.tensor([0]))
        >>> round(float(changed[0, 0, 0, 0]), 6)
        0.2
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        bounds: Bounds = (0.0, 1.0),
        *,
        settings: SearchSettings = SearchSettings(),
        rounds: int = 150,
        candidates: int | None = None,
        k: int = 1,
        batch_size: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(settings, SearchSettings):
            raise OptionError(f"settings must be SearchSettings(...), got {type(settings).__name__}")
        self.forward_func, self.bounds, self.settings = forward_func, check_bounds(bounds), settings
        self.candidates = None if candidates is None else integer(candidates, "candidates", 1)
        self.rounds, self.k = integer(rounds, "rounds", 1), integer(k, "k", 1)
        self.batch_size, self.generator = integer(batch_size, "batch_size", 1), generator

    def perturb(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Attack each image.

        Args:
            inputs: ``(N, colours, H, W)``, floating, in the bounds.
            labels: True classes, ``(N,)``.

        Returns:
            Same shape, dtype and device. An image whose class was not among the first k at the start, or still is at
            the end, comes back unchanged; every image that differs fools the network.

        Raises:
            ShapeError: Images do not have that shape, or the network does not give logits ``(N, C)``.
            OptionError: A pixel is out of range, or k is not smaller than C.
            LabelError: Labels have another shape, or one is out of range.
        """
        check_images(inputs, self.bounds)
        labels = check_labels(labels, len(inputs)).to(inputs.device)
        images = inputs.detach().clone()
        if not len(images):
            return images
        with Oracle(self.forward_func, self.batch_size).open() as oracle:
            logits = oracle.logits(images)
            classes = logits.shape[1]
            check_range(labels, classes)
            if self.k >= classes:
                raise OptionError(f"k must be smaller than the number of classes, {classes}; got {self.k}")
            _Search(self, oracle, images, labels).run(in_top(logits, labels, self.k))
        return images


class _Search:
    """The search in all images at once. Finished images are written back and leave."""

    def __init__(self, attack: LocalSearch, oracle: Oracle, images: Tensor, labels: Tensor) -> None:
        self._attack, self._settings, self._oracle = attack, attack.settings, oracle
        self._images, self._labels = images, labels
        self._generator = attack.generator or torch.Generator().manual_seed(0)
        self._span = attack.bounds[1] - attack.bounds[0]

    def run(self, right: Tensor) -> None:
        """Search each image that is classified ``right``; write images that fool the network into ``images``."""
        self._active = torch.arange(len(self._images), device=self._images.device)
        everywhere = torch.ones_like(self._images[:, 0], dtype=torch.bool).flatten(1)
        self._candidates = self._drawn(everywhere, max(1, int(_START * everywhere.shape[1])))
        # the first round in which a pixel may be changed again
        self._awake = torch.zeros(self._candidates.shape, dtype=torch.int64, device=self._images.device)
        self._work = self._images.flatten(2).clone()
        self._keep(right)
        for index in range(self._attack.rounds):
            if not len(self._active):
                return
            self._change(index)
            logits = self._oracle.logits(self._unflatten(self._work))
            right = in_top(logits, self._labels, self._attack.k)
            self._images[self._active[~right]] = self._unflatten(self._work[~right])
            self._keep(right)

    def _keep(self, rows: Tensor) -> None:
        self._active, self._work, self._labels = self._active[rows], self._work[rows], self._labels[rows]
        self._candidates, self._awake = self._candidates[rows], self._awake[rows]

    def _drawn(self, mask: Tensor, count: int) -> Tensor:
        """``count`` random true entries of each row; all if there are fewer."""
        # drawn for all images, so that the result of one does not depend on which others are still searched
        chance = torch.rand(len(self._images), mask.shape[1], generator=self._generator, dtype=torch.float64)
        chance = chance.to(mask.device)[self._active].masked_fill(~mask, -1)
        first = chance.topk(min(count, mask.shape[1])).indices
        return torch.zeros_like(mask).scatter_(1, first, True) & mask

    def _change(self, index: int) -> None:
        """Run one round: change the best pixels and set the next candidates."""
        allowed = self._candidates & (self._awake <= index)
        allowed = torch.where(allowed.any(1, keepdim=True), allowed, self._candidates)
        if self._attack.candidates is not None:
            allowed = self._drawn(allowed, self._attack.candidates)
        scores, order = self._scores(allowed).sort(dim=1, stable=True)
        is_candidate = scores[:, : self._settings.pixels] < torch.inf
        rows, column = is_candidate.nonzero(as_tuple=True)
        places = order[rows, column]
        changed = self._back(cyclic(self._centred(self._work[rows, :, places]), self._settings.cyclic))
        self._work[rows, :, places] = changed.clamp(*self._attack.bounds)
        self._awake[rows, places] = index + 1 + self._settings.rest
        self._candidates = self._around(rows, places)

    def _scores(self, allowed: Tensor) -> Tensor:
        """Log-probability of the true class when one pixel alone is set by `pert`; infinite for pixels not allowed."""
        scores = torch.full(allowed.shape, torch.inf, dtype=torch.float64, device=allowed.device)
        owners, places = allowed.nonzero(as_tuple=True)
        size = self._attack.batch_size
        for rows, columns in portions(size, owners, places):
            trial, index = self._work[rows], torch.arange(len(rows), device=rows.device)
            trial[index, :, columns] = self._back(pert(self._centred(trial[index, :, columns]), self._settings.pert))
            logits = self._oracle.logits(self._unflatten(trial))
            scores[rows, columns] = logits.log_softmax(1).gather(1, self._labels[rows, None])[:, 0]
        return scores

    def _around(self, rows: Tensor, places: Tensor) -> Tensor:
        """All pixels in the squares around these places."""
        centres = torch.zeros(self._candidates.shape, device=rows.device)
        centres[rows, places] = 1
        height, width = self._images.shape[2:]
        side = 2 * self._settings.radius + 1
        squares = F.max_pool2d(centres.view(-1, 1, height, width), side, stride=1, padding=self._settings.radius)
        return squares.flatten(1) > 0

    def _unflatten(self, flat: Tensor) -> Tensor:
        return flat.view(-1, *self._images.shape[1:])

    def _centred(self, values: Tensor) -> Tensor:
        return (values.double() - self._attack.bounds[0]) / self._span - 0.5

    def _back(self, values: Tensor) -> Tensor:
        return ((values + 0.5) * self._span + self._attack.bounds[0]).to(self._work.dtype)
