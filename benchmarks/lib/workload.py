"""Networks and images to measure with: random ones, since a convolution does not mind."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from captum_classfilters.assets.networks import SmallResNet

Batches = Iterable[tuple[Tensor, Tensor]]


class Settings(NamedTuple):
    """What the command line says; ``network`` is a trained SmallResNet's file, None: the packaged one."""

    device: str = "cpu"
    network: str | None = None


class Workload(NamedTuple):
    name: str
    model: nn.Module
    loader: list[tuple[Tensor, Tensor]]


def resnet18(device: str) -> Workload:
    batches, size = (20, 256) if device == "cuda" else (2, 16)
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval().to(device)
    return Workload(
        f"ResNet-18, 224x224, {batches} x {size}", model, images(batches, size, (3, 224, 224), 1000, device)
    )


def resnet20(device: str, batches: int = 4) -> Workload:
    size = 1000 if device == "cuda" else 125
    torch.manual_seed(0)
    model = SmallResNet(20).eval().to(device)
    return Workload(f"ResNet-20, 28x28, {batches} x {size}", model, images(batches, size, (1, 28, 28), 10, device))


def images(batches: int, size: int, shape: tuple[int, ...], classes: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Batches in memory, so that no loading hides what is measured; pinned where a GPU will fetch them."""
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.rand(size, *shape, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(batches)
    ]
    return [(x.pin_memory(), y.pin_memory()) for x, y in made] if device == "cuda" else made


@torch.inference_mode()
def inference(model: nn.Module, loader: Batches, device: str) -> int:
    """The bare pass everything is measured against: how many answers are right, and nothing else."""
    right = torch.zeros((), dtype=torch.int64, device=device)
    for inputs, labels in loader:
        inputs, labels = inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        right += (model(inputs).argmax(1) == labels).sum()
    return int(right)
