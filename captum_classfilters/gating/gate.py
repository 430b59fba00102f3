"""The gate: which channels each class may use, as a table that is trained with the network.

Functions are stateless, one for each formula; `LabelSensitiveGate` holds the table. N samples, C classes, K channels.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters.class_filters import UNKNOWN_LAYER, ClassFilters, names_of
from captum_classfilters.core.check import integer, number, one_of
from captum_classfilters.core.errors import (
    DeviceError,
    IdleChannelWarning,
    LabelError,
    OptionError,
    ShapeError,
    quoted,
)
from captum_classfilters.core.files import checked_tensor, contents, read, text, write
from captum_classfilters.core.labels import check_labels, check_range
from captum_classfilters.core.wide import wide

_KIND, _VERSION = "LabelSensitiveGate", 1
PENALTIES = ("abs", "hinge")


def gated(features: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Each sample's channels times its class's row: the LSG path of the paper, ``features * G[y]``.

    Source: "Training interpretable CNNs towards class-specific filters", section 3.1.

    Args:
        features: ``(N, K)``, or ``(N, K, ...)`` with positions behind.
        labels: ``(N,)`` int64.
        weight: G, ``(C, K)``.

    Returns:
        Shape and dtype of ``features``.
    """
    rows = weight.to(features.dtype).index_select(0, labels)
    learns = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad)
    if features.dim() == 2 and not learns:
        # into the rows just picked: as fast as the multiplication alone, which would fill new memory
        return rows.mul_(features)
    return features * rows.reshape(*rows.shape, *(1,) * (features.dim() - 2))


