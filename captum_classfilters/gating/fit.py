"""A whole training with a gate: optimiser, schedule, checkpoint after every epoch, exact resume."""

import copy
from collections.abc import Iterable, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer
from tqdm.auto import tqdm

from captum_classfilters.core.borrow import process_group, unwrap
from captum_classfilters.core.errors import EmptyLoaderError, FileFormatError, NonFiniteError, OptionError
from captum_classfilters.core.files import check_folder, replacing
from captum_classfilters.core.training import get_random, refuse_iterators, samplers, set_random, to_model
from captum_classfilters.gating.gate import LabelSensitiveGate

_KIND, _VERSION = "captum_classfilters gated training", 1
Schedule: TypeAlias = "torch.optim.lr_scheduler.LRScheduler"


class Steps(Protocol):
    """What is trained: `LabelSensitiveTraining`."""

    def gates(self, epoch: int) -> bool:
        """Is this epoch gated?"""

    def loss(self, inputs: Any, labels: Tensor, epoch: int) -> Tensor:
        """A scalar."""

    def after_step(self) -> None:
        """What follows a step of the optimisers."""


class Fit:
    """A training in progress; `LabelSensitiveTraining.fit` makes it and says what the arguments are.

    Args:
        model: As the training has it.
        gate: The gate.
        training: What is minimised, and what follows a step.
        options: What a checkpoint must agree in.
        optimizers: Those that step; the gate in one of them.
        schedules: Those that step after every epoch.
        max_norm: Clip gradients to this norm.
    """

    def __init__(
        self,
        model: nn.Module,
        gate: LabelSensitiveGate,
        training: Steps,
        options: dict[str, Any],
        *,
        optimizers: Sequence[Optimizer],
        schedules: Sequence[Schedule],
        max_norm: float | None,
    ) -> None:
        self._network, self._gate = unwrap(model), gate
        self._training, self._options = training, options
        self._optimizers, self._schedules, self._max_norm = optimizers, schedules, max_norm
        self._trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        if gate.weight.requires_grad and all(p is not gate.weight for p in self._trained):
            raise OptionError(
                "no optimiser has the gate, so it would not be trained; add it with "
                "optimizer.add_param_group(gate.parameter_group(lr=...)), or pass lr= and no optimizer"
            )
        for schedule in schedules:
            if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                raise OptionError(
                    "ReduceLROnPlateau waits for a loss, and those of gated and plain epochs cannot be compared; pass "
                    "a scheduler that counts epochs"
                )
            if all(schedule.optimizer is not optimizer for optimizer in optimizers):
                raise OptionError("the scheduler was made for an optimiser that was not given; pass it in optimizer=")
        first = next(self._network.parameters())
        self._device, self._dtype = first.device, first.dtype
        self._group = process_group(model)
        self._rank = 0 if self._group is None else dist.get_rank(self._group)
        self.history: list[dict[str, Any]] = []

    def run(self, loader: Iterable[Any], epochs: int, checkpoint: Path | None, show_progress: bool) -> None:
        """Train up to ``epochs``, from where the checkpoint stands."""
        if checkpoint is not None:
            check_folder(checkpoint)
            self._resume(checkpoint, loader)
        if epochs - len(self.history) > 1:
            refuse_iterators(loader, "loader")
        modes = [module.training for module in self._network.modules()]
        if not self._network.training:
            self._network.train()
        try:
            for epoch in range(len(self.history), epochs):
                self._one_epoch(loader, epoch, f"epoch {epoch + 1}/{epochs}", show_progress)
                if checkpoint is not None:
                    self._save(checkpoint, loader)
        finally:
            for module, mode in zip(self._network.modules(), modes, strict=True):
                module.training = mode

    def _one_epoch(self, loader: Iterable[Any], epoch: int, description: str, show_progress: bool) -> None:
        for sampler in samplers(loader):
            if callable(shuffle := getattr(sampler, "set_epoch", None)):
                shuffle(epoch)
        total, samples = torch.zeros((), dtype=torch.float64, device=self._device), 0
        hidden = not show_progress or self._rank != 0
        with tqdm(iter(loader), desc=description, disable=hidden, total=length_hint(loader) or None) as bar:
            for index, raw in enumerate(bar):
                inputs, labels = to_model(raw, index, self._device, self._dtype)
                if not len(labels):
                    continue
                for optimizer in self._optimizers:
                    optimizer.zero_grad()
                loss = self._training.loss(inputs, labels, epoch)
                loss.backward()  # type: ignore[no-untyped-call]
                if self._max_norm is not None:
                    nn.utils.clip_grad_norm_(self._trained, self._max_norm)
                for optimizer in self._optimizers:
                    optimizer.step()
                self._training.after_step()
                total += loss.detach() * len(labels)
                samples += len(labels)
        if not samples:
            raise EmptyLoaderError(
                f"the loader gave no batch in epoch {epoch}; expected at least one. An iterator can be read only "
                "once: pass the DataLoader itself"
            )
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._network.parameters()):
            raise NonFiniteError(
                f"the network became NaN or infinite in epoch {epoch}; a checkpoint is of the epoch before. Lower the "
                "learning rate, or clip gradients by max_norm="
            )
        for schedule in self._schedules:
            schedule.step()
        told = {"epoch": epoch, "gated": self._training.gates(epoch), "loss": float(total) / samples}
        self.history.append({**told, "density": self._gate.density})

    # -- the checkpoint --------------------------------------------------------------------------------------------

    def _save(self, path: Path, loader: Any) -> None:
        own = {"counts": self._gate.counts.cpu(), "history": self.history}
        ranks = self._all_ranks({**own, **get_random(self._device, loader)})
        if self._rank == 0:
            self._write(path, ranks)
        if self._group is not None:
            # none goes on, or starts anew, from a file that is not there yet
            dist.barrier(self._group)

    def _write(self, path: Path, ranks: list[Any]) -> None:
        state = {
            "kind": _KIND, "version": _VERSION, "options": self._options, "network": self._network.state_dict(),
            "gate": self._gate.state_dict(), "optimizers": [found.state_dict() for found in self._optimizers],
            "schedules": [found.state_dict() for found in self._schedules], "ranks": ranks, "layer": self._gate.layer,
        }  # fmt: skip
        with replacing(path) as beside:
            torch.save(state, beside)

    def _all_ranks(self, mine: Any) -> list[Any]:
        if self._group is None:
            return [mine]
        told: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(told, mine, self._group)
        return told

    def _resume(self, path: Path, loader: Any) -> None:
        there = self._all_ranks(path.is_file())
        if len(set(there)) > 1:
            raise FileFormatError(
                f"only ranks {[rank for rank, found in enumerate(there) if found]} of {len(there)} see {path}; put it "
                "where all of them can read it, or delete it to start anew"
            )
        if not there[0]:
            return
        parts = [self._gate, self._network, *self._optimizers, *self._schedules]
        before = [copy.deepcopy(part.state_dict()) for part in parts]
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
            if (state["kind"], state["version"]) != (_KIND, _VERSION):
                raise ValueError(f"kind and version are {state['kind']}, {state['version']}")
            odd = {k: (state["options"].get(k), v) for k, v in self._options.items() if state["options"].get(k) != v}
            if odd:
                told = ", ".join(f"{name} was {was!r}, is {now!r}" for name, (was, now) in sorted(odd.items()))
                raise ValueError(f"it was made with other options: {told}")
            found = [state["gate"], state["network"], *state["optimizers"], *state["schedules"]]
            for part, saved in zip(parts, found, strict=True):
                part.load_state_dict(saved)
            mine = state["ranks"][self._rank]
            self._gate.counts.copy_(mine["counts"])
            self._gate.layer = state["layer"]
            set_random(mine, self._device, loader)
            self.history = mine["history"]
        except Exception as error:  # torch.load tells a broken file by many kinds of error
            for part, saved in zip(parts, before, strict=True):
                part.load_state_dict(saved)
            raise FileFormatError(
                f"{path} is not a whole checkpoint of this training ({error}); delete it to start anew, or pass the "
                "model, gate and options it was made with"
            ) from error


def default_optimizer(network: nn.Module, gate: LabelSensitiveGate, lr: float, gate_lr: float | None) -> Optimizer:
    """The paper's: SGD with momentum 0.9 and one learning rate for both; the gate has no momentum."""
    groups: list[dict[str, Any]] = [{"params": [p for p in network.parameters() if p.requires_grad]}]
    if gate.weight.requires_grad:
        groups.append(gate.parameter_group(lr if gate_lr is None else gate_lr))
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def as_list(value: Any, kind: type, name: str) -> list[Any]:
    """One or several of ``kind`` as a list."""
    several = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(found, kind) for found in several):
        got = ", ".join(type(found).__name__ for found in several)
        raise OptionError(f"{name} must be a {kind.__name__} or a list of several, got {got}")
    return several
