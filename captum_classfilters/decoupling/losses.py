"""The losses of eq. 12, one function each. N samples, K channels of one layer, C classes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DIRECTIONS = ("z_y", "y_z")


class DecouplingLoss(NamedTuple):
    """The parts of eq. 12, scalars with gradients; what they are for single layers, without.

    `mutual_information`, `divergence` and `sparsity` are sums over the layers, as in eqs. 9 to 11, not yet times their
    weights. ``per_layer`` is ``(L, 3)`` in that order, with the share of open gates as a fourth column.
    """

    total: Tensor
    cross_entropy: Tensor
    mutual_information: Tensor
    divergence: Tensor
    sparsity: Tensor
    per_layer: Tensor  # (L, 4)

    @property
    def mean_mutual_information(self) -> Tensor:
        """Mean cross-entropy over the layers: ln C where gates say nothing of the class."""
        return self.per_layer[:, 0].mean()


def mutual_information_loss(gates: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the label as a linear layer reads it from the gates: ``H(a) -`` it bounds ``I(a; z)`` below.

    Source: "Interpretable neural network decoupling", eq. 9, for one layer. No difference.

    Args:
        gates: z, ``(N, K)``.
        weight: W_cla, ``(C, K)``.
        labels: ``(N,)`` int64.

    Returns:
        A scalar, in nats, averaged over the samples.
    """
    return F.cross_entropy(F.linear(gates, weight.to(gates.dtype)), labels)


def divergence_loss(gates: Tensor, pooled: Tensor, direction: str = "z_y") -> Tensor:
    """Divergence between a layer's gates and what its filters answer, both as distributions over channels.

    Source: "Interpretable neural network decoupling", eq. 10, for one layer. Differs: the paper leaves both
    un-normalised, where a divergence may be negative; here a softmax makes distributions of them, as in its published
    code.

    Args:
        gates: z, ``(N, K)``.
        pooled: The layer's output before it is masked, averaged over positions, ``(N, K)``.
        direction: ``"z_y"``: KL(z || y), as in the paper; ``"y_z"``: KL(y || z).

    Returns:
        A scalar, in nats, averaged over the samples.
    """
    log_z, log_y = F.log_softmax(gates, 1), F.log_softmax(pooled.to(gates.dtype), 1)
    first, second = (log_z, log_y) if direction == "z_y" else (log_y, log_z)
    return (first.exp() * (first - second)).sum(1).mean()


def sparsity_loss(gates: Tensor, target_rate: float = 0.0) -> Tensor:
    """How far the number of open gates is from ``target_rate * K``: ``| ||z||_1 - R K |``, averaged over the samples.

    Source: "Interpretable neural network decoupling", eq. 11, for one layer. No difference.

    Args:
        gates: z, ``(N, K)``.
        target_rate: R in [0, 1].
    """
    return (gates.abs().sum(1) - target_rate * gates.shape[1]).abs().mean()


def combine(
    cross_entropy: Tensor,
    layers: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    *,
    information_weight: float,
    divergence_weight: float,
    sparsity_weight: float,
) -> DecouplingLoss:
    """Eq. 12. ``layers``: for each, the three losses and the share of open gates."""
    table = torch.stack([torch.stack([part.to(cross_entropy.dtype) for part in row]) for row in layers])
    information, divergence, sparsity, _ = table.sum(0).unbind()
    total = (
        cross_entropy + information_weight * information + divergence_weight * divergence + sparsity_weight * sparsity
    )
    return DecouplingLoss(total, cross_entropy, information, divergence, sparsity, table.detach())
