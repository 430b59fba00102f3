"""Skipping against the same network without gates, its norms folded: time beside MACs, and what it costs to read paths.

Norms are folded in both: folding is not skipping. Two rivals: in the usual memory format, and in the faster of the two.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from benchmarks.lib.report import Table
from benchmarks.lib.timing import Timings, interleaved, ratio
from benchmarks.lib.workload import Settings
from captum_classfilters import PathDecoupler
from captum_classfilters.assets import load_demo_network, load_images, paths_file

BATCHES = (1, 8, 32)
ROUNDS = 5
IMAGES = 32  # of each turn: as many batches as that takes
SAME_FORMAT, FASTEST, NEVER_BELOW, COLLECTING = 1.4, 1.25, 0.97, 1.1


def run(settings: Settings) -> Table:
    table = Table(f"paths: skipping, {torch.get_num_threads()} threads")
    for name, decoupler, images in _networks(settings.device):
        for batch in BATCHES:
            _skipping(table, name, decoupler, list(images.split(batch)), settings.device)
    _collecting(table, settings.device)
    table.notes = [
        "times as fast as the network without gates, its norms folded; MACs: of the images timed, controllers included",
        "new paths: of images not seen in this turn; recurring: the same batch again, whose slices are kept",
        "masked: the decoupler itself, which computes all channels and multiplies by gates; norms not folded",
        "ResNet-18: random weights, 224 x 224, half of the gates open at random; ResNet-20: trained, 28 x 28",
    ]
    return table


def _networks(device: str) -> Any:
    torch.manual_seed(0)
    images = torch.rand(IMAGES, 3, 224, 224) * torch.linspace(0.5, 2, IMAGES)[:, None, None, None]
    yield "ResNet-18", half_open(torchvision.models.resnet18().eval()).to(device), images.to(device)
    model, _ = load_demo_network(0, "decoupled")
    decoupler = PathDecoupler(model).load(paths_file()).to(device).eval()
    yield "ResNet-20", decoupler, (load_images().images[:IMAGES].float() / 255).to(device)


def half_open(model: nn.Module, seed: int = 0) -> PathDecoupler:
    """Controllers by which each gate is open for about half of all images."""
    generator = torch.Generator().manual_seed(seed)
    decoupler = PathDecoupler(model, generator=generator).eval()
    with torch.no_grad():
        for controller in decoupler.controllers:
            weight = torch.randn(controller.excite.weight.shape, generator=generator)
            controller.excite.weight.copy_(weight - weight.mean(1, keepdim=True))
            controller.excite.bias.zero_()
    return decoupler


def _skipping(table: Table, name: str, decoupler: PathDecoupler, batches: list[Tensor], device: str) -> None:
    size = len(batches[0])
    last = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    dense = fuse(copy.deepcopy(decoupler.model)).eval()
    dense_last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        skipping = decoupler.skipping(batches[0])
        fresh = copy.deepcopy(skipping)

        def new_paths() -> None:
            for layer in fresh.layers().values():
                layer.forget()
            _each(fresh, batches)

        seconds = interleaved(
            {
                "dense": lambda: _each(dense, batches),
                "dense, channels last": lambda: _each(dense_last, last),
                "skipping, new paths": new_paths,
                "skipping, recurring": lambda: _each(skipping, [batches[0]] * len(batches)),
                "masked": lambda: _each(decoupler, batches),
            },
            ROUNDS,
            warmups=2,
            device=device,
        )
    paths = decoupler.paths(batches)
    macs = paths.costs.dense / float(paths.macs().double().mean())
    whole = sum(layer.prefers_dense for layer in fresh.layers().values())
    what = f"{name}, B={size}"
    table.add(f"{what}: MACs", f"{macs:.2f}; {whole} of {len(fresh.layers())} convolutions computed whole")
    fastest = min(("dense", "dense, channels last"), key=lambda rival: min(seconds[rival]))
    first = name == "ResNet-18" and size == 1
    for way in ("new paths", "recurring"):
        for rival, shown, target in (("dense", "same format", SAME_FORMAT), (fastest, "fastest format", FASTEST)):
            asked = target if first else NEVER_BELOW
            _speedup(table, f"{what}: {way} / {shown}", seconds, rival, f"skipping, {way}", asked)
    _speedup(table, f"{what}: new paths / masked", seconds, "masked", "skipping, new paths", None)


def _speedup(table: Table, what: str, seconds: Timings, rival: str, own: str, target: float | None) -> None:
    found = ratio(seconds, rival, own)
    table.add(what, str(found), found.value, target, at_least=True)


def _each(model: Callable[[Tensor], Any], batches: list[Tensor]) -> None:
    for batch in batches:
        model(batch)


def _collecting(table: Table, device: str) -> None:
    model, _ = load_demo_network(0, "decoupled")
    decoupler = PathDecoupler(model).load(paths_file()).to(device).eval()
    batches = list((load_images().images.float() / 255).to(device).split(100))

    def bare() -> None:
        with torch.inference_mode():
            _each(decoupler, batches)

    seconds = interleaved({"paths": lambda: decoupler.paths(batches), "bare": bare}, ROUNDS, device=device)
    found = ratio(seconds, "paths", "bare")
    table.add("ResNet-20: paths(loader) / the gated network's inference", str(found), found.value, COLLECTING)
