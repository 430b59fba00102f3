"""What an attack may ask of a network, and what it may be given: images in range, logits out.

N images, C classes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.errors import OptionError, ShapeError

# How far outside the bounds rounding may leave a pixel, at least, for images in [0, 1]
TOLERANCE = 1e-6


class Oracle:
    """A network, of which only the logits are seen; images go to its device and dtype, it stays where it is."""

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
        """``(N, C)`` float64, on the device of ``images``.

        Raises:
            ShapeError: The network gave something else.
        """
        parts = [self._some(part) for part in torch.split(images, self._batch_size)]
        return torch.cat(parts).to(images.device)

    def _some(self, images: Tensor) -> Tensor:
        output = self._forward(self.place(images))
        if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(images):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ShapeError(
                f"the model must give logits of shape ({len(images)}, C), got {got}; wrap it in a module that does"
            )
        return output.detach().double()


def in_top(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """``(N,)`` bool: is the label among the k largest logits; of equal ones the first counts, as in ``argmax``."""
    own = logits.gather(1, labels[:, None])
    first = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    ahead: Tensor = ((logits > own) | ((logits == own) & first)).sum(1)
    return ahead < k


def check_bounds(lower_bound: float, upper_bound: float) -> None:
    """Refuse bounds that leave no room."""
    if not lower_bound < upper_bound:
        raise OptionError(
            f"lower_bound must be smaller than upper_bound, got {lower_bound} and {upper_bound}; give the range of "
            "the images"
        )


_PIXELS = "pass lower_bound= and upper_bound=, or images before normalisation with a model that normalises them itself"


def check_images(
    images: Any, lower_bound: float, upper_bound: float, what: str = "images", remedy: str = _PIXELS
) -> None:
    """Refuse what is not ``(N, colours, H, W)`` of floats in the bounds."""
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        got = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"{what} must be floats of shape (N, colours, H, W), got {got}; convert bytes by images / 255")
    if not images.numel():
        return
    low, high = (float(bound) for bound in images.detach().aminmax())
    # of the bounds' own size: half precision rounds 0.3 to 0.3008, float32 151.061 by 1e-5
    tolerance = max(TOLERANCE, torch.finfo(images.dtype).eps) * max(abs(lower_bound), abs(upper_bound), 1)
    # the negation: NaN is refused as well
    if not (low >= lower_bound - tolerance and high <= upper_bound + tolerance):
        raise OptionError(
            f"{what} must lie in [{lower_bound}, {upper_bound}], got values from {low:.6g} to {high:.6g}; {remedy}"
        )


def check_count(value: Any, name: str, least: int = 1) -> None:
    """Refuse what is not a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}, got {value!r}")
