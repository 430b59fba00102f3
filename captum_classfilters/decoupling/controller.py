"""What opens and closes the channels of one convolution, from that convolution's input.

`semantic_hash` is stateless; `Controller` holds the two linear layers. N samples, C channels in, K channels out.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIXES = ("sample", "channel", "element")


def saturating_sigmoid(values: Tensor) -> Tensor:
    """``clamp(1.2 sigmoid(x) - 0.1, 0, 1)``: reaches 0 and 1, eq. 4."""
    return (1.2 * values.sigmoid() - 0.1).clamp(0, 1)


def semantic_hash(logits: Tensor, noise: Tensor, binary: Tensor) -> Tensor:
    """Gates for training: hard ones where ``binary``, soft ones elsewhere, with the gradient of the soft ones.

    Source: "Interpretable neural network decoupling", section 3.1, eqs. 3 and 4 (Improved SemHash).

    Args:
        logits: g, ``(N, K)`` floating.
        noise: alpha, ``(N, K)``, drawn from a standard normal distribution.
        binary: Boolean, broadcast to ``(N, K)``: which gates are hard; `random_half` draws it.

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


def random_half(logits: Tensor, mix: str) -> Tensor:
    """Which half of the gates is hard in this step, at random; broadcasts to ``(N, K)``.

    Args:
        logits: ``(N, K)``; for the shape.
        mix: ``"sample"``: half of the samples, as the paper has it; ``"channel"``: half of the channels, the same for
            all samples, as its published code does; ``"element"``: each gate on its own.
    """
    count, channels = logits.shape
    if mix == "element":
        return torch.rand(count, channels, device=logits.device) < 0.5
    many = count if mix == "sample" else channels
    half = torch.rand(many, device=logits.device).argsort() < (many + 1) // 2
    return half[:, None] if mix == "sample" else half[None]


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
        each = (grads[0] / positions).to(ctx.dtype)
        return each.reshape(*each.shape, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape), None


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
        mix: See `random_half`.
    """

    def __init__(self, inputs: int, outputs: int, reduction: int = 4, mix: str = "sample") -> None:
        super().__init__()
        self.mix = mix
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
        with torch.autocast(features.device.type, enabled=False):
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
        return semantic_hash(logits, torch.randn_like(logits), random_half(logits, self.mix))

    def forward(self, features: Tensor, straight_through: bool = False) -> Tensor:
        """Features ``(N, C, ...)`` to gates ``(N, K)``."""
        return self.gates(self.logits(features), straight_through)