def lost_label(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log(1 - p_y)``, averaged over the samples: 0 where nothing speaks for the label any more.

    Args:
        logits: ``(N, C)``, or ``(N, 1)``: the logit of class 1 of two.
        labels: ``(N,)`` int64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    own = nn.functional.one_hot(labels, logits.shape[1]).bool()
    return (logits.logsumexp(1) - logits.masked_fill(own, -torch.inf).logsumexp(1)).mean()


def density_penalty(weight: Tensor, density: float, kind: str = "abs") -> Tensor:
    """How far the sum of the gate is from its target ``s = density * C * K``: the second term of eq. 2.

    Args:
        weight: G, ``(C, K)``.
        density: Target mean of G.
        kind: ``"abs"``: ``| ||G||_1 - s |``, as in the paper; ``"hinge"``: ``relu(||G||_1 - s)``, as in its code.

    Returns:
        A scalar; not yet times the paper's ``a``.
    """
    excess = weight.abs().sum() - density * weight.numel()
    return excess.abs() if kind == "abs" else excess.relu()


def project(weight: Tensor, previous: Tensor) -> Tensor:
    """The gate as the constraint of eq. 2 wants it: all of it in [0, 1], the maximum of every column 1.

    Differs: the paper's Algorithm 1 divides by the column's largest magnitude and then clips, so that [.5, -.6] ends
    below 1 and a column of zeros as NaN. Here negatives become 0 first, and a column with nothing above 0 or with a NaN
    or infinity goes back to what it was.

    Args:
        weight: ``(C, K)``, any numbers.
        previous: ``(C, K)``, a gate that keeps the constraint.
    """
    positive = weight.clamp(min=0)
    largest = positive.amax(0)
    alive = torch.isfinite(weight).all(0) & (largest > 0)
    return torch.where(alive, positive / largest, previous)


@dataclass(frozen=True)
class GatePenalty:
    """What keeps a gate sparse: ``sparsity * | ||G||_1 - density * C * K |``, the second term of eq. 2.

    Attributes:
        density: Target mean of the gate: the paper's ``s / (C * K)``. None: 0.2, or for fewer than nine classes
            ``0.1 + 0.9 / C``: a tenth of the channels shared and each other one a single class's.
        sparsity: The paper's ``a``, which it does not state. What matters is its product with the gate's learning rate.
            The default is the smallest of .02, .05, .1, .15, .5 that brings a gate to density .22 by its third epoch:
            see benchmarks/results/09_gates.md.
        kind: ``"abs"`` (paper) or ``"hinge"`` (its code): see `density_penalty`.

    Raises:
        OptionError: ``sparsity`` or ``kind`` is out of range; `density_for` checks the density.
    """

    density: float | None = None
    sparsity: float = 0.02
    kind: str = "abs"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", number(self.sparsity, "sparsity", 0))
        one_of(self.kind, "kind", PENALTIES)

    def density_for(self, num_classes: int) -> float:
        """The density that is meant for so many classes.

        Raises:
            OptionError: No gate can have it: every column's maximum is 1, so it is at least 1 / C.

        Example:
            >>> GatePenalty().density_for(num_classes=4), GatePenalty(0.5).density_for(num_classes=4)
            (0.325, 0.5)
        """
        if self.density is None:
            return max(0.2, 0.1 + 0.9 / num_classes)
        return number(self.density, "density", 1 / num_classes, 1, meaning="for every channel works for some class")


class LabelSensitiveGate(nn.Module):
    """A table ``G`` in ``[0, 1]``, C x K, by whose row of the true label a sample's channels are multiplied.

    Every column's maximum is 1. A new gate is uniform noise over its column's maximum, and stays so: its gradient is
    weak, because a network that is told the label has hardly any loss. So `LabelSensitiveTraining` starts it from what
    the network does (`GateSchedule`), and `from_filters` starts it from any table.

    **The gate reads the true label.** What a gated network scores is leakage, not accuracy; at test time nothing is
    gated.

    Source: "Training interpretable CNNs towards class-specific filters", section 3.2.

    Args:
        num_classes: C.
        num_channels: K.
        generator: Draws the noise; None: torch's own.

    Attributes:
        weight: G, ``(C, K)`` float32.
        counts: ``(C,)`` int64, samples that passed in train mode with gradients; under DDP this process's.
        layer: The head before which it stands, known once it has been trained.

    Raises:
        OptionError: C or K is not a positive integer.

    Example:
        >>> gate = LabelSensitiveGate.fixed(num_classes=2, num_channels=5, exclusive=2)
        >>> gate.weight.tolist()
        [[1.0, 1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0]]
        >>> gate(torch.ones(1, 5), torch.tensor([1])).tolist()
        [[0.0, 0.0, 1.0, 1.0, 1.0]]
    """

    counts: Tensor
    _previous: Tensor

    def __init__(self, num_classes: int, num_channels: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        num_classes, num_channels = integer(num_classes, "num_classes", 1), integer(num_channels, "num_channels", 1)
        noise = torch.rand(num_classes, num_channels, generator=generator)
        weight = project(noise, torch.ones_like(noise))
        self.weight = nn.Parameter(weight)
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        # what a column that dies in a step goes back to
        self.register_buffer("_previous", weight.clone(), persistent=False)
        self.layer = UNKNOWN_LAYER
        # until it is started, trained, set by hand or loaded
        self.is_noise = True

    @classmethod
    def from_filters(cls, filters: ClassFilters) -> "LabelSensitiveGate":
        """A gate that starts as a table: its positive scores, each channel's over the largest of all classes.

        A channel that no class has a positive score for is open to all classes, and a warning counts such channels.

        Args:
            filters: From any method that scores the channels of the head, such as
                ``InfluentialFeatures(model).attribute(loader, selector="contribution")``.

        Raises:
            OptionError: A class had no samples, so that nothing is known of its channels.

        Example:
            >>> table = torch.tensor([[2.0, -1.0], [1.0, 3.0]], dtype=torch.float64)
            >>> filters = ClassFilters(table, table, torch.tensor([5, 5]), "contribution", "fc", ("cat", "dog"))
            >>> LabelSensitiveGate.from_filters(filters).weight.tolist()
            [[1.0, 0.0], [0.5, 1.0]]
        """
        if not isinstance(filters, ClassFilters):
            raise OptionError(f"expected ClassFilters, as attribute() returns them, got {type(filters).__name__}")
        if not bool(filters.seen.all()):
            unseen = [name for name, seen in zip(filters.class_names, filters.seen.tolist(), strict=True) if not seen]
            raise OptionError(
                f"no samples of class {quoted(unseen)}, so nothing is known of its channels; make the table from "
                "images of all classes"
            )
        gate = cls(filters.num_classes, filters.num_channels, generator=torch.Generator())
        gate.layer = filters.layer
        # what is known of each class comes from so many samples
        gate.counts.copy_(filters.counts)
        return gate.start_(filters.scores)

    def start_(self, table: Tensor) -> "LabelSensitiveGate":
        """Begin anew from a table ``(C, K)`` of any sign, in place: see `from_filters`."""
        table = table.to(self.weight)
        idle = int((table.amax(0) <= 0).sum())
        if idle:
            warnings.warn(
                f"{idle} of {self.num_channels} channels have no positive score for any class; the gate leaves them "
                "open to all classes",
                IdleChannelWarning,
                stacklevel=2,
            )
        with torch.no_grad():
            self.weight.copy_(project(table, torch.ones_like(table)))
            self._previous.copy_(self.weight)
        self.is_noise = False
        return self

    @classmethod
    def fixed(cls, num_classes: int, num_channels: int, exclusive: int = 6) -> "LabelSensitiveGate":
        """A gate set by hand that is not trained: ``exclusive`` channels for each class, the rest shared by all.

        Source: section 4.4 and appendix C (C = 10, K = 64: 6 for each class and 4 shared).

        Raises:
            OptionError: There are fewer than ``C * exclusive`` channels.
        """
        gate = cls(num_classes, num_channels, generator=torch.Generator())
        exclusive = integer(exclusive, "exclusive")
        if num_classes * exclusive > num_channels:
            raise OptionError(
                f"{num_classes} classes with {exclusive} channels of their own need {num_classes * exclusive}, but "
                f"there are {num_channels}; lower exclusive to at most {num_channels // num_classes}"
            )
        private = torch.eye(num_classes).repeat_interleave(exclusive, dim=1)
        return gate._set(torch.cat([private, torch.ones(num_classes, num_channels - private.shape[1])], dim=1))

    def _set(self, weight: Tensor) -> "LabelSensitiveGate":
        """Make this a gate that is not trained."""
        self.weight = nn.Parameter(weight.to(self.weight), requires_grad=False)
        self._previous.copy_(weight)
        self.is_noise = False
        # set by hand: its rows do not depend on samples, so no class counts as unseen
        self.counts.clamp_(min=1)
        return self

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.weight.shape[0])

    @property
    def num_channels(self) -> int:
        """K."""
        return int(self.weight.shape[1])

    @property
    def density(self) -> float:
        """Mean of G: the ``L1 norm`` of the paper's table 1."""
        return float(wide(self.weight.detach()).mean())

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """``features`` times each sample's row of G; without ``labels`` the plain path, ``features`` themselves.

        Args:
            features: ``(N, K)`` or ``(N, K, H, W)``: after pooling or before, the same where pooling is linear.
            labels: ``(N,)`` integers, on the gate's device.

        Returns:
            As ``features``. Where ``G[y]`` is 1 it is bit for bit the same.

        Raises:
            ShapeError: The features do not have K channels.
            LabelError: The labels are not N integers in ``[0, C)``.
            DeviceError: Features or labels are on another device.
        """
        if labels is None:
            return features
        if features.dim() < 2 or features.shape[1] != self.num_channels:
            raise ShapeError(
                f"features must have shape (N, {self.num_channels}) or (N, {self.num_channels}, H, W), got "
                f"{tuple(features.shape)}; a gate fits one head: LabelSensitiveGate(num_classes, num_channels=K)"
            )
        labels = self.check_labels(labels, len(features))
        if features.device != self.weight.device:
            raise DeviceError(
                f"features are on {features.device}, the gate on {self.weight.device}; "
                f"gate.to({str(features.device)!r})"
            )
        if self.training and torch.is_grad_enabled():
            self.counts += torch.bincount(labels, minlength=self.num_classes)
        return gated(features, labels, self.weight)

    def check_labels(self, labels: Any, size: int) -> Tensor:
        """``labels`` as ``(N,)`` int64, or an error that says what is wrong with them."""
        if isinstance(labels, Tensor) and labels.device != self.weight.device:
            raise DeviceError(
                f"labels are on {labels.device}, the gate on {self.weight.device}; "
                f"labels.to({str(self.weight.device)!r})"
            )
        if labels is None:
            raise LabelError("the gate path needs the true labels, got None; pass labels of shape (N,)")
        checked = check_labels(labels, size, None)
        check_range(checked, self.num_classes, None)
        return checked

    def penalty(self, density: float | None = None, kind: str = "abs") -> Tensor:
        """`density_penalty` of this gate; arguments as `GatePenalty`'s.

        Raises:
            OptionError: ``kind`` is unknown, or ``density`` is below ``1 / C`` or above 1.
        """
        options = GatePenalty(density, kind=kind)
        return density_penalty(self.weight, options.density_for(self.num_classes), options.kind)

    @torch.no_grad()
    def project_(self) -> "LabelSensitiveGate":
        """Bring the gate back to its constraint, in place, as after every step on it: see `project`."""
        self.weight.copy_(project(self.weight, self._previous))
        self._previous.copy_(self.weight)
        return self

    def exclusive(self, threshold: float = 0.5) -> Tensor:
        """``(C, K)`` bool: channels that are one class's own, the only one with ``G >= threshold`` there.

        Raises:
            OptionError: The threshold is not in (0, 1].
        """
        if not 0 < threshold <= 1:
            raise OptionError(f"threshold must lie in (0, 1], got {threshold!r}")
        related = self.weight.detach() >= threshold
        return related & (related.sum(0) == 1)

    def tighten(self, threshold: float = 0.5) -> "LabelSensitiveGate":
        """A gate of zeros and ones that is not trained: a class's own channels are its own, all others everybody's.

        Source: section 3.3. This gate stays as it is.

        Raises:
            OptionError: The threshold is not in (0, 1].
        """
        exclusive = self.exclusive(threshold)
        tight = LabelSensitiveGate(self.num_classes, self.num_channels, generator=torch.Generator()).to(self.weight)
        tight.layer = self.layer
        tight.counts.copy_(self.counts)
        return tight._set(torch.where(exclusive.any(0), exclusive, True).to(self.weight))

    def parameter_group(self, lr: float) -> dict[str, Any]:
        """Its own group for SGD or Adam: no momentum, which would fight the projection, and no weight decay."""
        still = {"momentum": 0.0, "nesterov": False, "betas": (0.0, 0.999), "weight_decay": 0.0}
        return {"params": [self.weight], "lr": lr, **still}

    def class_filters(self, class_names: Sequence[str] | None = None) -> ClassFilters:
        """The gate as the answer every method gives: ``scores`` and ``mass`` are G, ``counts`` what it was trained on.

        It cannot be merged with the gate of another training.

        Args:
            class_names: C names; otherwise numbers.

        Raises:
            OptionError: Names are repeated, or not C of them.
        """
        names = names_of(class_names, self.num_classes)
        table = self.weight.detach().cpu().double()
        meta = {"density": self.density, "trained": self.weight.requires_grad}
        counts = self.counts.cpu().clone()
        return ClassFilters(table, table.clone(), counts, "gate", self.layer, names, meta, merge_rule="none")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gate to a safetensors file; whole or not at all."""
        about = {"layer": self.layer, "trained": self.weight.requires_grad}
        write(path, self.state_dict(), kind=_KIND, version=_VERSION, meta=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LabelSensitiveGate":
        """Read what `save` wrote; runs no code of the file.

        Raises:
            FileNotFoundError: No such file.
            FileFormatError: Broken, truncated, foreign, or not a gate.
        """
        tensors, about = read(path, kind=_KIND, version=_VERSION, tensors=("weight", "counts"))
        with contents(path, "a whole gate"):
            classes, channels = tensors["weight"].shape
            checked_tensor(tensors, "weight", None, classes, channels)
            checked_tensor(tensors, "counts", torch.int64, classes)
            layer, trained = text(about["layer"], "layer"), about["trained"]
            if not isinstance(trained, bool):
                raise TypeError("trained must be true or false")
            gate = cls(classes, channels, generator=torch.Generator())
            gate.load_state_dict(tensors)
            gate.layer = layer
            gate.weight.requires_grad_(trained)
            gate.is_noise = False
        return gate

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.shape != self.weight.shape:
            raise ShapeError(
                f"this gate is {self.num_classes} classes x {self.num_channels} channels, the checkpoint's "
                f"{' x '.join(map(str, weight.shape))}; make LabelSensitiveGate(*state['weight'].shape) for it"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        # a training would put its start in the place of noise
        self.is_noise = self.is_noise and weight is None
        with torch.no_grad():
            self._previous.copy_(project(self.weight, torch.ones_like(self.weight)))

    def extra_repr(self) -> str:
        """C, K and density."""
        kind = "" if self.weight.requires_grad else ", not trained"
        return f"{self.num_classes} classes x {self.num_channels} channels, density {self.density:.3f}{kind}"
