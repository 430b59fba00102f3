"""Attacks that know of the detector. A detector should be judged by them.

N images, K channels in all layers together.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from captum.robust import Perturbation
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.attacks import Normalized
from captum_classfilters.attacks.oracle import Bounds, check_bounds, check_images
from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.check import integer, number, one_of
from captum_classfilters.core.errors import LabelError, MergeError, OptionError
from captum_classfilters.core.labels import check_labels, check_range
from captum_classfilters.core.outputs import LogitReader
from captum_classfilters.decoupling import PathDecoupler, Paths

# A function of ``(logits, gates, gate logits, labels, rows)`` that gives the loss of each image; the attack lowers it
Goal = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# What a surrogate of a detector may read
_READS = ("bits", "logits")


class _GatePGD(Perturbation):
    """Projected gradient descent through the gates: hard forward, with the gradient of soft ones backward."""

    def __init__(self, decoupler: PathDecoupler | Normalized, weight: float, bounds: Bounds) -> None:
        self.bounds = check_bounds(bounds)
        inner = decoupler.model if isinstance(decoupler, Normalized) else decoupler
        if not isinstance(inner, PathDecoupler):
            raise OptionError(f"expected a PathDecoupler, or Normalized around one, got {type(inner).__name__}")
        self.network, self.weight = decoupler, number(weight, "weight", 0)
        self._inner: PathDecoupler = inner

    def _descend(
        self, images: Tensor, labels: Tensor, radius: float, step_size: float, step_num: int, goal: Goal
    ) -> Tensor:
        """For each image the step of the smallest loss among those that fool the network, or of all if none does."""
        check_images(images, self.bounds)
        step_num = integer(step_num, "step_num", 1)
        radius, step_size = (
            number(size, name, 0, open_ends=True) for name, size in (("radius", radius), ("step_size", step_size))
        )
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
                current = moved.clamp(*self.bounds)
        return best

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.network.normalize(images) if isinstance(self.network, Normalized) else images
        with LogitReader() as reader:
            output, gates, gate_logits = self._inner.gates_and_logits(inputs)
            logits = reader.class_logits(output)
        return logits, torch.cat(gates, 1), torch.cat(gate_logits, 1)


class AdaptivePGD(_GatePGD):
    """PGD on the network and on the detector: it looks for images that are misclassified and raise no alarm.

    A surrogate, trained by `distil`, says how adversarial a path looks. While the network classifies an image
    correctly, a step raises the cross-entropy; after that, a step lowers the surrogate's answer. With ``weight`` every
    step does both. Gates are hard, but have the gradient of soft ones, so that the attack can change paths.

    Source: Bryniarski et al. 2021, "Evading adversarial example detection defenses with orthogonal projected gradient
    descent", its selective form; with ``weight`` the sum of losses of Carlini & Wagner 2017, "Adversarial examples are
    not easily detected". For the gradient of steps Athalye et al. 2018.

    Args:
        decoupler: The network, or `Normalized` around it.
        surrogate: ``(N, K)`` to ``(N,)``, larger for adversarial, differentiable. None: attack the network alone, but
            through its gates.
        reads: What the surrogate reads: ``"bits"``, or ``"logits"``, through a sigmoid, if its detector reads those.
        weight: Weight of the surrogate in the sum ``weight * surrogate - cross-entropy``; None: each step lowers only
            one of the two. In our tests small weights raised alarms, and large ones did not fool the network.
        bounds: Smallest and largest value of a pixel.

    Raises:
        OptionError: An argument is out of range.
    """

    def __init__(
        self,
        decoupler: PathDecoupler | Normalized,
        surrogate: Callable[[Tensor], Tensor] | None = None,
        *,
        reads: str = "bits",
        weight: float | None = None,
        bounds: Bounds = (0.0, 1.0),
    ) -> None:
        super().__init__(decoupler, 0.0 if weight is None else weight, bounds)
        self.selective = weight is None
        # a copy on the network's device, because it may have been trained on another one
        if isinstance(surrogate, nn.Module):
            surrogate = deepcopy(surrogate).to(next(self._inner.parameters()).device)
        self.surrogate, self.reads = surrogate, one_of(reads, "reads", _READS)

    def perturb(self, inputs: Tensor, labels: Tensor, radius: float, step_size: float, step_num: int) -> Tensor:
        """Attack each image.

        Args:
            inputs: ``(N, colours, H, W)`` of pixels in the bounds.
            labels: ``(N,)`` true classes.
            radius: The most that a pixel may change.
            step_size: How much a pixel changes in a step.
            step_num: Number of steps.

        Returns:
            Same shape: of the steps that fool the network, the image that looks least adversarial; if no step fools it,
            the one that looks least adversarial of all steps.
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
    """PGD towards the path of a clean image of another class, which should be hard to detect by paths.

    It lowers the cross-entropy with the class of the target path, plus ``weight`` times the mean over channels of the
    binary cross-entropy between that path's bits and the gates' logits. The target path is the nearest one in ``paths``
    with a predicted class that is not the image's.

    Source: after the feature matching of Sabour et al. 2016, "Adversarial manipulation of deep representations".

    Args:
        decoupler: The network, or `Normalized` around it.
        paths: Paths of clean images of several classes.
        weight: Weight of the path in the loss.
        bounds: Smallest and largest value of a pixel.

    Raises:
        OptionError: An argument is out of range.
        LabelError: The paths have fewer than two classes.
        MergeError: The paths belong to another network.
    """

    def __init__(
        self,
        decoupler: PathDecoupler | Normalized,
        paths: Paths,
        *,
        weight: float = 10.0,
        bounds: Bounds = (0.0, 1.0),
    ) -> None:
        super().__init__(decoupler, weight, bounds)
        if len(set(paths.predictions.tolist())) < 2:
            raise LabelError("expected clean paths of at least two classes to aim at, got fewer; pass more paths")
        if paths.fingerprint != self._inner.fingerprint():
            raise MergeError("the paths to aim at are of another network; collect them with this decoupler")
        self.paths = paths

    def perturb(self, inputs: Tensor, labels: Tensor, radius: float, step_size: float, step_num: int) -> Tensor:
        """Attack each image; see `AdaptivePGD.perturb`."""
        check_images(inputs, self.bounds)
        labels = check_labels(labels, len(inputs)).to(inputs.device)
        if not len(inputs):
            return inputs.detach().clone()
        paths_now = self._inner.paths(self._normalised(inputs.detach()))
        same_class = self.paths.predictions[None] == labels.cpu()[:, None]
        nearest = (paths_now.distances(self.paths) + 10**6 * same_class).argmin(1)
        target_bits = self.paths.bits()[nearest].to(inputs.device, inputs.dtype)
        target_classes = self.paths.predictions[nearest].to(inputs.device)

        def goal(logits: Tensor, _: Tensor, gate_logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
            path_loss = F.binary_cross_entropy_with_logits(gate_logits, target_bits[rows], reduction="none").mean(1)
            return F.cross_entropy(logits, target_classes[rows], reduction="none") + self.weight * path_loss

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
    """Train a small network to predict a detector's scores. An attacker who can only query the detector uses it.

    Args:
        detector: A fitted `PathDetector` or `PathOutlierDetector`, or anything with its ``strangeness``.
        paths: Paths that the detector scores; clean and adversarial ones.
        reads: What the surrogate reads: ``"bits"``, or ``"logits"`` of the gates, through a sigmoid.
        hidden: Number of hidden units.
        epochs: Passes of AdamW over all paths, in batches of 256.
        lr: Learning rate.
        seed: Seed of the weights and of the batches.

    Returns:
        A module, ``(N, K)`` in [0, 1] to ``(N,)``: the detector's score in standard deviations from its mean.

    Raises:
        OptionError: There are fewer than two paths; ``reads`` is unknown, or logits were not collected; the surrogate
            has not learnt.
    """
    one_of(reads, "reads", _READS)
    hidden, epochs, seed = integer(hidden, "hidden", 1), integer(epochs, "epochs", 1), integer(seed, "seed")
    if len(paths) < 2 or (reads == "logits" and paths.logits is None):
        raise OptionError(f"distil needs at least two paths, for reads={reads!r} with logits; collect more of them")
    generator = torch.Generator().manual_seed(seed)
    bits = paths.bits().float() if paths.logits is None or reads == "bits" else paths.logits.sigmoid()
    scores = torch.as_tensor(detector.strangeness(paths)).float()
    if not scores.std() > 0:
        raise OptionError("the detector gives all these paths the same score: nothing can be learnt; pass other paths")
    scores = (scores - scores.mean()) / scores.std()
    # a new layer draws weights, which are replaced below; the caller's random state must not change
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
            loss = F.mse_loss(surrogate(bits[rows]), scores[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
    surrogate.requires_grad_(False).eval()
    if not surrogate(bits).std() > 1e-3:  # NaN as well
        raise OptionError(f"the surrogate gives all paths the same score: it has not learnt; lower lr, got {lr!r}")
    return surrogate
