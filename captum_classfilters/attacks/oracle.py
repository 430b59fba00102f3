"""The network as an attack sees it: images in range go in, logits come out.

N images, C classes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.core.batches import image_errors
from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.errors import OptionError, ShapeError
from captum_classfilters.core.outputs import LogitReader, describe, find_logits, two_logits
from captum_classfilters.core.wide import home, portions, wide

# The smallest and the largest value of a pixel
Bounds = tuple[float, float]

# Smallest tolerance for pixels outside the bounds, which rounding causes, for images in [0, 1]
TOLERANCE = 1e-6


class Oracle:
    """A network of which an attack sees only the logits. Images are moved to the network's device and dtype."""

    def __init__(self, forward_func: Callable[..., Any], batch_size: int = 512) -> None:
        self._forward, self._batch_size = unwrap(forward_func), batch_size
        if not callable(self._forward):
            raise OptionError(f"the model must be an nn.Module or a function, got {type(forward_func).__name__}")
        self.model = self._forward if isinstance(self._forward, nn.Module) else None
        parameters = self.model.parameters() if self.model is not None else iter(())
        self._like = next((p.detach() for p in parameters if p.is_floating_point()), None)

    @contextmanager
    def open(self, *, grad: bool = False) -> Iterator["Oracle"]:
        """Borrow the network: eval mode, no gradients unless ``grad``; given back as it was."""
        with borrowed(self.model, grad=grad):
            yield self

    def place(self, images: Tensor) -> Tensor:
        """The images on the device of the network, in its dtype."""
        return images if self._like is None else images.to(self._like)

    def logits(self, images: Tensor) -> Tensor:
        """``(N, C)`` float64, on the device of ``images``; on the CPU where that has no float64.

        Raises:
            ShapeError: The network gave no such logits.
        """
        parts = [wide(self.forward(part).detach()) for (part,) in portions(self._batch_size, images)]
        return torch.cat(parts).to(home(images.device))

    def forward(self, images: Tensor) -> Tensor:
        """One forward pass: ``(N, C)`` on the network's device and in its dtype, with gradients if they are enabled."""
        with image_errors(images, self.model), LogitReader() as reader:
            output = self._forward(self.place(images))
            logits = find_logits(output)
            logits = None if logits is None else reader.logits(output)
        if logits is None or logits.dim() != 2 or len(logits) != len(images):
            got = describe(output) if logits is None else tuple(logits.shape)
            raise ShapeError(
                f"the model must give logits of shape ({len(images)}, C), got {got}; wrap it in a module that does"
            )
        return two_logits(logits)


class Normalized(nn.Module):
    """``model((pixels - mean) / std)``: a network that takes pixels and normalises them itself.

    An attack's bounds and its epsilon are in units of pixels. On normalised images a bound of 1 would cut off bright
    pixels, and a change of 2/255 would have another size in every colour.

    Args:
        model: A network that takes normalised images, kept as ``.model``; a `PathDecoupler` too.
        mean: One number for each colour, as in ``torchvision.transforms.Normalize``.
        std: One number for each colour, above 0.

    Raises:
        OptionError: ``mean`` and ``std`` are not equally long, or a ``std`` is not above 0.

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
        # not persistent, so that the state_dict has only the model's entries
        self.register_buffer("mean", values[0].view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", values[1].view(1, -1, 1, 1), persistent=False)
        like = next(model.parameters(), None)
        if like is not None:
            self.mean, self.std = self.mean.to(like), self.std.to(like)

    def normalize(self, pixels: Tensor) -> Tensor:
        """The input of the model, ``(pixels - mean) / std``."""
        return (pixels - self.mean) / self.std

    def forward(self, pixels: Tensor, *args: Any) -> Any:
        """The model's output for pixels ``(N, colours, H, W)``."""
        return self.model(self.normalize(pixels), *args)


def in_top(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """``(N,)`` bool: is the label among the k largest logits? Of equal logits the first wins, as in ``argmax``."""
    of_label = logits.gather(1, labels[:, None])
    first = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    ahead: Tensor = ((logits > of_label) | ((logits == of_label) & first)).sum(1)
    return ahead < k


def check_bounds(bounds: Any) -> Bounds:
    """The bounds as two floats; refuse anything but a pair whose first is below its second."""
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise OptionError(
            f"bounds must be the smallest and the largest value of a pixel, as (0.0, 1.0), got {bounds!r}"
        ) from None
    # the negation: NaN is refused as well
    if not low < high:
        raise OptionError(
            f"bounds must be (smallest, largest) value of a pixel, the first below the second, got {bounds!r}; give "
            "the range of the images"
        )
    return low, high


_PIXELS = "pass bounds=, or images before normalisation with a model that normalises them itself"


def check_images(images: Any, bounds: Bounds, what: str = "images", remedy: str = _PIXELS) -> None:
    """Refuse images that are not floats ``(N, colours, H, W)`` in the bounds."""
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        got = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"{what} must be floats of shape (N, colours, H, W), got {got}; convert bytes by images / 255")
    if not images.numel():
        return
    low, high = (float(bound) for bound in images.detach().aminmax())
    # relative to the bounds, because half precision rounds 0.3 to 0.3008, and float32 moves 151.061 by 1e-5
    tolerance = max(TOLERANCE, torch.finfo(images.dtype).eps) * max(abs(bounds[0]), abs(bounds[1]), 1)
    # the negation: NaN is refused as well
    if not (low >= bounds[0] - tolerance and high <= bounds[1] + tolerance):
        raise OptionError(
            f"{what} must lie in [{bounds[0]}, {bounds[1]}], got values from {low:.6g} to {high:.6g}; {remedy}"
        )


def one_input(inputs: tuple[Any, ...], place: int) -> Any:
    """The only input of a batch of a loader; refuse several."""
    if len(inputs) > 1:
        raise ShapeError(f"batch {place} has {len(inputs)} inputs, expected 1, as an attack changes one tensor")
    return inputs[0]
