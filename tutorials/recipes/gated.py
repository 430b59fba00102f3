"""Training with a label-sensitive gate, as a `training.Method` of the recipes."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters import GatePenalty, GateSchedule, LabelSensitiveGate, LabelSensitiveTraining
from captum_classfilters.gating.label_sensitive import SCHEMES, STARTS

# What a network's file says of its gate
GATE_OPTIONS = ("sparsity", "density", "gate_lr", "gate_start", "scheme", "warmup", "gate_weight", "ablation")


def add_gate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gate-lr", type=float, default=0.1, help="peak of the gate's one-cycle schedule")
    parser.add_argument("--sparsity", type=float, default=GatePenalty().sparsity, help="the paper's a; 0: no penalty")
    parser.add_argument("--density", type=float, default=0.2, help="target mean of the gate")
    parser.add_argument("--gate-start", default=GateSchedule().start, choices=STARTS, help="before its first epoch")
    parser.add_argument("--scheme", default=GateSchedule().scheme, choices=SCHEMES)
    parser.add_argument("--warmup", type=int, default=0, help="plain epochs at the start")
    parser.add_argument("--gate-weight", type=float, default=1.0, help="of the gated loss: the paper's lambda")
    parser.add_argument("--ablation", type=float, default=1.0, help="weight of the ablated path; 0: the paper's loss")
    parser.add_argument("--exclusive", type=int, help="fixed gate: channels of each class (default: 15 K / 16 C)")


class Gated:
    """A gate before the head: joint with the network's own loss, or as Algorithm 1 of the paper."""

    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        classes, channels = model.fc.weight.shape  # type: ignore[union-attr]
        if options.method == "fixed-gate":
            # 6 of 64 for 10 classes: the paper's
            exclusive = options.exclusive or channels * 15 // (16 * classes)
            gate = LabelSensitiveGate.fixed(classes, channels, exclusive)
        else:
            gate = LabelSensitiveGate(classes, channels, generator=torch.Generator().manual_seed(options.seed))
        self._model = model
        self.gate = gate.to(next(model.parameters()).device)
        self._gate_lr = options.gate_lr
        self._training = LabelSensitiveTraining(
            model,
            self.gate,
            schedule=GateSchedule(warmup=options.warmup, scheme=options.scheme, start=options.gate_start),
            penalty=GatePenalty(options.density, options.sparsity),
            weight=options.gate_weight,
            ablation=options.ablation,
        )

    def groups(self) -> list[dict[str, Any]]:
        return [self.gate.parameter_group(self._gate_lr)] if self.gate.weight.requires_grad else []

    def predictor(self) -> nn.Module:
        return self._model  # without the gate: it would read the label

    def before_epoch(self, epoch: int, loader: Iterable[Any]) -> bool:
        return self._training.before_epoch(epoch, loader)

    def loss(self, inputs: Tensor, labels: Tensor, epoch: int) -> Tensor:
        return self._training.loss(inputs, labels, epoch)

    def after_step(self) -> None:
        self._training.after_step()

    def state_dict(self) -> dict[str, Any]:
        return {"gate": self.gate.state_dict(), "is_noise": self.gate.is_noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gate.load_state_dict(state["gate"])
        self.gate.is_noise = state["is_noise"]

    def report(self) -> dict[str, float]:
        return {"density": self.gate.density}

    def save(self, folder: Path) -> None:
        self.gate.save(folder / "gate.safetensors")
