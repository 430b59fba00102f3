"""What tests of several rooms need: a small network, weights that stay local, straight-through gates."""

import os
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from captum_classfilters import GateSchedule, LabelSensitiveGate, LabelSensitiveTraining

# Another device on which the tests with `device` run, such as xla, or slim, the emulated one of `narrow_device.py`
SECOND = os.environ.get("SECOND_DEVICE", "").split()
if "xla" in SECOND:
    import_module("torch_xla")  # before it torch knows no such device
    torch.zeros(1).to("xla")  # and autograd counts devices when it first runs
if "slim" in SECOND:
    import_module("narrow_device").set_up()
    # parameters cannot become those of another class in place
    torch.__future__.set_overwrite_module_params_on_conversion(True)


class SmallCNN(nn.Module):
    """Two convolutions, an average over positions, dropout and the head: K = ``channels``, C = ``num_classes``."""

    def __init__(self, num_classes: int = 4, channels: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(channels, num_classes, bias=bias)

    def penultimate(self, images: Tensor) -> Tensor:
        """The head's input, by hand."""
        maps = self.relu(self.bn2(self.conv2(self.bn1(self.conv1(images)).relu())))
        return self.dropout(self.pool(maps).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.penultimate(images))


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """Fill parameters and running statistics from a local seed: none is a neutral 0 or 1 by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                spread = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.5
                values = torch.randn(tensor.shape, generator=generator) * spread
                tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return model


class Passing(torch.autograd.Function):
    """1[g > 0], whose derivative is said to be that of clamp(1.2 sigmoid(g) - 0.1, 0, 1)."""

    @staticmethod
    def forward(ctx, g):
        ctx.save_for_backward(g)
        return (g > 0).to(g.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (g,) = ctx.saved_tensors
        share = 1 / (1 + torch.exp(-g))
        inside = (1.2 * share - 0.1 > 0) & (1.2 * share - 0.1 < 1)
        return gradient * inside * 1.2 * share * (1 - share)


def started_gate(classes: int = 4, channels: int = 6, seed: int = 0) -> LabelSensitiveGate:
    """A gate of noise that a training takes as it is: what the gate begins as plays no part in most tests."""
    gate = LabelSensitiveGate(classes, channels, generator=torch.Generator().manual_seed(seed))
    gate.is_noise = False
    return gate


def alternating(*args: Any, **options: Any) -> GateSchedule:
    """Gated epochs among plain ones."""
    return GateSchedule(*args, scheme="alternating", **options)


def paper_training(model: nn.Module, gate: LabelSensitiveGate, **options: Any) -> LabelSensitiveTraining:
    """Algorithm 1 as it stands: gated epochs among plain ones, nothing ablated."""
    return LabelSensitiveTraining(model, gate, **{"schedule": alternating(), "ablation": 0.0} | options)


def device_mode(name):
    """What must hold while tensors of a device are made."""
    return import_module("narrow_device").NarrowDevice() if name == "slim" else nullcontext()
