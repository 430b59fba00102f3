"""Small networks as for CIFAR, for the demo, the tests and the recipes.

The networks take images in [0, 1] and normalise them, so that attacks, plots and loaders use the same numbers.
N images, K features before the head: the width of the last stage.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
ALEXNET_WIDTHS = (48, 96, 192, 192, 256)
VGG_WIDTHS = ((32, 32), (64, 64), (128, 128, 128))
# widths of a module's convolutions: 1x1, before 3x3, 3x3, before two 3x3, two 3x3, after pooling
INCEPTION_WIDTHS = (
    ((16, 16, 32, 8, 16, 16), (24, 24, 48, 12, 24, 24)),
    ((32, 32, 64, 16, 32, 32), (48, 32, 64, 16, 48, 32)),
)


class Normalise(nn.Module):
    """Subtract the data set's mean and divide by its deviation, per colour channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Same shape in and out."""
        return (images - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``."""
        out = self.relu1(self.bn1(self.conv1(images)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu2(out + self.downsample(images))
        return result


class SmallResNet(nn.Module):
    """ResNet-20/32/44/56 of He et al. 2016, section 4.2, with 1x1-convolution shortcuts.

    Args:
        depth: 6 n + 2: 20, 32, 44, 56, ...
        num_classes: C.
        mean: Mean of each colour channel of images in [0, 1]; its length is the number of colours.
        std: Deviation of each colour channel.
        widths: Channels of the three stages; the last is K.
        stem_stride: Stride of the first convolution: 2 makes everything after it four times cheaper.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        widths: Sequence[int] = WIDTHS,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2, such as 20, 32, 44 or 56; got {depth}")
        if len(widths) != 3:
            raise ValueError(f"widths must be three numbers of channels, one for each stage; got {tuple(widths)}")
        self.depth, self.widths, self.stem_stride = depth, tuple(widths), stem_stride
        self.normalise = Normalise(mean, std)
        self.conv1 = nn.Conv2d(len(mean), widths[0], 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        blocks = (depth - 2) // 6
        self.layer1 = _stage(widths[0], widths[0], blocks, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def config(self) -> dict[str, Any]:
        """What builds it again."""
        return {"depth": self.depth, "widths": list(self.widths), "stem_stride": self.stem_stride}

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, colours, H, W)`` in [0, 1] to logits ``(N, C)``."""
        out = self.relu(self.bn1(self.conv1(self.normalise(images))))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(out), 1))
        return logits


class SmallAlexNet(nn.Module):
    """Five convolutions and pooling as in AlexNet (Krizhevsky et al. 2012), for images of 28x28 or 32x32.

    Differs: batch norm behind each convolution, fewer channels in the first four, and an average over positions with
    one linear layer in the place of three: so the head's 256 features are those of the last convolution's filters.

    Args:
        num_classes: C.
        mean: Mean of each colour channel of images in [0, 1]; its length is the number of colours.
        std: Deviation of each colour channel.
        widths: Channels of the five convolutions; the last is K.
    """

    def __init__(
        self,
        num_classes: int = 10,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        widths: Sequence[int] = ALEXNET_WIDTHS,
    ) -> None:
        super().__init__()
        if len(widths) != 5:
            raise ValueError(f"widths must be five numbers of channels, one for each convolution; got {tuple(widths)}")
        self.widths = tuple(widths)
        self.normalise = Normalise(mean, std)
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise((len(mean), *widths))):
            stride = 2 if index == 0 else 1
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            if index == 1:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)

    def config(self) -> dict[str, Any]:
        """What builds it again."""
        return {"widths": list(self.widths)}

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, colours, H, W)`` in [0, 1] to logits ``(N, C)``."""
        logits: Tensor = self.fc(torch.flatten(self.avgpool(self.features(self.normalise(images))), 1))
        return logits


class SmallVGG(nn.Module):
    """Stages of 3x3 convolutions with batch norm, each halved by max pooling, as VGG (Simonyan and Zisserman 2015).

    Differs: slim, and an average over positions with one linear layer in the place of three.

    Args:
        num_classes: C.
        mean: Mean of each colour channel of images in [0, 1]; its length is the number of colours.
        std: Deviation of each colour channel.
        widths: For each stage, the channels of its convolutions; the last is K.
    """

    def __init__(
        self,
        num_classes: int = 10,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        widths: Sequence[Sequence[int]] = VGG_WIDTHS,
    ) -> None:
        super().__init__()
        self.widths = tuple(tuple(stage) for stage in widths)
        self.normalise = Normalise(mean, std)
        layers: list[nn.Module] = []
        inputs = len(mean)
        for index, stage in enumerate(self.widths):
            layers += [nn.MaxPool2d(2)] if index else []
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)

    def config(self) -> dict[str, Any]:
        """What builds it again."""
        return {"widths": [list(stage) for stage in self.widths]}

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, colours, H, W)`` in [0, 1] to logits ``(N, C)``."""
        logits: Tensor = self.fc(torch.flatten(self.avgpool(self.features(self.normalise(images))), 1))
        return logits


class Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3, two 3x3, and pooling; the latter three with a 1x1 convolution."""

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        one, before_three, three, before_five, five, pooled = widths
        self.branch1 = _conv_norm(inputs, one, 1)
        self.branch2 = nn.Sequential(_conv_norm(inputs, before_three, 1), _conv_norm(before_three, three, 3))
        self.branch3 = nn.Sequential(
            _conv_norm(inputs, before_five, 1), _conv_norm(before_five, five, 3), _conv_norm(five, five, 3)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv_norm(inputs, pooled, 1))

    def forward(self, images: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` to as many channels as the branches give together."""
        return torch.cat([self.branch1(images), self.branch2(images), self.branch3(images), self.branch4(images)], 1)


class SmallInception(nn.Module):
    """Inception modules with batch norm in stages, as GoogLeNet (Szegedy et al. 2015), for small images.

    Differs: narrow, fewer modules, two 3x3 convolutions in the place of 5x5, no auxiliary heads.

    Args:
        num_classes: C.
        mean: Mean of each colour channel of images in [0, 1]; its length is the number of colours.
        std: Deviation of each colour channel.
        widths: For each stage, the six widths of each of its modules; see `Inception`.
        stem: Channels of the first convolution.
    """

    def __init__(
        self,
        num_classes: int = 10,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        widths: Sequence[Sequence[Sequence[int]]] = INCEPTION_WIDTHS,
        stem: int = 32,
    ) -> None:
        super().__init__()
        self.widths = tuple(tuple(tuple(module) for module in stage) for stage in widths)
        self.stem = stem
        self.normalise = Normalise(mean, std)
        layers: list[nn.Module] = [_conv_norm(len(mean), stem, 3)]
        inputs = stem
        for stage in self.widths:
            layers.append(nn.MaxPool2d(2))
            for module in stage:
                layers.append(Inception(inputs, module))
                inputs = module[0] + module[2] + module[4] + module[5]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)

    def config(self) -> dict[str, Any]:
        """What builds it again."""
        return {"widths": [[list(module) for module in stage] for stage in self.widths], "stem": self.stem}

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, colours, H, W)`` in [0, 1] to logits ``(N, C)``."""
        logits: Tensor = self.fc(torch.flatten(self.avgpool(self.features(self.normalise(images))), 1))
        return logits


def _conv_norm(inputs: int, outputs: int, size: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, 1, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
