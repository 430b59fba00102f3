"""Fit and split of a head of 1,000 classes, Grad-CAM++ and Smooth Grad-CAM++, beside what does the same one by one."""

import warnings

import numpy as np
import torch
import torchvision
from captum.attr import LayerGradCam
from scipy import stats
from torch import nn

from benchmarks.lib.report import Table
from benchmarks.lib.timing import interleaved, ratio
from benchmarks.lib.workload import Settings
from captum_classfilters import ALDSplitter, LayerGradCamPlusPlus, LayerSmoothGradCamPlusPlus

# Rows that a loop fits; its time is scaled up to all of them
LINES, DENSITIES = 100, 10
SAMPLES = (5, 16)


def run(settings: Settings) -> Table:
    table = Table("splitting and class activation maps")
    splits(table)
    maps(table, settings.device)
    return table


def splits(table: Table) -> None:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(2048, 1000)
    uniform = torch.rand(1000, 2048, generator=generator) - 0.5
    with torch.no_grad():
        # Laplace, as weights of trained heads nearly are
        head.weight.copy_(-0.03 * uniform.sign() * torch.log1p(-2 * uniform.abs()))
    splitter = ALDSplitter(head)
    weights = head.weight.detach().numpy()

    def lines() -> None:
        for row in weights[:LINES].astype(np.float64):
            for side in (row[row > 0], -row[row < 0]):
                stats.linregress(np.arange(len(side)) / len(side), np.log(np.sort(side)))

    def densities() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in weights[:DENSITIES].astype(np.float64):
                stats.laplace_asymmetric.fit(row)

    seconds = interleaved(
        {
            "split": lambda: splitter.split(),
            "mle": lambda: splitter.split(fit="mle"),
            "lines": lines,
            "densities": densities,
        },
        rounds=9,
        warmups=2,
    )
    for name, what, limit in (("split", "fit and split", 50), ("mle", "the same with MLE", 150)):
        value = float(np.median(seconds[name])) * 1e3
        low, high = min(seconds[name]) * 1e3, max(seconds[name]) * 1e3
        table.add(f"1000 x 2048: {what}, ms", f"{value:.1f} ({low:.1f} to {high:.1f})", value, limit)
    loop = ratio(seconds, "lines", "split").value * 1000 / LINES
    table.add(
        "loop of scipy's linregress, two sides of each row (no split) / fit and split", f"{loop:.1f}", loop, 5, True
    )
    loop = ratio(seconds, "densities", "mle").value * 1000 / DENSITIES
    table.add("loop of scipy's laplace_asymmetric.fit / fit and split with MLE", f"{loop:.0f}", loop, 25, True)
    table.notes.append(f"loops: timed on {LINES} and {DENSITIES} of the 1,000 rows and scaled up")


def maps(table: Table, device: str) -> None:
    model = torchvision.models.resnet18().eval().to(device)
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    plain, plus = LayerGradCam(model, model.layer4), LayerGradCamPlusPlus(model, "layer4")
    smooth = LayerSmoothGradCamPlusPlus(model, "layer4")
    target = list(range(8))
    seconds = interleaved(
        {
            "LayerGradCam": lambda: plain.attribute(images, target),
            "LayerGradCamPlusPlus": lambda: plus.attribute(images, target),
            "of chosen channels": lambda: plus.attribute(images, target, channels=list(range(32))),
            **{f"smooth {n}": lambda n=n: smooth.attribute(images, target, n_samples=n) for n in SAMPLES},
        },
        rounds=9,
        device=device,
    )
    for name in ("LayerGradCamPlusPlus", "of chosen channels"):
        found = ratio(seconds, name, "LayerGradCam")
        table.add(f"ResNet-18, 8 images: {name} / LayerGradCam", str(found), found.value, 1.1)
    for n in SAMPLES:
        found = ratio(seconds, f"smooth {n}", "LayerGradCamPlusPlus")
        table.add(f"Smooth with {n} samples / LayerGradCamPlusPlus", str(found), found.value, 1.1 * n)
    table.notes.append("Smooth runs the clean image, too: n + 1 forward passes, so 1.1 n is in reach from n = 10 on")
