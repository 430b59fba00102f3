"""The random control of a table: how many draws, and from which seed.

A frame that has a control has a column ``control``: True in the rows that chance made, False in the others. Both have
the same value columns, so that one line of pandas sets them side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classfilters.core.check import integer


@dataclass(frozen=True)
class Control:
    """The random control of a table: as many channels (or rankings, or gates) drawn at random.

    Attributes:
        draws: How many are drawn, at least 5: fewer say too little of what chance does.
        seed: Seed of the random draws.

    Raises:
        OptionError: Fewer than 5 draws, or a seed that is not an integer.

    Example:
        >>> Control(draws=20).seed
        0
    """

    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        draws = integer(self.draws, "draws", 5, 10_000, meaning="enough to say what chance does")
        object.__setattr__(self, "draws", draws)
        object.__setattr__(self, "seed", integer(self.seed, "seed"))

    def generator(self) -> torch.Generator:
        """A fresh generator on the CPU: the draws are the same on every device."""
        return torch.Generator().manual_seed(self.seed)

    def rankings(self, shape: Sequence[int]) -> list[Tensor]:
        """Random rankings of the K channels of each class, ``draws`` tensors of shape ``(C, K)``, int64."""
        generator = self.generator()
        return [torch.rand(tuple(shape), generator=generator).argsort(1) for _ in range(self.draws)]


def random_masks(shape: Sequence[int], k: int, draws: int, generator: torch.Generator) -> list[Tensor]:
    """k random channels of each class, ``draws`` tensors of shape ``(C, K)``, bool."""
    masks = []
    for _ in range(draws):
        chosen = torch.rand(tuple(shape), generator=generator).argsort(1)[:, :k]
        masks.append(torch.zeros(tuple(shape), dtype=torch.bool).scatter_(1, chosen, True))
    return masks
