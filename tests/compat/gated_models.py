"""The three kinds of gated models that the suite runs Captum on, each beside the same network written by hand."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from shared import seeded
from torch import Tensor, nn

from captum_classfilters import ClassFilters, LabelSensitiveGate, PathDecoupler, decompose

TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])


class Net(nn.Module):
    """As `SmallCNN`, of modules alone: every ReLU is one of its own, and none is in place, or Captum's hooks for
    gradients (DeepLift, GuidedBackprop) could not change what passes through it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)

    def maps(self, images: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(images))))))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.maps(images))))


class LabelGated(Net):
    """A user's own network with a gate before its head: one Tensor in, one out."""

    def __init__(self, gate: LabelSensitiveGate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.fc(self.flatten(self.pool(self.gate(self.maps(images), labels))))


class ByHand(nn.Module):
    """A `Net` whose channels are multiplied by numbers, and whose head is multiplied by a mask."""

    def __init__(self, net: Net, first: Tensor | None, second: Tensor | None, mask: Tensor | None) -> None:
        super().__init__()
        self.net = net
        for name, tensor in (("first", first), ("second", second), ("mask", mask)):
            self.register_buffer(name, tensor)

    def forward(self, images: Tensor, *_: Any) -> Tensor:
        net = self.net
        maps = net.relu1(times(net.bn1(net.conv1(images)), self.first))
        pooled = net.flatten(net.pool(net.relu2(times(net.bn2(net.conv2(maps)), self.second))))
        weight = net.fc.weight if self.mask is None else net.fc.weight * self.mask
        return nn.functional.linear(pooled, weight, net.fc.bias)


def times(maps: Tensor, gates: Tensor | None) -> Tensor:
    return maps if gates is None else maps * gates.repeat(len(maps) // len(gates), 1)[..., None, None]


def moved(module: nn.Module, device: str) -> nn.Module:
    """``module.to``, where torch refuses to move parameters: on a fake device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().to(device), parameter.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))
    return module


class Gated(NamedTuple):
    """A gated model, the images it is asked about, and what is known of it."""

    model: nn.Module
    plain: Net  # its network without gates
    by_hand: ByHand
    inputs: Tensor
    targets: Tensor
    closed: Tensor  # (N, K) bool: channels of conv2 that do not reach the target
    extra: Tensor | None = None  # additional_forward_args
    gates: tuple[Tensor, ...] = ()  # of the images, where they depend on them

    @property
    def conv(self) -> nn.Module:
        """The gated convolution."""
        return self.model.model.conv2 if isinstance(self.model, PathDecoupler) else self.model.conv2

    @property
    def told(self) -> dict[str, Any]:
        """What every attribution is told."""
        return {"target": self.targets, "additional_forward_args": self.extra}

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.model(inputs) if self.extra is None else self.model(inputs, self.extra)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, gates stay those of the images, whatever comes."""
        return self.model.frozen(self.gates) if isinstance(self.model, PathDecoupler) else nullcontext()

    def to(self, device: str) -> "Gated":
        for module in (self.model, self.plain, self.by_hand):
            moved(module, device)
        gates = tuple(gate.to(device) for gate in self.gates)
        extra = None if self.extra is None else self.extra.to(device)
        tensors = {name: getattr(self, name).to(device) for name in ("inputs", "targets", "closed")}
        return self._replace(**tensors, extra=extra, gates=gates)


def table() -> ClassFilters:
    """Two channels of six for each of four classes: 0 1, 2 3, 4 5, 0 2."""
    scores = torch.zeros(4, 6, dtype=torch.float64)
    for row, pair in enumerate(((0, 1), (2, 3), (4, 5), (0, 2))):
        scores[row, list(pair)] = 1.0
    return ClassFilters(scores, scores.clone(), torch.ones(4, dtype=torch.int64), "histogram", "fc", tuple("abcd"))


def firing(net: nn.Module) -> Any:
    """Weights from a local seed, with channels that are not silent."""
    seeded(net, 3).eval()
    with torch.no_grad():
        net.bn1.bias += 0.5
        net.bn2.bias += 1.0
    return net


def decoupled(net: nn.Module | None = None) -> PathDecoupler:
    """About half of the gates open, and not the same for all images."""
    net = firing(Net()) if net is None else net
    decoupler = PathDecoupler(net, ["conv1", "conv2"], reduction=1, generator=torch.Generator().manual_seed(0)).eval()
    seeded(decoupler.controllers, 2)
    return decoupler


def tinted(count: int = 6, seed: int = 1) -> Tensor:
    """Images of different tints, so that they take different paths."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    return noise + 2 * torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(2))


def paths() -> Gated:
    decoupler, inputs = decoupled(), tinted()
    gates = tuple(gate.detach() for gate in decoupler.gates(inputs)[1])
    net: Any = decoupler.model
    return Gated(decoupler, net, ByHand(net, *gates, None), inputs, TARGETS, gates[1] == 0, gates=gates)


def labels() -> Gated:
    # channels 0 to 3 are one class's own, 4 and 5 everybody's
    model = firing(LabelGated(LabelSensitiveGate(4, 6)))
    model.gate = LabelSensitiveGate.fixed(4, 6, exclusive=1).eval()
    rows = model.gate.weight[TARGETS]
    return Gated(model, model, ByHand(model, None, rows, None), tinted(), TARGETS, rows == 0, TARGETS)


def head() -> Gated:
    net, mask = firing(Net()), table().mask(2)
    model = decompose(net, table(), 2, backend="bag")
    return Gated(model, net, ByHand(net, None, None, mask), tinted(), TARGETS, ~mask[TARGETS])


KINDS: dict[str, Callable[[], Gated]] = {"decoupler": paths, "label gate": labels, "decomposed": head}


@contextmanager
def without_autograd(device: Any) -> Iterator[None]:
    """On a fake device, which has no autograd: gradients of zeros, where and as large as they would be."""
    if device.name == "cpu" or torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda outputs, inputs, *_, **__: tuple(map(torch.zeros_like, inputs)))
        yield


def hook_counts(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]
