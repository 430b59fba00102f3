"""What opens and closes the channels of one convolution, from that convolution's input; and the losses that train it.

Eqs. 2 to 5 of "Interpretable neural network decoupling" in `Controller`, eqs. 9 to 12 one function each.
N samples, C channels in, K channels out.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.core.wide import full_precision

MIXES = ("sample", "channel", "element")
DIRECTIONS = ("z_y", "y_z")


def saturating_sigmoid(values: Tensor) -> Tensor:
    """``clamp(1.2 sigmoid(x) - 0.1, 0, 1)``: reaches 0 and 1, eq. 4."""
    return (1.2 * values.sigmoid() - 0.1).clamp(0, 1)


def semantic_hash(logits: Tensor, noise: Tensor, binary: Tensor) -> Tensor:
    """Gates for training: hard ones where ``binary``, soft ones elsewhere, with the gradient of the soft ones.

    Source: "Interpretable neural network decoupling", section 3.1, eqs. 3 and 4 (Improved SemHash).

    Args:
        logits: g, ``(N, K)`` floating.
        noise: alpha, ``(N, K)``, drawn from a standard normal distribution.
        binary: Boolean, broadcast to ``(N, K)``: which gates are hard; `random_hard` draws it.

    Returns:
        z, ``(N, K)`` in [0, 1].
    """
    noisy = logits + noise
    soft = saturating_sigmoid(noisy)
    hard = (noisy > 0).to(soft.dtype)
    return torch.where(binary, soft + (hard - soft).detach(), soft)


def hard_gates(logits: Tensor) -> Tensor:
    """``1[g > 0]``, eq. 5, in the dtype of ``logits``; NaN where they are not finite, to show in the output."""
    return torch.add((logits > 0).to(logits.dtype), logits, alpha=0)


def random_hard(logits: Tensor, mix: str, share: float = 0.5) -> Tensor:
    """Draw which gates are hard in this step; broadcasts to ``(N, K)``.

    Args:
        logits: ``(N, K)``; only their shape is used.
        mix: ``"sample"``: a share of the samples, as in the paper; ``"channel"``: of the channels, the same for all
            samples, as its published code does; ``"element"``: each gate on its own.
        share: How many are hard, rounded up; the paper's half.
    """
    count, channels = logits.shape
    if mix == "element":
        return torch.rand(count, channels, device=logits.device) < share
    many = count if mix == "sample" else channels
    hard = torch.rand(many, device=logits.device).argsort() < math.ceil(many * share)
    return hard[:, None] if mix == "sample" else hard[None]


class _Pool(torch.autograd.Function):
    """The mean over positions, whose gradient stays one number for a channel instead of being written out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, dtype: torch.dtype) -> Tensor:
        return features.mean(tuple(range(2, features.dim())), dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        positions = math.prod(ctx.shape[2:])
        share = (grads[0] / positions).to(ctx.dtype)
        return share.reshape(*share.shape, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape), None


def pooled(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Global average pooling, ``(N, K, ...)`` to ``(N, K)`` of ``dtype``: s of eq. 2.

    Twice as fast in training as ``features.mean``, whose gradient is as large as the features.
    """
    result: Tensor = _Pool.apply(features, dtype)
    return result


def mask(maps: Tensor, gates: Tensor) -> Tensor:
    """Maps ``(N, K, ...)`` times gates ``(N, K)``: what eq. 5 opens and closes."""
    return maps * gates.to(maps.dtype).reshape(*gates.shape, *(1,) * (maps.dim() - 2))


class Controller(nn.Module):
    """The architecture controlling module of one convolution: ``(N, C, ...)`` in, gates ``(N, K)`` out.

    In eval mode gates are 0 or 1. Computed in float32, whatever the features: half precision would overflow.

    Source: "Interpretable neural network decoupling", section 3.1, eqs. 2 to 5. Differs: with biases, which the paper
    omits "for simplicity"; that of the second layer begins at 1, so that most channels begin open.

    Args:
        inputs: C.
        outputs: K.
        reduction: gamma; the hidden layer has C / gamma units, at least one.
        mix: See `random_hard`.

    Attributes:
        noise: Deviation of the noise in training; the paper's is 1. `PathDecoupler.anneal_` lets it fade.
        hard: Share of the gates that are hard in training; the paper's is a half.
    """

    def __init__(self, inputs: int, outputs: int, reduction: int = 4, mix: str = "sample") -> None:
        super().__init__()
        self.mix, self.noise, self.hard = mix, 1.0, 0.5
        self.squeeze = nn.Linear(inputs, max(1, inputs // reduction))
        self.excite = nn.Linear(self.squeeze.out_features, outputs)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """He's weights, biases of 0 and then 1."""
        with torch.no_grad():
            for layer, bias in ((self.squeeze, 0.0), (self.excite, 1.0)):
                spread = (2 / layer.in_features) ** 0.5
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * spread)
                layer.bias.fill_(bias)

    def logits(self, features: Tensor) -> Tensor:
        """g of eq. 2: ``(N, K)`` float32 (float64 for such features)."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        with full_precision(features.device.type):
            hidden = F.linear(
                pooled(features, dtype), self.squeeze.weight.to(dtype), self.squeeze.bias.to(dtype)
            ).relu()
            return F.linear(hidden, self.excite.weight.to(dtype), self.excite.bias.to(dtype))

    def gates(self, logits: Tensor, straight_through: bool = False) -> Tensor:
        """z: hashed with fresh noise in train mode; in eval mode hard, if asked with the gradient of soft ones."""
        if not self.training:
            soft = saturating_sigmoid(logits) if straight_through else None
            # the difference is 0, whatever rounding does: gates stay hard
            return hard_gates(logits) if soft is None else hard_gates(logits).detach() + (soft - soft.detach())
        noise = torch.randn_like(logits) * self.noise
        return semantic_hash(logits, noise, random_hard(logits, self.mix, self.hard))

    def forward(self, features: Tensor, straight_through: bool = False) -> Tensor:
        """Features ``(N, C, ...)`` to gates ``(N, K)``."""
        return self.gates(self.logits(features), straight_through)


class DecouplingLoss(NamedTuple):
    """The parts of a decoupler's loss: scalars with gradients. Those of single layers, in ``per_layer``, have none.

    `mutual_information`, `divergence` and `sparsity` are sums over the layers, as in eqs. 9 to 11, not yet times any
    weights; with one budget for the network `sparsity` is that budget's. `distillation` is 0 without a teacher.
    ``per_layer`` is ``(L, 3)`` in that order, with the share of open gates as a fourth column.
    """

    total: Tensor
    cross_entropy: Tensor
    mutual_information: Tensor
    divergence: Tensor
    sparsity: Tensor
    distillation: Tensor
    per_layer: Tensor  # (L, 4)

    @property
    def mean_mutual_information(self) -> Tensor:
        """Mean cross-entropy over the layers: ln C where gates say nothing of the class."""
        return self.per_layer[:, 0].mean()


def mutual_information_loss(gates: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the label as a linear layer reads it from the gates; H(a) less it bounds I(a; z) from below.

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
    """Divergence between a layer's gates and the responses of its filters, both as distributions over channels.

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


def budget_loss(gates: Sequence[Tensor], target_rate: float = 0.0) -> Tensor:
    """How far the open gates of a whole network are from ``target_rate`` of them all, averaged over the samples.

    Differs from eq. 11 of "Interpretable neural network decoupling", `sparsity_loss`, in that a layer may keep more
    gates open if others keep fewer.

    Args:
        gates: z of each layer, ``(N, K_l)``.
        target_rate: R in [0, 1].
    """
    opened = torch.stack([gate.abs().sum(1) for gate in gates]).sum(0)
    return (opened - target_rate * sum(gate.shape[1] for gate in gates)).abs().mean()


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened classes from the teacher's, times the squared temperature, averaged over the samples.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015. No difference.

    Args:
        logits: ``(N, C)``.
        teacher: The teacher's, ``(N, C)``; they get no gradient.
        temperature: Both are divided by it.
    """
    log_student = F.log_softmax(logits / temperature, 1)
    log_teacher = F.log_softmax(teacher.detach().to(logits) / temperature, 1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
