"""Training with a gate: which epochs take the gated path, and what their loss is.

For any loop of the user's own; `fit.py` holds one of ours. N samples, C classes, K channels.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.optim import Optimizer

from captum_classfilters.core.borrow import borrowed, process_group, unwrap, without_compile
from captum_classfilters.core.errors import DeviceError, HeadError, NonFiniteError, OptionError, ShapeError
from captum_classfilters.core.head import Head
from captum_classfilters.core.stream import batches
from captum_classfilters.gating.fit import Fit, as_list, default_optimizer
from captum_classfilters.gating.gate import PENALTIES, LabelSensitiveGate, target_density

SCHEMES = ("alternating", "joint")
# The smallest of .02, .05, .1, .15, .5 that brings a gate to density .22 by its third epoch:
# see benchmarks/results/09_gates.md
SPARSITY = 0.02


class LabelSensitiveTraining:
    """The loss of each epoch, for your own loop: gated in some epochs, plain in the others.

        training = LabelSensitiveTraining(model, gate)
        optimizer = SGD([{"params": model.parameters()}, gate.parameter_group(lr=0.1)], lr=0.1, momentum=0.9)
        for epoch in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                training.loss(x, y, epoch).backward()
                optimizer.step()
                training.after_step()

    Gated epochs minimise ``weight * (CE of the gated path + sparsity * penalty)`` over network and gate, plain ones the
    cross-entropy of the network. Clip, accumulate and cast as always; call `after_step` after each optimiser step.

    Under DistributedDataParallel the gate stays outside of the wrapper: it starts as rank 0's, and its gradients are
    averaged over the ranks here.

    Source: "Training interpretable CNNs towards class-specific filters", Algorithm 1; footnote 1 for ``"joint"``.
    Differs: `project` instead of its lines 7 and 8; the gate has no momentum (`LabelSensitiveGate.parameter_group`);
    a step whose loss or gate is NaN is undone.

    Args:
        model: The network, on its device, plain or wrapped in DistributedDataParallel.
        gate: C x K of the network's head, on the same device.
        period: Epochs from one gated epoch to the next.
        gate_phase: Gated are epochs with ``epoch % period == gate_phase``, counted from 0.
        warmup: So many first epochs are plain.
        weight: The paper's lambda.
        density: Target mean of the gate: the paper's ``s / (C * K)``. None: 0.2, or for fewer than nine classes
            ``0.1 + 0.9 / C``: a tenth of the channels shared and each other one a single class's.
        sparsity: The paper's ``a``, which it does not state. What matters is its product with the gate's learning rate.
        penalty: ``"abs"`` (paper) or ``"hinge"`` (its code): see `density_penalty`.
        scheme: ``"alternating"``, or ``"joint"``: both losses in every epoch after the warm-up, from one forward pass.
        layer: The head, if it cannot be found.

    Raises:
        OptionError: An option is out of range.
        DeviceError: The gate is not where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        gate: LabelSensitiveGate,
        *,
        period: int = 3,
        gate_phase: int = 1,
        warmup: int = 0,
        weight: float = 1.0,
        density: float | None = None,
        sparsity: float = SPARSITY,
        penalty: str = "abs",
        scheme: str = "alternating",
        layer: nn.Module | str | None = None,
    ) -> None:
        _check_options(gate, period, gate_phase, warmup, weight, sparsity, penalty, scheme)
        if isinstance(without_compile(model), nn.DataParallel):
            raise OptionError("DataParallel copies the head in every step; wrap the model in DistributedDataParallel")
        if not isinstance(model, nn.Module):
            raise OptionError(f"the model must be an nn.Module, got {type(model).__name__}")
        self.model, self.gate = model, gate
        self.period, self.gate_phase, self.warmup = period, gate_phase, warmup
        self.weight, self.sparsity, self.penalty = weight, sparsity, penalty
        self.density = target_density(density, gate.num_classes)
        self.scheme, self._layer = scheme, layer
        self._network: nn.Module = unwrap(model)
        self._parameters = [*self._network.parameters(), gate.weight]
        device = self._parameters[0].device
        if gate.weight.device != device:
            raise DeviceError(f"the model is on {device}, the gate on {gate.weight.device}; gate.to({str(device)!r})")
        self._head: Head | None = None
        self._group: Any = process_group(model)
        if self._group is not None:
            self._share_gate()
        # of the step in progress
        self._epoch, self._step, self._gated, self._before = -1, 0, False, _Before()

    def gates(self, epoch: int) -> bool:
        """Does this epoch, counted from 0, take the gated path?"""
        if isinstance(epoch, bool) or not isinstance(epoch, Integral) or epoch < 0:
            raise OptionError(f"epoch must be an integer of at least 0, got {epoch!r}")
        if epoch < self.warmup:
            return False
        return self.scheme == "joint" or epoch % self.period == self.gate_phase

    def loss(self, inputs: Any, labels: Tensor, epoch: int) -> Tensor:
        """One forward pass; the loss of this epoch, a scalar to call ``backward`` on.

        Args:
            inputs: A tensor, or a tuple of several, on the model's device.
            labels: ``(N,)`` integers, on the model's device.
            epoch: Counted from 0.

        Raises:
            NonFiniteError: The loss is NaN or infinite; running statistics are as before this pass.
            LabelError, ShapeError, DeviceError, HeadError, OptionError: As their messages say.
        """
        gated = self.gates(epoch)
        inputs = tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
        labels = self.gate.check_labels(labels, len(inputs[0]))
        head = self._find_head(inputs)
        if epoch != self._epoch:
            self._epoch, self._step = int(epoch), 0
        self._before.keep([*self._network.buffers(), self.gate.counts], self._parameters if gated else [])
        self._gated = self._gated or gated
        try:
            if not gated:
                # a gradient left from a gated step, or the momentum of an optimiser that has one, is not to move it
                self.gate.weight.grad = None
                loss = _cross_entropy(self.model(*inputs), labels)
            elif self.scheme == "joint":
                loss = self._joint(head, inputs, labels)
            else:
                loss = self.weight * (self._gated_entropy(head, inputs, labels) + self._penalty())
            self._check(loss)
        except BaseException:
            self._before.restore_statistics()
            raise
        return loss

    def after_step(self) -> None:
        """After each step of the optimiser: project the gate; after a gated step, check that all is finite.

        Raises:
            NonFiniteError: A gated step left NaN or infinity; network and gate are as before it. The optimiser's own
                state is not known here.
        """
        gated, self._gated = self._gated, False
        if gated and not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters):
            self._before.restore()
            raise NonFiniteError(
                f"the gate or the network became NaN or infinite in epoch {self._epoch}, step {self._step}; both are "
                "as before that step. Lower the gate's learning rate or sparsity, clip gradients, and make a new "
                "optimiser: its momentum is not finite either"
            )
        if self.gate.weight.requires_grad:
            self.gate.project_()
        self._before, self._step = _Before(), self._step + 1
        # under an autocast around the whole loop, low-precision copies of the weights would outlive the step
        torch.clear_autocast_cache()

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        *,
        lr: float = 0.1,
        gate_lr: float | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: Any = None,
        max_norm: float | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        show_progress: bool = False,
    ) -> list[dict[str, Any]]:
        """The whole loop: trains the model and the gate in place.

        A run that was killed and is started again the same way ends as one that was not: the checkpoint holds network,
        gate, optimisers, schedulers and the state of all generators (torch, numpy, Python, the loader's). Workers that
        a loader keeps from one epoch to the next have states of their own that are not.

        Args:
            loader: Batches ``(inputs, labels)``, read once for each epoch; under DDP each rank's own.
            epochs: How many, those of the checkpoint included. The last one should be plain. Without an optimizer of
                your own they cannot be more than when the checkpoint was written: the cosine was made for so many.
            lr: Of SGD with momentum 0.9, the paper's optimiser; it falls to 0 as a cosine over the epochs.
            gate_lr: The gate's; None: ``lr``, as in the paper.
            optimizer: One or several of your own, in the place of that, the gate among their parameters.
            scheduler: One or several for your own optimizer, stepped after every epoch, plain or gated.
            max_norm: Clip gradients to this norm.
            checkpoint: A file: written after every epoch, by rank 0; if it is there at the start, training goes on.
            show_progress: A tqdm bar for each epoch.

        Returns:
            ``epoch``, ``gated``, mean ``loss`` (of a gated epoch with the penalty, so not to be compared with a plain
            one's) and the gate's ``density`` of every epoch.

        Raises:
            NonFiniteError: A loss or the gate is NaN or infinite, and network and gate are as before that step; or the
                network is at the end of an epoch, and the checkpoint is of the epoch before.
            FileFormatError: The checkpoint is broken, or another training's.
            OptionError, EmptyLoaderError, LabelError, ShapeError: As their messages say.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, Integral) or epochs < 1:
            raise OptionError(f"epochs must be an integer of at least 1, got {epochs!r}")
        for name, value in (("lr", lr), ("gate_lr", gate_lr), ("max_norm", max_norm)):
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise OptionError(f"{name} must be a finite number above 0, got {value!r}")
        options = self._options()
        if optimizer is None:
            if scheduler is not None:
                raise OptionError(
                    "a scheduler steps the optimiser that it was made for, and none was given; pass optimizer= as well"
                )
            # the cosine falls over so many epochs
            options |= {"epochs": int(epochs), "lr": lr, "gate_lr": gate_lr}
            optimizers = [default_optimizer(self._network, self.gate, lr, gate_lr)]
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], int(epochs))
        else:
            optimizers = as_list(optimizer, Optimizer, "optimizer")
        schedules = [] if scheduler is None else as_list(scheduler, torch.optim.lr_scheduler.LRScheduler, "scheduler")
        # of a run that ended in the middle of a step
        self._epoch, self._step, self._before = -1, 0, _Before()
        run = Fit(
            self.model, self.gate, self, options,
            optimizers=optimizers, schedules=schedules, max_norm=max_norm,
        )  # fmt: skip
        run.run(loader, int(epochs), None if checkpoint is None else Path(checkpoint), show_progress)
        return run.history

    def _options(self) -> dict[str, Any]:
        names = ("period", "gate_phase", "warmup", "weight", "density", "sparsity", "penalty", "scheme")
        return {name: getattr(self, name) for name in names}

    # -- the paths -------------------------------------------------------------------------------------------------

    def _gated_entropy(self, head: Head, inputs: tuple[Any, ...], labels: Tensor) -> Tensor:
        def through_gate(module: nn.Module, args: Any) -> Any:
            return (self._through_gate(module, args[0], labels), *args[1:])

        with borrowed(self.model, train=True) as borrow:
            borrow.before(head.module, through_gate)
            return _cross_entropy(self.model(*inputs), labels)

    def _joint(self, head: Head, inputs: tuple[Any, ...], labels: Tensor) -> Tensor:
        seen: list[Tensor] = []
        with borrowed(self.model, train=True) as borrow:
            borrow.before(head.module, lambda module, args: seen.append(args[0]))
            plain = _cross_entropy(self.model(*inputs), labels)
        logits = head.pool(head.module(self._through_gate(head.module, seen[0], labels)))
        return plain + self.weight * (_cross_entropy(logits, labels) + self._penalty())

    def _through_gate(self, module: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d) or features.dim() == 2:
            return self.gate(features, labels)  # type: ignore[no-any-return]
        # a Linear at several positions: channels last
        gated: Tensor = self.gate(features.movedim(-1, 1), labels)
        return gated.movedim(1, -1)

    def _penalty(self) -> Tensor | float:
        # of a gate that is not trained it is a constant, and not one that it could help
        return self.sparsity * self.gate.penalty(self.density, self.penalty) if self.gate.weight.requires_grad else 0.0

    def _find_head(self, inputs: tuple[Any, ...]) -> Head:
        if self._head is None:
            # of NaN the loss tells, on all ranks at once
            few = tuple(part[:2].nan_to_num(0, 0, 0) if isinstance(part, Tensor) else part for part in inputs)
            with batches(self._network, [(few, None)], layer=self._layer, need_labels=False) as stream:
                head = next(stream).head
            if (head.num_classes, head.num_features) != self.gate.weight.shape:
                raise ShapeError(
                    f"the head {head.name!r} is {head.num_classes} classes x {head.num_features} channels, the gate "
                    f"{self.gate.num_classes} x {self.gate.num_channels}; make "
                    f"LabelSensitiveGate({head.num_classes}, {head.num_features})"
                )
            self._head, self.gate.layer = head, head.name
        return self._head

    def _check(self, loss: Tensor) -> None:
        mine = finite = torch.isfinite(loss.detach()).all()
        if self._group is not None:
            # all ranks or none: one alone would leave the others waiting
            flag = finite.int()
            dist.all_reduce(flag, dist.ReduceOp.MIN, self._group)
            finite = flag.bool()
        if not bool(finite):
            told = "of another rank is NaN or infinite" if bool(mine) else f"is {float(loss.detach())}"
            raise NonFiniteError(
                f"the loss {told} in epoch {self._epoch}, step {self._step}; no step was taken, "
                "network and gate are as before. Lower the learning rates or sparsity, or look at that batch"
            )

    # -- several processes -----------------------------------------------------------------------------------------

    def _share_gate(self) -> None:
        group = self._group
        size = dist.get_world_size(group)
        with torch.no_grad():
            dist.broadcast(self.gate.weight, dist.get_global_rank(group, 0), group)
            self.gate.project_()

        def average(grad: Tensor) -> Tensor:
            grad = grad.clone()
            dist.all_reduce(grad, group=group)
            return grad / size

        if self.gate.weight.requires_grad:
            self.gate.weight.register_hook(average)  # type: ignore[no-untyped-call]


class _Before:
    """What the network and the gate were before the step in progress."""

    def __init__(self) -> None:
        self._values: list[tuple[Tensor, Tensor]] = []
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._latest: list[tuple[Tensor, Tensor]] = []

    def keep(self, statistics: Iterable[Tensor], parameters: Iterable[Tensor]) -> None:
        """Copy what a step could spoil; of several forward passes before one step the first one counts."""
        self._latest = [(buffer, buffer.clone()) for buffer in statistics]
        self._statistics = self._statistics or self._latest
        self._values = self._values or [(p, p.detach().clone()) for p in parameters]

    def restore_statistics(self) -> None:
        """Undo the latest forward pass."""
        for buffer, before in self._latest:
            buffer.copy_(before)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the step."""
        for value, before in [*self._values, *self._statistics]:
            value.copy_(before)


