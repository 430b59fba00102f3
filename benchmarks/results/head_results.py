"""The published tables of smaller heads.

    python -m benchmarks.results.head_results --parts fashion recovery > tables.md

Filters and moments come from training images, accuracy from test images. ``fashion`` and ``recovery`` take the three
networks that ship; ``kanji`` and ``kanji-recovery`` the one that ships, and ``--kanji``, the data that
``tutorials/recipes/kanji.py`` drew. Prints Markdown.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.lib.networks import Networks, add_networks_argument
from benchmarks.lib.recipes import Loader, Split, augment, calibration, degrade, load, load_kanji
from benchmarks.lib.report import interval, markdown, stamp
from benchmarks.results.selector_results import NAMED
from benchmarks.speed.head_speed import faster, random_head
from captum_classfilters import ClassFilters, Control, HeadMoments, InfluentialFeatures, decompose, metrics, recover
from captum_classfilters.assets import SEEDS
from captum_classfilters.core.intervals import wilson

KS = [1, 2, 3, 5, 10, 20]
RECOVERED = {"fashion": [1, 5], "kanji": [3, 5]}
CALIBRATION = 60_000
PARTS = ["times", "fashion", "recovery", "kanji", "kanji-recovery"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kanji", type=Path, help="data.safetensors of tutorials/recipes/kanji.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--limit", type=int, default=None, help="only so many images of each split (for a trial)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    add_networks_argument(parser)
    options = parser.parse_args()
    if options.kanji is None and any("kanji" in part for part in options.parts):
        parser.error("the kanji parts need --kanji data.safetensors, which tutorials/recipes/kanji.py draws")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(stamp("results.head_results", device))
    parts: dict[str, Callable[[], None]] = {
        "times": head_times,
        "fashion": lambda: curves("Fashion-MNIST, ResNet-20", fashion(options, device)),
        "recovery": lambda: recovery("Fashion-MNIST, ResNet-20", fashion(options, device), RECOVERED["fashion"]),
        "kanji": lambda: curves("1,000 kanji, ResNet-14", kanji(options, device)),
        "kanji-recovery": lambda: recovery("1,000 kanji, ResNet-14", kanji(options, device), RECOVERED["kanji"]),
    }
    for name in options.parts:
        started = time.time()
        parts[name]()
        print(f"\n<!-- {name}: {time.time() - started:.0f} s -->", flush=True)


class Task:
    """A trained network, images to choose channels from, to retrain on, and to judge by."""

    def __init__(
        self, seed: int, model: nn.Module, chosen_from: Split, training: "Shuffled", test: Split, names: tuple[str, ...]
    ) -> None:
        self.seed, self.model, self.training, self.names = seed, model, training, names
        self.chosen_from, self.test = Loader(chosen_from), Loader(test)

    def tables(self, selectors: list[str]) -> dict[str, ClassFilters]:
        return InfluentialFeatures(self.model).attribute(self.chosen_from, selector=selectors, class_names=self.names)

    def moments(self) -> HeadMoments:
        return HeadMoments.collect(self.model, self.chosen_from)


class Shuffled:
    """Batches of 64 in random order, augmented as in training; all randomness is torch's own."""

    def __init__(self, split: Split, augmented: Callable[[Tensor, torch.Generator], Tensor]) -> None:
        self._split, self._augmented = split, augmented

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        images, labels = self._split
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            inputs = self._augmented(images[batch], generator).float().div_(255)
            yield inputs.contiguous(memory_format=torch.channels_last), labels[batch]


def fashion(options: argparse.Namespace, device: str) -> Iterator[Task]:
    data = load("fashion_mnist")
    train, test = (Split(*(part[: options.limit] for part in split)) for split in (data.train, data.test))
    for seed in options.seeds:
        model = Networks(options.networks).plain(seed).to(device).to(memory_format=torch.channels_last)
        yield Task(seed, model, train, Shuffled(train, augment), test, data.class_names)


def kanji(options: argparse.Namespace, device: str) -> Iterator[Task]:
    data = load_kanji(options.kanji)
    model = Networks(options.networks).kanji().to(device).to(memory_format=torch.channels_last)
    # degraded as the test images are, but of training foundries
    chosen_from = calibration(data, min(CALIBRATION, options.limit or CALIBRATION), seed=0)
    train, test = (Split(*(part[: options.limit] for part in split)) for split in (data.train, data.test))
    yield Task(0, model, chosen_from, Shuffled(train, degrade), test, data.class_names)


