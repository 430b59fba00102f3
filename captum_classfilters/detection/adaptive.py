"""Attackers who know of the detector: what a detector is worth is what it is worth against them.

N images, K channels in all.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from captum.robust import Perturbation
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.attacks import Normalized
from captum_classfilters.attacks.oracle import check_bounds, check_count, check_images
from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import LabelError, MergeError, OptionError
from captum_classfilters.core.stream import check_labels, check_range
from captum_classfilters.decoupling import PathDecoupler, Paths
from captum_classfilters.decoupling.saved import fingerprint

# ``(logits, gates, gate logits, labels, rows)`` to a loss for each image, to be made small
Goal = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class _GatePGD(Perturbation):
    """Projected gradient descent through the gates: hard forward, with the gradient of soft ones backward."""

    def __init__(
        self, decoupler: PathDecoupler | Normalized, weight: float, lower_bound: float, upper_bound: float
    ) -> None:
        check_bounds(lower_bound, upper_bound)
        inner = decoupler.model if isinstance(decoupler, Normalized) else decoupler
        if not isinstance(inner, PathDecoupler):
            raise OptionError(f"expected a PathDecoupler, or Normalized around one, got {type(inner).__name__}")
        if not weight >= 0:
            raise OptionError(f"weight must be at least 0, got {weight!r}")
        self.network, self.weight = decoupler, weight
        self.lower_bound, self.upper_bound = lower_bound, upper_bound
        self._inner: PathDecoupler = inner

    def _descend(
        self, images: Tensor, labels: Tensor, radius: float, step_size: float, step_num: int, goal: Goal
    ) -> Tensor:
        """Of each search the image of the smallest loss among those that fool the network, or of all if none does."""
        check_images(images, self.lower_bound, self.upper_bound)
        check_count(step_num, "step_num")
        for name, size in (("radius", radius), ("step_size", step_size)):
            if not size > 0:
                raise OptionError(f"{name} must be above 0, got {size!r}")
        original = images.detach()
        best, best_loss = original.clone(), torch.full((len(images),), torch.inf, device=images.device)
        best_fools = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        current, rows = original.clone(), torch.arange(len(images), device=images.device)
        with borrowed(self.network, grad=True), self._inner.straight_through():
            for step in range(step_num + 1):
                current.requires_grad_(True)
                logits, gates, gate_logits = self._forward(current)
                if not step:
                    check_range(labels, logits.shape[1])
                loss = goal(logits, gates, gate_logits, labels, rows)
                if step:
                    fools = logits.argmax(1) != labels
                    better = (fools & ~best_fools) | ((fools == best_fools) & (loss.detach() < best_loss))
                    best[better] = current.detach()[better]
                    best_loss, best_fools = torch.where(better, loss.detach(), best_loss), best_fools | (fools & better)
                if step == step_num:
                    break
                (gradient,) = torch.autograd.grad(loss.sum(), current)
                moved = current.detach() - step_size * gradient.sign()
                moved = original + (moved - original).clamp(-radius, radius)
                current = moved.clamp(self.lower_bound, self.upper_bound)
        return best

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.network.normalize(images) if isinstance(self.network, Normalized) else images
        logits, gates, gate_logits = self._inner.gates_and_logits(inputs)
        return logits, torch.cat(gates, 1), torch.cat(gate_logits, 1)


def _check_reads(reads: str) -> None:
    if reads not in ("bits", "logits"):
        raise OptionError(f'reads must be "bits" or "logits", got {reads!r}')


class AdaptivePGD(_GatePGD):
    """PGD on the network and on the detector at once: to be seen wrong, and not to be noticed.

    A surrogate says how adversarial a path looks: train one with `distil`. A step raises the cross-entropy of an image
    that the network still sees right, and lowers the surrogate's answer on one that it sees wrong; with ``weight`` it
    does both at once. Gates are hard, with the gradient of soft ones, so that it sees how paths bend.

    Source: Bryniarski et al. 2021, "Evading adversarial example detection defenses with orthogonal projected gradient
    descent", its selective form; with ``weight`` the sum of losses of Carlini & Wagner 2017, "Adversarial examples are
    not easily detected". For the gradient of steps Athalye et al. 2018.

    Args:
        decoupler: The network, or `Normalized` around it.
        surrogate: ``(N, K)`` to ``(N,)``, larger for adversarial, differentiable. None: of the network alone, but
            through its gates.
        reads: What it reads: ``"bits"``, or for a detector that does so ``"logits"``, through a sigmoid.
        weight: Of the surrogate in the sum ``weight * surrogate - cross-entropy``; None: one of the two at a time. Of
            weights tried here, a small one is noticed and a large one does not fool the network.
        lower_bound: Smallest value of a pixel.
        upper_bound: Largest value of a pixel.

    Raises:
        OptionError: An argument out of range.
    """

    def __init__(
        self,
        decoupler: PathDecoupler | Normalized,
        surrogate: Callable[[Tensor], Tensor] | None = None,
        *,
        reads: str = "bits",
        weight: float | None = None,
        lower_bound: float = 0.0,
        upper_bound: float = 1.0,
    ) -> None:
        super().__init__(decoupler, 0.0 if weight is None else weight, lower_bound, upper_bound)
        _check_reads(reads)
        self.selective = weight is None
        # a copy where the network is: it may have been learnt elsewhere
        if isinstance(surrogate, nn.Module):
            surrogate = deepcopy(surrogate).to(next(self._inner.parameters()).device)
        self.surrogate, self.reads = surrogate, reads

    def perturb(self, inputs: Tensor, labels: Tensor, radius: float, step_size: float, step_num: int) -> Tensor:
        """Attack each image.

        Args:
            inputs: ``(N, colours, H, W)`` of pixels in the bounds.
            labels: ``(N,)`` true classes.
            radius: The most that a pixel may change.
            step_size: How much it changes in a step.
            step_num: Steps.

        Returns:
            Same shape: of all steps the one that fools the network and looks least adversarial; one that does not fool
            it where none does.
        """
        labels = check_labels(labels, len(inputs)).to(inputs.device)

        def goal(logits: Tensor, gates: Tensor, gate_logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
            wrong = -F.cross_entropy(logits, labels, reduction="none")
            if self.surrogate is None:
                return wrong
            noticed = self.surrogate(gates if self.reads == "bits" else gate_logits.sigmoid())
            if not self.selective:
                return wrong + self.weight * noticed
            return torch.where(logits.argmax(1) != labels, noticed, wrong)

        return self._descend(inputs, labels, radius, step_size, step_num, goal)


class PathMatching(_GatePGD):
    """PGD towards the path of a clean image of another class: what a detector of paths should find hardest.

    Lowers the cross-entropy with the class of the path aimed at, and ``weight`` times the mean over channels of the
    binary cross-entropy between that path's bits and the gates' logits. The aim is the nearest of ``paths`` that the
    network says another class of than the image's.

    Source: after the feature matching of Sabour et al. 2016, "Adversarial manipulation of deep representations".

    Args:
        decoupler: The network, or `Normalized` around it.
        paths: Of clean images of several classes.
        weight: Of the path.
        lower_bound: Smallest value of a pixel.
        upper_bound: Largest value of a pixel.

    Raises:
        OptionError: An argument out of range.
        MergeError: Paths of another network.
    """

    def __init__(
        self,
        decoupler: PathDecoupler | Normalized,
        paths: Paths,
        *,
        weight: float = 10.0,
        lower_bound: float = 0.0,
        upper_bound: float = 1.0,
    ) -> None:
        super().__init__(decoupler, weight, lower_bound, upper_bound)
        if len(set(paths.predictions.tolist())) < 2:
            raise LabelError("expected clean paths of at least two classes to aim at, got fewer; give more")
        if paths.fingerprint != fingerprint(self._inner):
            raise MergeError("the paths to aim at are of another network; collect them with this decoupler")
        self.paths = paths

    def perturb(self, inputs: Tensor, labels: Tensor, radius: float, step_size: float, step_num: int) -> Tensor:
        """Attack each image; see `AdaptivePGD.perturb`."""
        check_images(inputs, self.lower_bound, self.upper_bound)
        labels = check_labels(labels, len(inputs)).to(inputs.device)
        if not len(inputs):
            return inputs.detach().clone()
        own = self._inner.paths(self._normalised(inputs.detach()))
        far = own.distances(self.paths) + 10**6 * (self.paths.predictions[None] == labels.cpu()[:, None])
        nearest = far.argmin(1)
        aims = self.paths.bits()[nearest].to(inputs.device, inputs.dtype)
        targets = self.paths.predictions[nearest].to(inputs.device)

        def goal(logits: Tensor, _: Tensor, gate_logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
            apart = F.binary_cross_entropy_with_logits(gate_logits, aims[rows], reduction="none").mean(1)
            return F.cross_entropy(logits, targets[rows], reduction="none") + self.weight * apart

        return self._descend(inputs, labels, radius, step_size, step_num, goal)

    def _normalised(self, images: Tensor) -> Tensor:
        return self.network.normalize(images) if isinstance(self.network, Normalized) else images


def distil(
    detector: Any,
    paths: Paths,
    *,
    reads: str = "bits",
    hidden: int = 64,
    epochs: int = 100,
    lr: float = 1e-3,
    seed: int = 0,
) -> nn.Module:
    """A small network that says of paths what a detector says: the surrogate of an attacker who may only ask.

    Args:
        detector: With ``strangeness``: a `PathDetector` or `PathOutlierDetector`, fitted.
        paths: Asked about; clean and adversarial ones.
        reads: What the surrogate reads: ``"bits"``, or ``"logits"`` of the gates, through a sigmoid.
        hidden: Units.
        epochs: Passes of AdamW over all of them, in batches of 256.
        lr: Learning rate.
        seed: Of its weights and batches.

    Returns:
        ``(N, K)`` in [0, 1] to ``(N,)``: the detector's answer in standard deviations from its mean.

    Raises:
        OptionError: Fewer than two paths; unknown ``reads``, or logits that were not collected; it has not learnt.
    """
    _check_reads(reads)
    check_count(epochs, "epochs")
    if len(paths) < 2 or (reads == "logits" and paths.logits is None):
        raise OptionError(f"distil needs at least two paths, for reads={reads!r} with logits; collect more of them")
    generator = torch.Generator().manual_seed(seed)
    bits = paths.bits().float() if paths.logits is None or reads == "bits" else paths.logits.sigmoid()
    asked = torch.as_tensor(detector.strangeness(paths)).float()
    if not asked.std() > 0:
        raise OptionError("the detector says the same of all these paths, so there is nothing to learn; give others")
    asked = (asked - asked.mean()) / asked.std()
    # layers draw weights when they are made, replaced below: not from the caller's random numbers
    with torch.random.fork_rng(devices=[]):
        surrogate = nn.Sequential(nn.Linear(bits.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Flatten(0))
    with torch.no_grad():
        for parameter in surrogate.parameters():
            spread = parameter.shape[-1] ** -0.5
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * spread)
    optimizer = torch.optim.AdamW(surrogate.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(bits), generator=generator), 256):
            loss = F.mse_loss(surrogate(bits[rows]), asked[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    surrogate.requires_grad_(False).eval()
    if not surrogate(bits).std() > 1e-3:  # NaN as well
        raise OptionError(f"the surrogate says the same of all paths: it has not learnt; lower lr, got {lr!r}")
    return surrogate
