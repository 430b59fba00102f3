"""Decoupling a trained network, and pruning one to the same size, as `training.Method`s of the recipes."""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters import PathDecoupler
from captum_classfilters.assets import Network, load_network
from captum_classfilters.decoupling import DecouplingOptions

# Options of `PathDecoupler.loss` that the command line has; None there: the recipe's default
WEIGHTS = ("information", "divergence", "sparsity", "target_rate")


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        help="network.safetensors to start from: must be given for decoupled, settled, l1",
    )
    parser.add_argument(
        "--recipe",
        default="depth",
        choices=["depth", "paper"],
        help="decoupled: depth learns from the network it starts from, and its gates harden; paper is eq. 12",
    )
    parser.add_argument("--target-rate", type=float, default=0.5, help="R: share of channels that are to be open")
    parser.add_argument("--information-weight", type=float, help="the paper's lambda_m")
    parser.add_argument("--divergence-weight", type=float, help="lambda_k")
    parser.add_argument("--sparsity-weight", type=float, help="lambda_s")
    parser.add_argument("--mix", default="sample", choices=["sample", "channel", "element"])
    parser.add_argument("--macs", type=float, default=0.5, help="l1: share of the multiplications that is to remain")


def starting(path: Path | None) -> Any:
    """What `training.train` takes for a network: the one in that file, whatever the data's statistics."""
    if path is None:
        raise SystemExit("--method decoupled, settled and l1 start from a trained network: give its file with --from")

    def network(num_classes: int, mean: list[float], std: list[float]) -> Network:
        model, _ = load_network(path)
        if model.fc.out_features != num_classes:
            raise SystemExit(f"{path} has {model.fc.out_features} classes, the data {num_classes}")
        return model.train()

    return network


def options_of(options: argparse.Namespace) -> DecouplingOptions:
    """What the command line asks `PathDecoupler.loss` for."""
    asked = {
        "information": options.information_weight,
        "divergence": options.divergence_weight,
        "sparsity": options.sparsity_weight,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    make = DecouplingOptions.paper if options.recipe == "paper" else DecouplingOptions
    return make(target_rate=options.target_rate, **given)


class Decoupled:
    """Gates that are trained together with the network, from the first step on.

    ``--recipe depth``: the network as it was is the teacher, and gates lose their noise and become hard on the way.
    ``--recipe paper``: eq. 12, with noise and soft gates to the end.
    """

    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(options.seed)
        self.decoupler = PathDecoupler(model, mix=options.mix, generator=generator)
        self._lr, self._decay = options.lr, options.weight_decay
        self._options = options_of(options)
        self._steps, self._step = options.steps, 0
        self._teacher = copy.deepcopy(model).eval() if options.recipe == "depth" else None
        self._told: list[Tensor] = []

    def groups(self) -> list[dict[str, Any]]:
        own = [p for name, p in self.decoupler.named_parameters() if not name.startswith("model.")]
        return [
            {"params": [p for p in own if p.dim() > 1], "weight_decay": self._decay},
            {"params": [p for p in own if p.dim() <= 1], "weight_decay": 0.0},
        ]

    def predictor(self) -> nn.Module:
        return self.decoupler

    def before_epoch(self, epoch: int, loader: Any) -> bool:
        return False

    def loss(self, inputs: Tensor, labels: Tensor, epoch: int) -> Tensor:
        teacher = None
        if self._teacher is not None:
            self.decoupler.anneal_(min(1.0, self._step / self._steps))
            with torch.no_grad():
                teacher = self._teacher(inputs)
        found = self.decoupler.loss(inputs, labels, self._options, teacher=teacher)
        self._told.append(torch.stack([found.cross_entropy.detach(), *found.per_layer.mean(0)[[0, 1, 3]]]))
        return found.total

    def after_step(self) -> None:
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"controllers": self.decoupler.controllers_state_dict(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decoupler.load_controllers_state_dict(state["controllers"])
        self._step = state["step"]

    def report(self) -> dict[str, float]:
        values = torch.stack(self._told).mean(0).tolist()
        self._told.clear()
        return dict(zip(("cross-entropy", "of gates", "divergence", "open"), values, strict=True))

    def save(self, folder: Path) -> None:
        self.decoupler.save(folder / "paths.safetensors")


class Settled(Decoupled):
    """A decoupled network trained on with the gates that it will have: hard, without noise, controllers as they are.

    Not in the paper, where training ends with noisy gates, half of them soft.
    """

    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        super().__init__(model, options)
        self.decoupler.load(options.start.parent / "paths.safetensors")
        self.decoupler.controllers.eval()

    def groups(self) -> list[dict[str, Any]]:
        return []

    def before_epoch(self, epoch: int, loader: Any) -> bool:
        return False

    def loss(self, inputs: Tensor, labels: Tensor, epoch: int) -> Tensor:
        return F.cross_entropy(self.decoupler(inputs).float(), labels)

    def report(self) -> dict[str, float]:
        return {}


class Pruned:
    """The filters of smallest l1 norm closed for good in every gated layer (Li et al. 2017), then trained on."""

    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        from captum_classfilters.decoupling.path_measures import l1_gates

        self.decoupler = PathDecoupler(model)
        image = torch.zeros(1, *options.image_shape)
        self._gates = l1_gates(self.decoupler, image, options.macs)

    def groups(self) -> list[dict[str, Any]]:
        return []

    def predictor(self) -> nn.Module:
        return _Frozen(self.decoupler, self._gates)

    def before_epoch(self, epoch: int, loader: Any) -> bool:
        return False

    def loss(self, inputs: Tensor, labels: Tensor, epoch: int) -> Tensor:
        with self.decoupler.frozen(self._gates):
            return F.cross_entropy(self.decoupler(inputs).float(), labels)

    def after_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"gates": list(self._gates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._gates = tuple(state["gates"])

    def report(self) -> dict[str, float]:
        return {"open": float(torch.cat([gate.flatten() for gate in self._gates]).mean())}

    def save(self, folder: Path) -> None:
        torch.save(list(self._gates), folder / "gates.pt")


class _Frozen(nn.Module):
    def __init__(self, decoupler: PathDecoupler, gates: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.decoupler, self._gates = decoupler, gates

    def forward(self, images: Tensor) -> Tensor:
        with self.decoupler.frozen(self._gates):
            return self.decoupler(images)  # type: ignore[no-any-return]


def told_by_paths(options: argparse.Namespace) -> dict[str, Any]:
    """What the network's file says of how its paths came about."""
    if options.method == "l1":
        return {"macs": options.macs}
    if options.method == "settled":
        before = load_network(options.start)[1]
        told = {name: before[name] for name in ("recipe", *WEIGHTS, "mix")}
        return told | {
            "method": "decoupled",
            "seed": before["seed"],
            "epochs_before": before["epochs"],
            "settled": True,
        }
    asked = options_of(options)
    return {"recipe": options.recipe, "mix": options.mix} | {name: getattr(asked, name) for name in WEIGHTS}
