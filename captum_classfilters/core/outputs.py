"""What a model returned, read as logits: the one place that knows in which forms models return them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from captum_classfilters.core.borrow import unwrap
from captum_classfilters.core.errors import HeadError, OptionError


class WithOutput(nn.Module):
    """A network whose logits are what a function finds in its output; stands for the network in every call.

    Tensors, objects with ``.logits``, mappings with ``"logits"`` and tuples that begin with them are read without it.

    Args:
        model: The network, kept as ``.model``: its layers have ``model.`` before their names.
        output: Takes what the network returns, gives the logits ``(N, C)``. None: as usual; for Captum's own
            attributions, which read tensors alone.

    Raises:
        OptionError: ``model`` is no module, or ``output`` no function.

    Example:
        >>> import torch
        >>> class Scores(torch.nn.Linear):
        ...     def forward(self, inputs):
        ...         return {"scores": super().forward(inputs)}
        >>> WithOutput(Scores(4, 3), output=lambda result: result["scores"])(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, model: nn.Module, output: Callable[[Any], Tensor] | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise OptionError(f"the model must be an nn.Module, got {type(model).__name__}")
        self.model, self.output = model, check_output(output)
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits."""
        return read_by(self.output, self.model(*args, **kwargs))


def innermost(model: Any) -> Any:
    """The network itself: behind ``torch.compile``, DataParallel, DistributedDataParallel and `WithOutput`."""
    model = unwrap(model)
    while isinstance(model, WithOutput):
        model = unwrap(model.model)
    return model


def gives_many_labels(model: Any) -> bool:
    """Does the config of a Hugging Face model say that it gives many labels?"""
    return getattr(getattr(innermost(model), "config", None), "problem_type", None) == "multi_label_classification"


def check_output(output: Any) -> Callable[[Any], Tensor] | None:
    """Refuse what is no function of a model's output."""
    if output is not None and not callable(output):
        raise OptionError(f"output must be a function of what the model returns, got {type(output).__name__}")
    return output  # type: ignore[no-any-return]


def read_by(output: Callable[[Any], Tensor] | None, result: Any) -> Tensor:
    """The logits that ``output`` finds in what a model returned; None: as `logits_of`."""
    if output is None:
        return logits_of(result)
    logits = output(result)
    if not isinstance(logits, Tensor):
        raise HeadError(f"output= must give the tensor of logits (N, C), it gave {describe(logits)}")
    return logits


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned.

    Args:
        output: A tensor, ``(N,)`` of one logit too; an object with ``.logits``, as Hugging Face models return it; a
            mapping with ``"logits"``; or a tuple whose first entry is the logits, as torchvision's networks with
            auxiliary outputs return it.

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
            "expected a model that returns logits: a tensor (N, C), an object or mapping with logits, or a tuple that "
            f"begins with them; got {describe(output)}. For another form pass WithOutput(model, output=...) in "
            "the place of the model, with a function that takes what it returns and gives the logits"
        )
    return logits


def two_logits(logits: Tensor) -> Tensor:
    """One logit for each sample, ``(N, 1)``, as those of the two classes, ``(N, 2)``: its negative, and itself.

    Logits of several classes stay as they are.
    """
    return torch.cat([-logits, logits], 1) if logits.dim() == 2 and logits.shape[1] == 1 else logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy in float32 or wider; of one logit the binary one.

    Args:
        logits: ``(N, C)``, or ``(N, 1)``: the logit of class 1.
        labels: ``(N,)`` int64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.dim() == 2 and logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


class LogitReader(TorchFunctionMode):
    """Sees through a sigmoid or softmax at the end of a network: ``with LogitReader() as reader``, around a forward.

    Losses and decisions are of logits; of probabilities they would be wrong without a word.

    Example:
        >>> import torch
        >>> with LogitReader() as reader:
        ...     output = torch.tensor([[2.0], [-3.0]]).sigmoid().squeeze(1)
        >>> reader.class_logits(output).argmax(1).tolist()
        [1, 0]
    """

    _last: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what a sigmoid or softmax was given."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("sigmoid", "softmax") and args and isinstance(args[0], Tensor):
            self._last = args[0], result
        return result

    def logits(self, output: Any) -> Tensor:
        """As `logits_of`; where a sigmoid or softmax made them, what it was given."""
        logits, last = logits_of(output), self._last
        self._last = None
        if last is None or last[1].numel() != logits.numel():
            return logits
        before, behind = (tensor.reshape(logits.shape) for tensor in last)
        return before if torch.equal(behind.to(logits.dtype), logits) else logits

    def class_logits(self, output: Any) -> Tensor:
        """`logits` with one for each class: one logit is that of class 1, and class 0 has its negative."""
        return two_logits(self.logits(output))


def find_logits(output: Any) -> Tensor | None:
    """As `logits_of`; None where there are none."""
    if isinstance(output, Tensor):
        return output.unsqueeze(1) if output.dim() == 1 and output.is_floating_point() else output
    if isinstance(output, Mapping):
        candidate = output.get("logits")
    elif hasattr(output, "logits"):
        candidate = output.logits
    else:
        candidate = output[0] if isinstance(output, tuple | list) and output else None
    return find_logits(candidate) if isinstance(candidate, Tensor) else None


def describe(output: Any) -> str:
    """What a model returned, in words for an error."""
    if isinstance(output, Tensor):
        return f"{output.dtype} of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with the keys {sorted(map(str, output))[:10]}"
    return type(output).__name__