def _cross_entropy(logits: Any, labels: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.flatten(1).shape[1] != logits.shape[1]:
        raise HeadError(
            f"expected a model that returns logits (N, C) in train mode, got {type(logits).__name__}; switch auxiliary "
            "outputs off, or wrap the model"
        )
    return F.cross_entropy(logits.flatten(1).float(), labels)


def _check_options(
    gate: Any, period: Any, phase: Any, warmup: Any, weight: Any, sparsity: Any, penalty: Any, scheme: Any
) -> None:
    if not isinstance(gate, LabelSensitiveGate):
        raise OptionError(f"gate must be a LabelSensitiveGate, got {type(gate).__name__}")

    def integer(value: Any, least: int) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0

    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: integer(period, 1), f"period must be an integer of at least 1, got {period!r}"),
        (lambda: integer(phase, 0) and phase < period, f"gate_phase must lie in [0, {period!r}), got {phase!r}"),
        (lambda: integer(warmup, 0), f"warmup must be an integer of at least 0, got {warmup!r}"),
        (lambda: number(weight), f"weight must be a finite number of at least 0, got {weight!r}"),
        (lambda: number(sparsity), f"sparsity must be a finite number of at least 0, got {sparsity!r}"),
        (lambda: penalty in PENALTIES, f"penalty must be one of {list(PENALTIES)}, got {penalty!r}"),
        (lambda: scheme in SCHEMES, f"scheme must be one of {list(SCHEMES)}, got {scheme!r}"),
    ]
    for holds, message in checks:
        if not holds():
            raise OptionError(message)
