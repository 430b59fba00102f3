"""What a model returned, read as logits: the one place that knows in which forms models return them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_classfilters.core.errors import HeadError


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned.

    Args:
        output: A tensor; an object with ``.logits``, as Hugging Face models return it; a mapping with ``"logits"``; or
            a tuple whose first entry is the logits, as torchvision's networks with auxiliary outputs return it.

    Returns:
        The tensor of logits, ``(N, C)`` for a classifier.

    Raises:
        HeadError: There is no tensor of logits in it.

    Example:
        >>> import torch
        >>> logits_of({"logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    logits = find_logits(output)
    if logits is None:
        raise HeadError(
            f"expected a model that returns logits: a tensor (N, C), an object or mapping with logits, or a tuple that "
            f"begins with them; got {describe(output)}. Wrap the model in one that returns its logits"
        )
    return logits


def find_logits(output: Any) -> Tensor | None:
    """As `logits_of`; None where there are none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        candidate = output.get("logits")
    elif hasattr(output, "logits"):
        candidate = output.logits
    else:
        candidate = output[0] if isinstance(output, tuple | list) and output else None
    return candidate if isinstance(candidate, Tensor) else None


def describe(output: Any) -> str:
    """What a model returned, in words for an error."""
    if isinstance(output, Tensor):
        return f"{output.dtype} of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with the keys {sorted(map(str, output))[:10]}"
    return type(output).__name__
