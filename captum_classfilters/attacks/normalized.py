"""Pixels in front of a network that takes normalised images: attacks and their ranges are about pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.core.errors import OptionError


class Normalized(nn.Module):
    """``model((pixels - mean) / std)``: say once what the network expects, and give pixels everywhere.

    An attack's bounds and its epsilon are about pixels. In front of a network that takes normalised images, an attack
    with a bound of 1 cuts off what is bright, and 2/255 is a change of another size in every colour.

    Args:
        model: A network that takes normalised images, kept as ``.model``; a `PathDecoupler` too.
        mean: Of each colour, as in ``torchvision.transforms.Normalize``.
        std: Of each colour, above 0.

    Raises:
        OptionError: Not as many of one as of the other; a ``std`` that is not above 0.

    Example:
        >>> network = Normalized(torch.nn.Identity(), [0.5], [0.25])
        >>> network(torch.tensor([[[[0.0, 1.0]]]])).tolist()
        [[[[-2.0, 2.0]]]]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        values = [torch.as_tensor(value, dtype=torch.float32).flatten() for value in (mean, std)]
        if len(values[0]) != len(values[1]) or not len(values[0]) or not bool((values[1] > 0).all()):
            raise OptionError(f"mean and std must be one number for each colour, std above 0, got {mean} and {std}")
        self.model = model
        # buffers would stand in the state_dict beside the model's
        self.register_buffer("mean", values[0].view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", values[1].view(1, -1, 1, 1), persistent=False)
        like = next(model.parameters(), None)
        if like is not None:
            self.mean, self.std = self.mean.to(like), self.std.to(like)

    def normalize(self, pixels: Tensor) -> Tensor:
        """What the model gets."""
        return (pixels - self.mean) / self.std

    def forward(self, pixels: Tensor, *args: Any) -> Any:
        """``(N, colours, H, W)`` of pixels to what the model gives."""
        return self.model(self.normalize(pixels), *args)
