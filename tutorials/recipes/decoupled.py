"""Decoupling a trained network, and pruning one to the same size, as `training.Method`s of the recipes."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters import PathDecoupler
from captum_classfilters.assets import Network, load_network

WEIGHTS = ("information_weight", "divergence_weight", "sparsity_weight", "target_rate", "mix")


def add_path_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        help="network.safetensors to start from: must be given for decoupled, settled, l1",
    )
    parser.add_argument("--target-rate", type=float, default=0.5, help="R: share of channels that are to be open")
    parser.add_argument("--information-weight", type=float, default=1.0, help="the paper's lambda_m")
    parser.add_argument("--divergence-weight", type=float, default=1.0, help="lambda_k")
    parser.add_argument("--sparsity-weight", type=float, default=0.003, help="lambda_s")
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


class Decoupled:
    """Eq. 12 of the paper, from the first step on."""

    def __init__(self, model: nn.Module, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(options.seed)
        self.decoupler = PathDecoupler(model, mix=options.mix, generator=generator)
        self._lr, self._decay = options.lr, options.weight_decay
        self._weights = {
            "information_weight": options.information_weight,
            "divergence_weight": options.divergence_weight,
            "sparsity_weight": options.sparsity_weight,
            "target_rate": options.target_rate,
        }
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
        found = self.decoupler.loss(inputs, labels, **self._weights)
        self._told.append(torch.stack([found.cross_entropy.detach(), *found.per_layer.mean(0)[[0, 1, 3]]]))
        return found.total

    def after_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return self.decoupler.controllers_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decoupler.load_controllers_state_dict(state)

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
        told = {name: before[name] for name in WEIGHTS}
        return told | {
            "method": "decoupled",
            "seed": before["seed"],
            "epochs_before": before["epochs"],
            "settled": True,
        }
    return {name: getattr(options, name) for name in WEIGHTS}
