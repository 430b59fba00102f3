"""One training loop for the recipes: stops and resumes without loss.

What differs between recipes goes in as data, a network and a function that augments a batch.
``OUT/network.safetensors`` is what `captum_classfilters.assets.load_network` reads; ``OUT/resume.pt`` is the checkpoint
of `captum_classfilters.core.training`. The network is the one of the last epoch; test images are looked at once, at
the end.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from data import Data
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.assets import Network, save_network
from captum_classfilters.core.training import Checkpoint, Task, Training

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser, *, epochs: int, lr: float = 0.1) -> None:
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=lr, help="peak of the one-cycle schedule")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *PRECISIONS),
        help="auto: the faster one, by timing a step of each",
    )
    parser.add_argument("--limit", type=int, default=None, help="only so many images of each split (for a trial)")
    parser.add_argument("--stop-after", type=int, default=None, help="stop after so many epochs; a later call resumes")


def precision_of(options: argparse.Namespace, model: nn.Module, images: Tensor) -> str:
    """The precision that ``--precision`` names; for ``auto`` that of the run that is resumed, or the faster one.

    Autocast to bfloat16 is fast on a GPU and on a CPU with AVX-512 or AMX. On other CPUs a step takes ten times as
    long as in float32.
    """
    kept = options.out / "precision.txt"
    if options.precision != "auto":
        precision = options.precision
    elif kept.is_file():
        precision = kept.read_text().strip()
    else:
        seconds = {name: _seconds_of_a_step(model, images, PRECISIONS[name]) for name in PRECISIONS}
        precision = min(seconds, key=seconds.__getitem__)
        print(f"a step takes {', '.join(f'{value:.3f} s in {name}' for name, value in seconds.items())}")
    print(f"precision: {precision}", flush=True)
    kept.write_text(precision + "\n")
    return precision


def _seconds_of_a_step(model: nn.Module, images: Tensor, dtype: torch.dtype) -> float:
    """Forward and backward pass of one batch on a copy of the network; the first of two passes warms up."""
    copied = copy.deepcopy(model)
    device = next(copied.parameters()).device
    inputs = as_input(images, device)
    with torch.random.fork_rng():  # dropout draws nothing from the training's own numbers
        for _ in range(2):
            started = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = copied(inputs).float().square().mean()
            loss.backward()
            float(loss.detach())  # waits for a GPU
    return time.perf_counter() - started


class Method(Protocol):
    """What a way of training adds to the loop: a loss, what follows a step, and parameters of its own.

    ``predictor`` is the module whose test accuracy is reported; ``groups`` are the optimizer's, besides the network's.
    """

    def groups(self) -> list[dict[str, Any]]: ...
    def predictor(self) -> nn.Module: ...
    def before_epoch(self, epoch: int, loader: Iterable[Any]) -> bool: ...
    def loss(self, inputs: Tensor, labels: Tensor, epoch: int) -> Tensor: ...
    def after_step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def report(self) -> dict[str, float]: ...
    def save(self, folder: Path) -> None: ...


class Standard:
    """Cross-entropy, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def groups(self) -> list[dict[str, Any]]:
        return []

    def predictor(self) -> nn.Module:
        return self._model

    def before_epoch(self, epoch: int, loader: Iterable[Any]) -> bool:
        return False

    def loss(self, inputs: Tensor, labels: Tensor, epoch: int) -> Tensor:
        return F.cross_entropy(self._model(inputs).float(), labels)

    def after_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def report(self) -> dict[str, float]:
        return {}

    def save(self, folder: Path) -> None:
        pass


