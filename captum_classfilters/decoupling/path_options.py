"""What a decoupler's training minimises: `DecouplingOptions`, with the weights of eq. 12 and what makes them work.

L gated layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_classfilters.core.check import number, one_of
from captum_classfilters.decoupling.controller import DIRECTIONS, DecouplingLoss

BUDGETS = ("network", "layer")


@dataclass(frozen=True)
class DecouplingOptions:
    """How the parts of `PathDecoupler.loss` are weighed.

    The defaults lose less accuracy than the paper's eq. 12, which is `paper`. They differ from it in four ways.
    The information loss is a mean over the layers in which late ones count most: eq. 9 summed over 17 layers is twenty
    times the cross-entropy, and makes early layers speak of the class. The divergence is a mean over the layers. One
    budget holds for the whole network instead of the same rate in each layer. And the network learns from the logits
    of the one that it was, where these are given as ``teacher``.

    Source: "Interpretable neural network decoupling", section 3.2, eq. 12; Hinton et al., "Distilling the knowledge in
    a neural network", 2015, for distillation.

    Attributes:
        information: Weight of the information loss: lambda_m. In our trials a small one left the gates the same for
            every image.
        divergence: Weight of the divergence: lambda_k.
        sparsity: Weight of the budget: lambda_s, for each gate that is open beyond it or closed below it.
        target_rate: R in [0, 1], the share of gates that are to be open; 0: as few as the other losses let it become.
        depth: Layer l of L counts in the information loss as ``(l / L) ** depth``, over the sum of all. None: all
            layers count fully and are summed, and so are the divergences: eq. 12.
        budget: ``"network"``: R of all gates of an image together; ``"layer"``: R of each layer's, eq. 11.
        direction: Of the divergence; see `controller.divergence_loss`.
        distillation: Share in [0, 1] of the cross-entropy that is replaced by the divergence from ``teacher``, where
            `PathDecoupler.loss` is given one.
        temperature: Of that divergence.

    Raises:
        OptionError: An option is out of range.

    Example:
        >>> DecouplingOptions(target_rate=0.3).depth
        3.0
        >>> DecouplingOptions.paper(information=0.3).budget
        'layer'
    """

    information: float = 0.5
    divergence: float = 1.0
    sparsity: float = 0.003
    target_rate: float = 0.5
    depth: float | None = 3.0
    budget: str = "network"
    direction: str = "z_y"
    distillation: float = 0.9
    temperature: float = 2.0

    def __post_init__(self) -> None:
        for name in ("information", "divergence", "sparsity"):
            object.__setattr__(self, name, number(getattr(self, name), name, 0))
        rate = number(self.target_rate, "target_rate", 0, 1, meaning="a share of channels")
        object.__setattr__(self, "target_rate", rate)
        if self.depth is not None:
            object.__setattr__(self, "depth", number(self.depth, "depth", 0))
        one_of(self.budget, "budget", BUDGETS)
        one_of(self.direction, "direction", DIRECTIONS)
        share = number(self.distillation, "distillation", 0, 1, meaning="a share of the cross-entropy")
        object.__setattr__(self, "distillation", share)
        object.__setattr__(self, "temperature", number(self.temperature, "temperature", 0, open_ends=True))

    @classmethod
    def paper(
        cls, *, information: float = 1.0, divergence: float = 1.0, sparsity: float = 0.003, target_rate: float = 0.0,
        direction: str = "z_y",
    ) -> "DecouplingOptions":  # fmt: skip
        """Eq. 12 as it stands: sums over the layers, a rate for each of them, no teacher. The paper gives no weights.

        Raises:
            OptionError: An option is out of range.
        """
        return cls(
            information, divergence, sparsity, target_rate,
            depth=None, budget="layer", direction=direction, distillation=0.0,
        )  # fmt: skip

    def layer_weights(self, layers: int) -> Tensor:
        """``(L, 2)`` float64: what each layer counts in the information loss, and in the divergence."""
        if self.depth is None:
            return torch.ones(layers, 2, dtype=torch.float64)
        place = (torch.arange(1, layers + 1, dtype=torch.float64) / layers) ** self.depth
        return torch.stack([place / place.sum(), torch.full_like(place, 1 / layers)], 1)

    def combine(
        self,
        cross_entropy: Tensor,
        distillation: Tensor | None,
        layers: list[tuple[Tensor, Tensor, Tensor, Tensor]],
        budget: Tensor,
    ) -> DecouplingLoss:
        """The total. ``layers``: for each, its three losses and its share of open gates; ``budget``: the network's."""
        table = torch.stack([torch.stack([part.to(cross_entropy.dtype) for part in row]) for row in layers])
        information, divergence, sparsity, _ = table.sum(0).unbind()
        weights = self.layer_weights(len(layers)).to(table)
        weighted = (table[:, :2] * weights).sum(0)
        if self.budget == "network":
            sparsity = budget.to(cross_entropy.dtype)
        fit, taught = cross_entropy, cross_entropy.new_zeros(())
        if distillation is not None:
            taught = distillation.to(cross_entropy.dtype)
            fit = (1 - self.distillation) * cross_entropy + self.distillation * taught
        total = fit + self.information * weighted[0] + self.divergence * weighted[1] + self.sparsity * sparsity
        return DecouplingLoss(total, cross_entropy, information, divergence, sparsity, taught, table.detach())
