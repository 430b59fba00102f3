"""Filter ambiguity: how badly a network does when each class may use only a few of its channels.

N samples, C classes, K channels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.core.check import integer, number
from captum_classfilters.core.errors import NonFiniteError
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import HeadPass
from captum_classfilters.core.wide import portions
from captum_classfilters.gating.gate import GatePenalty, LabelSensitiveGate, density_penalty, gated, project

# Rows of features that are gated at a time: bounds what is kept for gradients
_ROWS = 16384
# Where the slope of the penalty begins in the search, times C * K
_FIRST_SLOPE = 0.03


@dataclass(frozen=True)
class FilterAmbiguity:
    """What `filter_ambiguity` found.

    Attributes:
        value: Phi, ``cross_entropy + penalty``.
        cross_entropy: The gated path's. The gate knows the labels: this is leakage, not a loss that a user would see.
        penalty: ``sparsity * | ||G||_1 - s |``.
        gate_density: Mean of the gate that was found.
        density: Its target, ``s / (C * K)``.
        sparsity: The paper's ``a``.
        samples: N.
        gate: The gate that was found.
    """

    value: float
    cross_entropy: float
    penalty: float
    gate_density: float
    density: float
    sparsity: float
    samples: int
    gate: LabelSensitiveGate


# the search takes gradients, whatever is around it
@torch.inference_mode(False)
def filter_ambiguity(
    model: Any,
    loader: Iterable[Any] | None = None,
    *,
    penalty: GatePenalty = GatePenalty(),
    steps: int = 300,
    lr: float = 0.1,
    anneal: bool = True,
    layer: nn.Module | str | None = None,
) -> FilterAmbiguity:
    """Phi of a network, trained with a gate or without: the best gate for it as it is, and what is left to lose.

    ``Phi = min over G of CE(y, gated path) + a * | ||G||_1 - s |``, every column's maximum 1: low where each class can
    do with its own few channels.

    Source: "Training interpretable CNNs towards class-specific filters", eq. 2 and table 1. It states neither a nor
    s nor how G is searched, so figures compare only where all of these are the same. Here: the network in eval
    mode and frozen; G begins at 0.5 throughout, then a fixed number of steps of Adam on all samples at once, its rate
    falling to 0 as a cosine, each followed by `project`; the best G on the way counts.

    A G that reads the label helps a plain network, too: at its minimum Phi can lie far below the network's own
    cross-entropy.

    The head's inputs of all samples are kept: N x K numbers.

    Args:
        model: The network, borrowed; or a `HeadPass`.
        loader: Batches ``(inputs, labels)``; left out with a `HeadPass`.
        penalty: The density that is wanted, and what a deviation costs.
        steps: Steps of Adam.
        lr: Adam's learning rate at the start.
        anneal: The penalty's slope rises geometrically from almost nothing to a during the search. False: the slope is
            a from the start; G then stays near the constant it began with, and the result depends on a and on steps.
        layer: The head, if it cannot be found; left out with a `HeadPass`.

    Raises:
        OptionError: An option is out of range.
        HeadError: The head cannot be found.
        LabelError, ShapeError, EmptyLoaderError: The loader's batches cannot be read.
        NonFiniteError: Features are NaN or infinite, or no gate gave a finite loss.
    """
    steps, lr = integer(steps, "steps", 1), number(lr, "lr", 0)
    features, labels, head = _collect(HeadPass.of(model, loader, layer), penalty)
    density = penalty.density_for(head.num_classes)
    weight, parts = _search(features, labels, head, density, penalty, steps=steps, lr=lr, anneal=anneal)
    if not math.isfinite(sum(parts)):
        raise NonFiniteError(
            "no gate gave a finite loss; expected features and weights of the head whose products are finite: look at "
            "the head and the layers before it"
        )
    # a generator of its own: torch's stays as it is
    gate = LabelSensitiveGate(*weight.shape, generator=torch.Generator()).to(weight.device)
    with torch.no_grad():
        gate.weight.copy_(weight)
    gate.project_()
    gate.is_noise = False
    gate.layer = head.name
    gate.counts.copy_(torch.bincount(labels, minlength=head.num_classes))
    return FilterAmbiguity(
        value=sum(parts), cross_entropy=parts[0], penalty=parts[1], gate_density=gate.density,
        density=density, sparsity=penalty.sparsity, samples=len(labels), gate=gate,
    )  # fmt: skip


def _collect(head_pass: HeadPass, penalty: GatePenalty) -> tuple[Tensor, Tensor, Head]:
    features, labels, head = [], [], None
    with head_pass.batches(description="filter_ambiguity") as stream:
        for batch in stream:
            if head is None:
                head = batch.head
                penalty.density_for(head.num_classes)
            features.append(batch.features.float())
            labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels), head  # type: ignore[arg-type, return-value]


def _search(
    features: Tensor,
    labels: Tensor,
    head: Head,
    density: float,
    penalty: GatePenalty,
    *,
    steps: int,
    lr: float,
    anneal: bool,
) -> tuple[Tensor, list[float]]:
    sparsity = penalty.sparsity
    head_weight, bias = head.weight.float(), head.bias.float()
    weight = torch.full_like(head_weight, 0.5).requires_grad_()
    previous = torch.ones_like(head_weight)
    optimizer = torch.optim.Adam([weight], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first = min(_FIRST_SLOPE / weight.numel(), sparsity) if anneal else sparsity
    lowest, best, best_parts = math.inf, weight.detach().clone(), [math.nan, math.nan]
    with torch.enable_grad():
        for step in range(steps + 1):
            optimizer.zero_grad()
            distance, entropy = density_penalty(weight, density, penalty.kind), 0.0
            for rows, answers in portions(_ROWS, features, labels):
                logits = F.linear(gated(rows, answers, weight), head_weight, bias)
                part = F.cross_entropy(logits, answers, reduction="sum") / len(labels)
                part.backward()  # type: ignore[no-untyped-call]
                entropy += float(part.detach())
            slope = sparsity * (first / sparsity) ** (1 - step / steps) if sparsity else 0.0
            (slope * distance).backward()
            parts = [entropy, sparsity * float(distance.detach())]
            # the start breaks the constraint, so it does not count
            if step and sum(parts) < lowest:
                lowest, best, best_parts = sum(parts), weight.detach().clone(), parts
            if step < steps:
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    weight.copy_(project(weight, previous))
                    previous.copy_(weight)
    return best, best_parts
