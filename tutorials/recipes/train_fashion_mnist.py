"""Train a small residual network, 15 epochs by default; stops and resumes without loss.

    python tutorials/recipes/train_fashion_mnist.py --depth 20 --seed 0 --out runs/resnet20-s0

Writes ``OUT/network.safetensors`` (what `captum_classfilters.assets.load_network` reads) and, after every epoch,
``OUT/resume.pt``. The network is the one of the last epoch; test images are looked at once, at the end.
About 45 s an epoch for ResNet-20 on two CPU cores with bfloat16; ``--device cuda`` where there is one.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from data import Data, load
from torch import Tensor, nn
from torch.nn import functional as F

from captum_classfilters.assets import save_network
from captum_classfilters.assets.networks import SmallResNet


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion_mnist", help="fashion_mnist, cifar10, cifar100 or a folder")
    parser.add_argument("--root", default="data", help="where torchvision keeps or downloads data sets")
    parser.add_argument("--depth", type=int, default=20, help="20, 32, 44, 56, ...")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="peak of the one-cycle schedule")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=None, help="only so many images of each split (for a trial)")
    parser.add_argument("--stop-after", type=int, default=None, help="stop after so many epochs; a later call resumes")
    return parser.parse_args()


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


def train(options: argparse.Namespace, data: Data) -> None:
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    images, labels = (part[: options.limit] for part in data.train)
    pixels = images.float().div_(255)
    mean, std = pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3)).tolist()
    model = SmallResNet(options.depth, len(data.class_names), mean, std).to(device)
    model = model.to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=options.lr, momentum=0.9, nesterov=True,
    )  # fmt: skip
    steps = -(-len(images) // options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=steps * options.epochs, pct_start=0.2
    )
    generator = torch.Generator().manual_seed(options.seed)
    resume, first = options.out / "resume.pt", 0
    if resume.is_file():
        state = torch.load(resume, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"].cpu())
        first = state["epoch"]
    for epoch in range(first, options.epochs):
        started, loss_sum, right = time.time(), 0.0, 0
        order = torch.randperm(len(images), generator=generator)
        for batch in order.split(options.batch_size):
            inputs = as_input(augment(images[batch], generator), device)
            targets = labels[batch].to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(inputs)
            loss = F.cross_entropy(logits.float(), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach() * len(batch)
            right += (logits.detach().argmax(1) == targets).sum()
        print(
            f"epoch {epoch + 1}/{options.epochs}  loss {float(loss_sum) / len(images):.4f}"
            f"  training accuracy {int(right) / len(images):.4f}  {time.time() - started:.0f} s",
            flush=True,
        )
        beside = resume.with_suffix(".part")
        torch.save(
            {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(), "generator": generator.get_state(), "epoch": epoch + 1,
            },
            beside,
        )  # fmt: skip
        os.replace(beside, resume)
        if options.stop_after == epoch + 1:
            return
    meta = {
        "data": data.name,
        "class_names": list(data.class_names),
        "seed": options.seed,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "torch": torch.__version__,
        "test_accuracy": accuracy(model, *(part[: options.limit] for part in data.test), device),
    }
    save_network(model.cpu(), options.out / "network.safetensors", meta)
    print(json.dumps(meta))


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    train(options, load(options.data, options.root))


if __name__ == "__main__":
    main()
