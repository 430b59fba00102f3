"""Training with a gate: which epochs take the gated path, what their loss is, and the whole loop as `fit`.

`core/training.py` holds the loop. N samples, C classes, K channels.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from captum_classfilters.class_filters import UNKNOWN_LAYER
from captum_classfilters.core.borrow import borrowed, process_group, unwrap, without_compile
from captum_classfilters.core.check import integer, number, one_of
from captum_classfilters.core.class_sums import ClassSums
from captum_classfilters.core.errors import DeviceError, HeadError, NonFiniteError, OptionError, ShapeError, quoted
from captum_classfilters.core.head import Head
from captum_classfilters.core.head_pass import HeadPass, single_batch
from captum_classfilters.core.outputs import LogitReader, cross_entropy
from captum_classfilters.core.ranks import sum_over
from captum_classfilters.core.stream import Placement, refuse_iterator
from captum_classfilters.core.training import Checkpoint, Schedule, Task, Training
from captum_classfilters.gating.gate import GatePenalty, LabelSensitiveGate, gated, lost_label

SCHEMES = ("joint", "alternating")
STARTS = ("contribution", "mean_activation", "noise", "constant")


@dataclass(frozen=True)
class GateSchedule:
    """Which epochs of a training are gated, and what the gate is before the first of them.

    Source: "Training interpretable CNNs towards class-specific filters", Algorithm 1; footnote 1 for ``"joint"``.
    Differs: the paper alternates; here ``"joint"`` is the default, because a gated epoch alone leaves the plain path
    untrained. The paper does not say how its gate starts, and its published code starts from a constant.

    Attributes:
        period: Epochs from one gated epoch to the next, where they alternate.
        phase: Epochs with ``epoch % period == phase`` are gated then, counted from 0.
        warmup: This many first epochs are plain.
        scheme: ``"joint"``: both losses in every epoch after the warm-up, from one forward pass; or ``"alternating"``,
            as Algorithm 1.
        start: What a new gate becomes before the first gated epoch, from one pass over the loader:
            ``"contribution"``, the positive part of each class's mean contribution, weight times feature;
            ``"mean_activation"``, each class's mean feature; both over the largest of all classes. ``"noise"`` and
            ``"constant"`` need no pass and are for comparison. A gate that was set, loaded or trained stays as it is.

    Raises:
        OptionError: An option is out of range.

    Example:
        >>> [epoch for epoch in range(9) if GateSchedule(scheme="alternating").gates(epoch)]
        [1, 4, 7]
        >>> [epoch for epoch in range(6) if GateSchedule(warmup=3).gates(epoch)]
        [3, 4, 5]
    """

    period: int = 3
    phase: int = 1
    warmup: int = 0
    scheme: str = "joint"
    start: str = "contribution"

    def __post_init__(self) -> None:
        object.__setattr__(self, "period", integer(self.period, "period", 1))
        object.__setattr__(self, "phase", integer(self.phase, "phase", 0, self.period - 1, meaning="below the period"))
        object.__setattr__(self, "warmup", integer(self.warmup, "warmup"))
        one_of(self.scheme, "scheme", SCHEMES)
        one_of(self.start, "start", STARTS)

    def gates(self, epoch: int) -> bool:
        """Is this epoch, counted from 0, gated?

        Raises:
            OptionError: ``epoch`` is not an integer of at least 0.
        """
        epoch = integer(epoch, "epoch")
        if epoch < self.warmup:
            return False
        return self.scheme == "joint" or epoch % self.period == self.phase


class LabelSensitiveTraining:
    """The loss of each epoch, for your own loop: through the gate, plain, or both.

        training = LabelSensitiveTraining(model, gate)
        optimizer = SGD([{"params": model.parameters()}, gate.parameter_group(lr=0.1)], lr=0.1, momentum=0.9)
        for epoch in range(epochs):
            training.before_epoch(epoch, loader)
            for x, y in loader:
                optimizer.zero_grad()
                training.loss(x, y, epoch).backward()
                optimizer.step()
                training.after_step()

    Gated epochs minimise ``weight * (CE of the gated path + sparsity * penalty + ablation * A)`` over network and gate,
    joint ones also the cross-entropy of the network, plain ones that alone. A is what the ablated path costs: without
    the channels of its class (features times ``1 - G[y]``) a sample is to lose its label, ``-log(1 - p_y)``; without
    those of another class, which differs from step to step, it is to keep it, ``-log p_y``. Clip, accumulate and cast
    as always; call `after_step` after each optimiser step.

    Under DistributedDataParallel the gate stays outside of the wrapper: it starts as rank 0's, and its gradients are
    averaged over the ranks here.

    Source: "Training interpretable CNNs towards class-specific filters", Algorithm 1. Differs: the ablated path, which
    the paper has not (``ablation=0``). Without it the data hardly move the gate, because the gated path knows the label
    and its loss is near zero from the start. `project` instead of its lines 7 and 8; the gate has no
    momentum (`LabelSensitiveGate.parameter_group`); a step whose loss or gate is NaN is undone.

    Args:
        model: The network, on its device, plain or wrapped in DistributedDataParallel.
        gate: C x K of the network's head, on the same device.
        schedule: Which epochs are gated.
        penalty: What keeps the gate sparse.
        weight: Weight of the gated loss: the paper's lambda.
        ablation: Weight of the ablated path within it; 0: none.
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
        schedule: GateSchedule = GateSchedule(),
        penalty: GatePenalty = GatePenalty(),
        weight: float = 1.0,
        ablation: float = 1.0,
        layer: nn.Module | str | None = None,
    ) -> None:
        if not isinstance(gate, LabelSensitiveGate):
            raise OptionError(f"gate must be a LabelSensitiveGate, got {type(gate).__name__}")
        if isinstance(without_compile(model), nn.DataParallel):
            raise OptionError("DataParallel copies the head in every step; wrap the model in DistributedDataParallel")
        if not isinstance(model, nn.Module):
            raise OptionError(f"the model must be an nn.Module, got {type(model).__name__}")
        self.model, self.gate = model, gate
        self.schedule, self.penalty, self.density = schedule, penalty, penalty.density_for(gate.num_classes)
        self.weight, self.ablation = number(weight, "weight", 0), number(ablation, "ablation", 0)
        self._layer = layer
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
        return self.schedule.gates(epoch)

    def before_epoch(self, epoch: int, loader: Iterable[Any]) -> bool:
        """Start a new gate before the first gated epoch, as `GateSchedule.start` says: one pass over the loader.

        Args:
            epoch: Counted from 0.
            loader: Batches ``(inputs, labels)`` of training images; under DDP each rank's own.

        Returns:
            Whether the gate was started now.

        Raises:
            OptionError: A class has no samples.
            ShapeError, HeadError: The gate does not fit the head, or the head cannot be found.
        """
        if not (self.gate.is_noise and self.gate.weight.requires_grad and self.gates(epoch)):
            return False
        start = self.schedule.start
        if start == "noise":
            self.gate.is_noise = False
        elif start == "constant":
            self.gate.start_(torch.ones_like(self.gate.weight))
        else:
            self.gate.start_(self._class_table(loader, start))
        return True

    def _class_table(self, loader: Iterable[Any], start: str) -> Tensor:
        """``(C, K)``: the mean of each feature over a class's samples, or what it adds to the class's logit."""
        refuse_iterator(loader, "loader")
        head_pass = HeadPass(self._network, loader, layer=self._layer)
        sums: ClassSums | None = None
        with head_pass.batches(num_classes=self.gate.num_classes, description="start of the gate") as stream:
            for batch in stream:
                if sums is None:
                    self._keep_head(batch.head)
                    sums = ClassSums(self.gate.num_classes, self.gate.num_channels, ["total"], batch.features.device)
                sums.add(batch.labels, {"total": batch.features})  # type: ignore[arg-type]
        # an empty loader has raised
        counts, total = sums.counts, sums["total"]  # type: ignore[union-attr, index]
        if self._group is not None:
            parts, _ = sum_over(
                self._group, {"counts": counts, "total": total}, tuple(total.shape), network=self._network
            )
            counts, total = parts["counts"], parts["total"]
        if not bool((counts > 0).all()):
            missing = (counts == 0).nonzero().flatten().tolist()
            raise OptionError(
                f"no sample of class {quoted(missing)} in the loader, so nothing is known of its channels; give images "
                'of all classes, or GateSchedule(start="noise")'
            )
        means = total / counts[:, None]
        return means if start == "mean_activation" else means * head_pass.head.weight.to(means.device)

    def loss(self, inputs: Any, labels: Tensor, epoch: int) -> Tensor:
        """One forward pass; the loss of this epoch, a scalar to call ``backward`` on.

        Args:
            inputs: A tensor, or a tuple of several; they follow the model's device and dtype.
            labels: ``(N,)`` integers, on the model's device.
            epoch: Counted from 0.

        Raises:
            NonFiniteError: The loss is NaN or infinite; running statistics are as before this pass.
            LabelError, DeviceError: The labels do not fit the gate.
            ShapeError, HeadError: The gate does not fit the head, or the head cannot be found.
            OptionError: ``epoch`` is not an integer of at least 0.
        """
        gated = self.gates(epoch)
        inputs = tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
        inputs = tuple(Placement.of(self._network).move(value) for value in inputs)
        labels = self.gate.check_labels(labels, len(inputs[0]))
        if gated and self.gate.is_noise and self.gate.weight.requires_grad:
            raise OptionError(
                f"epoch {epoch} is gated, and the gate was not started; call before_epoch(epoch, loader) before each "
                "epoch, as fit does"
            )
        head = self._find_head(inputs)
        if epoch != self._epoch:
            self._epoch, self._step = int(epoch), 0
        self._before.keep([*self._network.buffers(), self.gate.counts], self._parameters if gated else [])
        self._gated = self._gated or gated
        try:
            if not gated:
                # neither a gradient from a gated step nor an optimiser's momentum may move the gate
                self.gate.weight.grad = None
                loss = self._entropy(inputs, labels)
            elif self.schedule.scheme == "joint":
                loss = self._joint(head, inputs, labels)
            else:
                loss = self.weight * (self._gated_losses(head, inputs, labels) + self._penalty())
            self._check(loss)
        except BaseException:
            self._before.restore_statistics()
            raise
        return loss

    def after_step(self) -> None:
        """After each step of the optimiser: project the gate; after a gated step, check that all is finite.

        Raises:
            NonFiniteError: A gated step left NaN or infinity; network and gate are as before it. The optimiser's state
                stays as the step left it.
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
        lr: float | tuple[float, float] = 0.1,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: Any = None,
        max_norm: float | None = None,
        checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
        show_progress: bool = False,
    ) -> list[dict[str, Any]]:
        """The whole loop: trains the model and the gate in place.

        A run that was killed and is started again the same way ends as one that was not: the checkpoint holds network,
        gate, optimisers, schedulers and the state of all generators (torch, numpy, Python, the loader's). It does not
        hold the states of workers that a loader keeps from one epoch to the next.

        Args:
            loader: Batches ``(inputs, labels)``, read once for each epoch; under DDP each rank's own.
            epochs: How many, those of the checkpoint included. The last one should be plain. A run can be lengthened:
                with more epochs than when the checkpoint was written, the rest follows the cosine over all of them.
            lr: Learning rate of SGD with momentum 0.9, the paper's optimiser; it falls to 0 as a cosine over the
                epochs. One number for network and gate, as in the paper, or two, ``(network, gate)``.
            optimizer: One or several of your own instead, the gate among their parameters.
            scheduler: One or several for your own optimizer, stepped after every epoch, plain or gated.
            max_norm: Clip gradients to this norm.
            checkpoint: A file, or a `Checkpoint` that says how often it is written; rank 0 writes it. If the file is
                there at the start, training goes on from it.
            show_progress: A tqdm bar for each epoch.

        Returns:
            ``epoch``, ``gated``, mean ``loss`` (of a gated epoch with the penalty, so not to be compared with a plain
            one's) and the gate's ``density`` of every epoch.

        Raises:
            NonFiniteError: A loss or the gate is NaN or infinite, and network and gate are as before that step; or the
                network is at the end of an epoch, and the checkpoint is older.
            FileFormatError: The checkpoint is broken, or of another training or version.
            OptionError: An option is out of range, or an optimiser or scheduler would not train the gate.
            EmptyLoaderError: The loader gave no batch.
        """
        epochs = integer(epochs, "epochs", 1)
        rates = lr if isinstance(lr, tuple | list) and len(lr) == 2 else (lr, lr)
        rates = (number(rates[0], "lr", 0, open_ends=True), number(rates[1], "lr", 0, open_ends=True))
        max_norm = None if max_norm is None else number(max_norm, "max_norm", 0, open_ends=True)
        options = {**asdict(self.schedule), **asdict(self.penalty), "density": self.density, "weight": self.weight}
        options["ablation"] = self.ablation
        if optimizer is None:
            if scheduler is not None:
                raise OptionError(
                    "a scheduler steps the optimiser that it was made for, and none was given; pass optimizer= as well"
                )
            options |= {"lr": rates}
            optimizers = [self._paper_optimizer(*rates)]
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], epochs)
        else:
            optimizers = _as_list(optimizer, Optimizer, "optimizer")
        schedules = [] if scheduler is None else _as_list(scheduler, torch.optim.lr_scheduler.LRScheduler, "scheduler")
        _check_optimizers(self.gate, optimizers, schedules)
        # an earlier run may have ended in the middle of a step
        self._epoch, self._step, self._before = -1, 0, _Before()
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        training = Training(
            self._network, _GatedTask(self, trained, max_norm, loader, epochs), optimizers, schedules=schedules,
            checkpoint=Checkpoint.of(checkpoint), options=options, group=self._group,
        )  # fmt: skip
        training.resume(loader)
        if optimizer is None:
            _fall_over(scheduler, epochs, rates)
        training.run(loader, epochs, show_progress)
        return training.history

    def _paper_optimizer(self, lr: float, gate_lr: float) -> Optimizer:
        """SGD with momentum 0.9; the gate has no momentum."""
        groups: list[dict[str, Any]] = [{"params": [p for p in self._network.parameters() if p.requires_grad]}]
        if self.gate.weight.requires_grad:
            groups.append(self.gate.parameter_group(gate_lr))
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)

    # -- the paths -------------------------------------------------------------------------------------------------

    def _entropy(self, inputs: tuple[Any, ...], labels: Tensor) -> Tensor:
        with LogitReader() as reader:
            logits = reader.logits(self.model(*inputs))
        if logits.dim() < 2 or logits.flatten(1).shape[1] != logits.shape[1]:
            raise HeadError(
                f"expected a model that returns logits (N, C), got shape {tuple(logits.shape)}; wrap the model"
            )
        return cross_entropy(logits.flatten(1), labels)

    def _gated_losses(self, head: Head, inputs: tuple[Any, ...], labels: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def through_gate(module: nn.Module, args: Any) -> Any:
            if module is head.module:
                seen.append(args[0])
            return (self._through_gate(module, args[0], labels), *args[1:])

        with borrowed(self.model, train=True) as borrow:
            for module in head.modules:
                borrow.before(module, through_gate)
            entropy = self._entropy(inputs, labels)
        return entropy + self._ablated(head, seen[0], labels)

    def _joint(self, head: Head, inputs: tuple[Any, ...], labels: Tensor) -> Tensor:
        seen: list[Tensor] = []
        with borrowed(self.model, train=True) as borrow:
            borrow.before(head.module, lambda module, args: seen.append(args[0]))
            plain = self._entropy(inputs, labels)
        through = self._through_gate(head.module, seen[0], labels)
        losses = cross_entropy(_behind(head, through), labels) + self._ablated(head, seen[0], labels)
        return plain + self.weight * (losses + self._penalty())

    def _through_gate(self, module: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
        return _channels_second(module, features, lambda values: self.gate(values, labels))

    def _ablated(self, head: Head, features: Tensor, labels: Tensor) -> Tensor | float:
        """A: a sample loses its label without its class's channels, and keeps it without another class's."""
        if not self.ablation or self.gate.num_classes == 1:
            return 0.0
        closed = 1 - self.gate.weight

        def without(classes: Tensor) -> Tensor:
            through = _channels_second(head.module, features, lambda values: gated(values, classes, closed))
            return _behind(head, through)

        # the same in every run, and resumed in the middle of an epoch
        shift = 1 + (self._epoch * 1_000_003 + self._step) % (self.gate.num_classes - 1)
        kept = cross_entropy(without((labels + shift) % self.gate.num_classes), labels)
        return self.ablation * (lost_label(without(labels), labels) + kept)

    def _penalty(self) -> Tensor | float:
        # the penalty of a gate that is not trained is a constant
        if not self.gate.weight.requires_grad:
            return 0.0
        return self.penalty.sparsity * self.gate.penalty(self.density, self.penalty.kind)

    def _find_head(self, inputs: tuple[Any, ...]) -> Head:
        if self._head is None:
            # NaN is replaced here: the check of the loss reports it, on all ranks at once
            few = tuple(part[:2].nan_to_num(0, 0, 0) if isinstance(part, Tensor) else part for part in inputs)
            self._keep_head(single_batch(self._network, few, layer=self._layer).head)
        return self._head  # type: ignore[return-value]

    def _keep_head(self, head: Head) -> None:
        if self._head is None:
            if (head.num_classes, head.num_features) != self.gate.weight.shape:
                raise ShapeError(
                    f"the head {head.name!r} is {head.num_classes} classes x {head.num_features} channels, the gate "
                    f"{self.gate.num_classes} x {self.gate.num_channels}; make "
                    f"LabelSensitiveGate({head.num_classes}, {head.num_features})"
                )
            if self.gate.layer not in (UNKNOWN_LAYER, head.name):
                raise OptionError(
                    f"the gate is of layer {self.gate.layer!r}, the head of this network is {head.name!r}; make the "
                    "gate from a table of this head"
                )
            self._head, self.gate.layer = head, head.name

    def _check(self, loss: Tensor) -> None:
        mine = finite = torch.isfinite(loss.detach()).all()
        if self._group is not None:
            # all ranks or none: one alone would leave the others waiting
            flag = finite.int()
            dist.all_reduce(flag, dist.ReduceOp.MIN, self._group)
            finite = flag.bool()
        if not bool(finite):
            state = "of another rank is NaN or infinite" if bool(mine) else f"is {float(loss.detach())}"
            raise NonFiniteError(
                f"the loss {state} in epoch {self._epoch}, step {self._step}; no step was taken, network and gate are "
                "as before. Lower the learning rates or sparsity, or look at that batch"
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


def _behind(head: Head, features: Tensor) -> Tensor:
    """``(N, C)``: what the head makes of its input."""
    parts = [head.pool(part.module(features)) * part.factor for part in head.all_parts]
    logits = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return logits + logits.new_tensor(head.offset) if head.offset else logits


def _channels_second(module: nn.Module, features: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``change`` of features whose channels are at dimension 1, given back as the head ``module`` reads them."""
    if not isinstance(module, nn.Linear) or features.dim() == 2:
        return change(features)
    # a Linear at several positions: channels last
    return change(features.movedim(-1, 1)).movedim(1, -1)


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


class _GatedTask(Task):
    """`LabelSensitiveTraining` as a task of the common loop."""

    name = "LabelSensitiveTraining"

    def __init__(
        self,
        training: LabelSensitiveTraining,
        trained: list[Tensor],
        max_norm: float | None,
        loader: Iterable[Any],
        epochs: int,
    ) -> None:
        self._training, self._gate = training, training.gate
        self._trained, self._max_norm = trained, max_norm
        self._loader, self._epochs = loader, epochs

    def loss(self, inputs: tuple[Any, ...], labels: Tensor, epoch: int, place: int) -> Tensor:
        """The loss of this epoch."""
        return self._training.loss(inputs, labels, epoch)

    def before_step(self) -> None:
        """Clip the gradients."""
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self._trained, self._max_norm)

    def after_step(self) -> None:
        """Project the gate."""
        self._training.after_step()

    def between_epochs(self, epoch: int) -> bool:
        """Start a new gate before the first gated epoch."""
        return epoch < self._epochs and self._training.before_epoch(epoch, self._loader)

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        """Was the epoch gated, and the gate's density; refuses a network that is no longer finite."""
        parameters = unwrap(self._training.model).parameters()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            raise NonFiniteError(
                f"the network became NaN or infinite in epoch {epoch}; a checkpoint is of the epoch before. Lower the "
                "learning rate, or clip gradients by max_norm="
            )
        return {"gated": self._training.gates(epoch), "density": self._gate.density}

    def state_dict(self) -> dict[str, Any]:
        """The gate."""
        at = [self._training._epoch, self._training._step]
        state = {"gate": self._gate.state_dict(), "layer": self._gate.layer, "is_noise": self._gate.is_noise}
        return {**state, "at": at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._gate.load_state_dict(state["gate"])
        self._gate.layer, self._gate.is_noise = state["layer"], state["is_noise"]
        # which other class a step ablates depends on it
        self._training._epoch, self._training._step = state["at"]

    def rank_state(self) -> dict[str, Any]:
        """Each rank counts its own samples."""
        return {"counts": self._gate.counts.cpu()}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Take back what `rank_state` gave."""
        self._gate.counts.copy_(state["counts"])


def _check_optimizers(gate: LabelSensitiveGate, optimizers: list[Optimizer], schedules: list[Schedule]) -> None:
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    if gate.weight.requires_grad and all(p is not gate.weight for p in trained):
        raise OptionError(
            "no optimiser has the gate, so it would not be trained; add it with "
            "optimizer.add_param_group(gate.parameter_group(lr=...)), or pass lr= and no optimizer"
        )
    for schedule in schedules:
        if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise OptionError(
                "ReduceLROnPlateau waits for a loss, and those of gated and plain epochs cannot be compared; pass a "
                "scheduler that counts epochs"
            )
        if all(schedule.optimizer is not optimizer for optimizer in optimizers):
            raise OptionError("the scheduler was made for an optimiser that was not given; pass it in optimizer=")


def _fall_over(schedule: torch.optim.lr_scheduler.CosineAnnealingLR, epochs: int, rates: tuple[float, ...]) -> None:
    """Make the cosine of a resumed run one over ``epochs``, where the checkpoint's was over more or fewer."""
    if schedule.T_max == epochs:
        return
    schedule.T_max = epochs
    share = (1 + math.cos(math.pi * min(schedule.last_epoch, epochs) / epochs)) / 2
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=False):
        group["lr"] = rate * share


def _as_list(value: Any, kind: type, name: str) -> list[Any]:
    """One or several of ``kind`` as a list."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(entry, kind) for entry in values):
        types = ", ".join(type(entry).__name__ for entry in values)
        raise OptionError(f"{name} must be of type {kind.__name__}, or a list of several, got {types}")
    return values