def as_input(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device, non_blocking=True).float().div_(255).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    model.eval()
    right = sum(
        int((model(as_input(x, device)).argmax(1).cpu() == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    model.train()
    return right / len(labels)


def optimiser(model: nn.Module, method: Method, options: argparse.Namespace) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.SGD(
        [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": others, "weight_decay": 0.0},
            *method.groups(),
        ],
        lr=options.lr, momentum=0.9, nesterov=True,
    )  # fmt: skip


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Up for a fifth of the steps, then down; a group that has no momentum is not given one."""
    groups = optimizer.param_groups
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=steps,
        pct_start=0.2,
        base_momentum=[0.85 if group["momentum"] else 0.0 for group in groups],
        max_momentum=[0.95 if group["momentum"] else 0.0 for group in groups],
    )


class _Batches:
    """Augmented images, in a new order in each epoch; `Training` keeps the state of the generator."""

    def __init__(
        self, data: tuple[Tensor, Tensor], count: int, size: int, device: torch.device, generator: torch.Generator,
        augment: Callable[[Tensor, torch.Generator], Tensor],
    ) -> None:  # fmt: skip
        self._images, self._labels = data
        self._count, self._size, self._device, self._augment = count, size, device, augment
        self.generator = generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._images), generator=self.generator)[: self._count]
        for batch in order.split(self._size):
            yield as_input(self._augment(self._images[batch], self.generator), self._device), self._labels[batch]


class _RecipeTask(Task):
    """A `Method` in the chosen precision, with a schedule that steps after every batch."""

    name = "recipe"

    def __init__(
        self,
        method: Method,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        device: torch.device,
        precision: str,
        loader: Iterable[Any],
        epochs: int,
    ) -> None:
        self._method, self._schedule = method, schedule
        self._loader, self._epochs = loader, epochs
        self._device, self._dtype = device, PRECISIONS[precision]

    def loss(self, inputs: tuple[Any, ...], labels: Tensor, epoch: int, index: int) -> Tensor:
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self._method.loss(inputs[0], labels, epoch)

    def between_epochs(self, epoch: int) -> bool:
        return epoch < self._epochs and self._method.before_epoch(epoch, self._loader)

    def after_step(self) -> None:
        self._method.after_step()
        self._schedule.step()

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        return self._method.report()

    def state_dict(self) -> dict[str, Any]:
        return {"method": self._method.state_dict(), "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._method.load_state_dict(state["method"])
        self._schedule.load_state_dict(state["schedule"])


def train(
    options: argparse.Namespace,
    data: Data,
    network: Callable[[int, list[float], list[float]], Network],
    augment: Callable[[Tensor, torch.Generator], Tensor],
    *,
    images_per_epoch: int | None = None,
    meta: Mapping[str, Any] | None = None,
    method: Callable[[Any], Method] = Standard,
) -> None:
    """Train, from where ``options.out`` stands.

    Args:
        options: What `add_arguments` adds.
        data: Images as bytes; those for testing as they are to be judged.
        network: Takes C, and mean and deviation of each colour of images in [0, 1].
        augment: Takes a batch of bytes and the generator of its randomness.
        images_per_epoch: A random so many of the training images each epoch; None: all.
        meta: What else the file is to say.
        method: Takes the network; what is minimised.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    images, labels = (part[: options.limit] for part in data.train)
    pixels = images.float().div_(255)
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()
    del pixels
    model = network(len(data.class_names), mean, std).to(device).to(memory_format=torch.channels_last)
    precision = precision_of(options, model, images[: options.batch_size])
    count = min(len(images), images_per_epoch or len(images))
    options.steps = -(-count // options.batch_size) * options.epochs
    way = method(model)
    optimizer = optimiser(model, way, options)
    schedule = one_cycle(optimizer, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    loader = _Batches((images, labels), count, options.batch_size, device, generator, augment)
    agreed = {name: getattr(options, name) for name in ("epochs", "batch_size", "lr", "weight_decay", "seed")}
    agreed["precision"] = precision
    training = Training(
        model, _RecipeTask(way, schedule, device, precision, loader, options.epochs), [optimizer],
        checkpoint=Checkpoint(options.out / "resume.pt"), options=agreed,
    )  # fmt: skip
    training.resume(loader)
    for epoch in range(training.epoch, options.epochs):
        started = time.time()
        training.run(loader, epoch + 1)
        row = {name: value for name, value in training.history[-1].items() if name != "epoch"}
        print(
            f"epoch {epoch + 1}/{options.epochs}  {'  '.join(f'{name} {value:.4f}' for name, value in row.items())}"
            f"  {time.time() - started:.0f} s",
            flush=True,
        )
        if options.stop_after == epoch + 1:
            return
    facts = {
        "data": data.name,
        "class_names": list(data.class_names),
        "seed": options.seed,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "precision": precision,
        "torch": torch.__version__,
        "test_accuracy": accuracy(way.predictor(), *(part[: options.limit] for part in data.test), device),
        **(meta or {}),
    }
    way.save(options.out)
    save_network(model.cpu(), options.out / "network.safetensors", facts)
    print(json.dumps(facts, ensure_ascii=False))