def curves(title: str, tasks: Iterator[Task]) -> None:
    """Accuracy at every k: every selector as it is and refitted, OMP, the random control."""
    found = []
    for task in tasks:
        tables, moments = task.tables(NAMED), task.moments()
        for refit, filters in ((None, tables), ("least_squares", tables), ("omp", None)):
            given = {} if refit is None else {"refit": refit, "moments": moments}
            curve = metrics.accuracy_curve(task.model, filters, task.test, KS, control=Control(10, task.seed), **given)
            curve = curve[curve.class_name == "all"]
            if refit == "omp":
                curve = curve[curve.filters == "omp"]
            found.append(curve.assign(seed=task.seed, refit=refit or "none"))
    rows = pd.concat(found)
    dense = rows[(rows.filters == "dense") & (rows.refit == "none")]
    print(f"\n## {title}: accuracy with k features for each class\n")
    print("All features: " + ", ".join(interval(row.accuracy, row.low, row.high) for row in dense.itertuples()))
    for refit, what in (("none", "weights as they are"), ("least_squares", "least squares"), ("omp", "own choice")):
        part = rows[(rows.filters != "dense") & (rows.refit == refit)].groupby(["filters", "k"], sort=False)
        cells = part.apply(lambda cell: interval(cell.accuracy.mean(), cell.low.min(), cell.high.max()))
        markdown(cells.unstack("k"), f"{what}: mean of the seeds [lowest, highest end of their 95 % intervals]")


def head_times() -> None:
    """How many times as fast as the dense head the small one is, one thread; on an idle machine, please."""
    print("\n## The head alone\n")
    for title, (classes, channels) in {"ResNet-20": (10, 64), "kanji ResNet-14": (1000, 192)}.items():
        _times_of(title, *random_head(classes, channels, "cpu"))


def _times_of(title: str, linear: nn.Linear, filters: ClassFilters) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = {}
    for k in KS:
        small = decompose(nn.Sequential(linear), filters, k)[0]  # type: ignore[index]
        cells = {}
        for size in (1, 64):
            inputs = torch.rand(size, linear.in_features)
            ratios = faster(linear, {"small": small}, inputs, "cpu")["small"]
            cells[f"B {size}"] = interval(median(ratios), min(ratios), max(ratios))
        rows[f"k {k}"] = {"form": type(small).__name__, **cells}
    torch.set_num_threads(threads)
    shape = f"{linear.in_features} -> {linear.out_features}"
    markdown(pd.DataFrame(rows).T, f"{title}, {shape}: times as fast as the dense head [slowest, fastest round]")


def recovery(title: str, tasks: Iterator[Task], ks: list[int]) -> None:
    """One epoch of the paper's retraining: small heads, random ones, and the dense network."""
    found = []
    for task in tasks:
        tables, moments = task.tables(["histogram", "random"]), task.moments()
        networks = {("dense", 0): task.model}
        for k in ks:
            networks["histogram", k] = decompose(task.model, tables["histogram"], k)
            networks["omp", k] = decompose(task.model, None, k, refit="omp", moments=moments)
            networks["random", k] = decompose(task.model, tables["random"], k)
        for (name, k), network in networks.items():
            before = accuracy(network, task.test)
            with torch.autocast(next(network.parameters()).device.type, torch.bfloat16):
                retrained = recover(network, task.training, epochs=1, seed=task.seed)
            after = accuracy(retrained, task.test)
            found.append({"filters": name, "k": k, "seed": task.seed, "before": before, "after": after})
            print(f"<!-- {title} {found[-1]} -->", flush=True)
    rows = pd.DataFrame(found)
    total = sum(len(labels) for _, labels in task.test)
    print(f"\n## {title}: after one epoch of retraining (Adam, lr 1e-4, batches of 64, the whole network)\n")
    cells = {}
    for (name, k), part in rows.groupby(["filters", "k"], sort=False):
        shown = {}
        for when in ("before", "after"):
            low, high = wilson((part[when] * total).round().to_numpy(), [total] * len(part))
            shown[when] = interval(part[when].mean(), min(low), max(high))
        cells[name if k == 0 else f"{name}, k {k}"] = shown
    markdown(pd.DataFrame(cells).T, "accuracy: mean of the seeds [lowest, highest end of their 95 % intervals]")


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Loader) -> float:
    device = next(model.parameters()).device
    pairs = [(model(x.to(device)).argmax(1).cpu() == y) for x, y in loader]
    return float(torch.cat(pairs).double().mean())


if __name__ == "__main__":
    main()
