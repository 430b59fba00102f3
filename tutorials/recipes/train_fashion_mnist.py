r"""Train a small network, with or without gates; stops and resumes without loss.

    python tutorials/recipes/train_fashion_mnist.py --depth 20 --seed 0 --out runs/resnet20-s0
    python tutorials/recipes/train_fashion_mnist.py --method lsg --seed 0 --out runs/lsg-s0
    python tutorials/recipes/train_fashion_mnist.py --method lsg --from runs/resnet20-s0/network.safetensors \
        --epochs 6 --lr 0.02 --images-per-epoch 12000 --out runs/lsg-tuned-s0
    python tutorials/recipes/train_fashion_mnist.py --network alexnet --method fixed-gate --out runs/alexnet-fixed
    python tutorials/recipes/train_fashion_mnist.py --method decoupled --from runs/resnet20-s0/network.safetensors \
        --epochs 6 --lr 0.05 --information-weight 0.3 --out runs/decoupled-s0
    python tutorials/recipes/train_fashion_mnist.py --method settled --from runs/decoupled-s0/network.safetensors \
        --epochs 2 --lr 0.02 --out runs/settled-s0
    python tutorials/recipes/train_fashion_mnist.py --without shirt sneaker --seed 0 --epochs 10 --out runs/eight-s0

Writes ``OUT/network.safetensors`` (what `captum_classfilters.assets.load_network` reads) and, after every epoch,
``OUT/resume.pt``. The network is the one of the last epoch; test images are looked at once, at the end.
About 45 s an epoch for ResNet-20 on two CPU cores with fast bfloat16; ``--device cuda`` where there is one.
``--precision`` says float32 or bfloat16; without it the faster one is found by timing a step of each.
"""

import argparse
from functools import partial

import torch
from data import held_back, load, without
from decoupled import starting
from methods import FROM_TRAINED, PLAIN_OR_GATED, add_method_arguments, method_of, told_by
from torch import Tensor
from torch.nn import functional as F
from training import add_arguments, train

from captum_classfilters.assets.networks import SmallAlexNet, SmallInception, SmallResNet, SmallVGG

NETWORKS = {"resnet": SmallResNet, "alexnet": SmallAlexNet, "vgg": SmallVGG, "inception": SmallInception}


def augment(images: Tensor, generator: torch.Generator, pad: int = 2) -> Tensor:
    """Flip half of the images and shift each by up to ``pad`` pixels."""
    count, _, height, width = images.shape
    flip = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flip, images.flip(-1), images)
    images = F.pad(images, (pad,) * 4)
    rows = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator) + torch.arange(width)
    picked = images[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", help="fashion_mnist, cifar10, cifar100 or a folder")
    parser.add_argument("--root", default="data", help="where torchvision keeps or downloads data sets")
    parser.add_argument("--network", default="resnet", choices=list(NETWORKS))
    parser.add_argument("--depth", type=int, default=20, help="of the resnet: 20, 32, 44, 56, ...")
    parser.add_argument("--without", nargs="+", metavar="CLASS", help="leave these classes out, as unknown ones")
    add_method_arguments(parser, [*PLAIN_OR_GATED, *FROM_TRAINED])
    add_arguments(parser, epochs=15)
    parser.add_argument("--images-per-epoch", type=int, help="a random so many in each epoch (default: all)")
    parser.add_argument("--hold-back", type=int, help="judge by so many training images instead of test images")
    options = parser.parse_args()
    data = load(options.data, options.root)
    if options.hold_back:
        data = held_back(data, options.hold_back)
    if options.without:
        data = without(data, options.without)
    options.image_shape = tuple(data.train.images.shape[1:])
    kind = NETWORKS[options.network]
    network = partial(kind, options.depth) if options.network == "resnet" else kind
    if options.start is not None or options.method in FROM_TRAINED:
        network = starting(options.start)
    train(
        options,
        data,
        network,
        augment,
        images_per_epoch=options.images_per_epoch,
        meta=told_by(options),
        method=method_of(options),
    )


if __name__ == "__main__":
    main()
