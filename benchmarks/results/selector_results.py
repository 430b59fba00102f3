"""The published tables: `python -m benchmarks.results.selector_results --runs runs > tables.md`.

Filters come from all 60,000 training images, accuracy from all 10,000 test images. ``--runs`` holds the folders
that ``tutorials/recipes/train_fashion_mnist.py`` wrote, ``resnet20-s0`` and so on; without it, the three that ship.
Prints Markdown; pictures go to ``benchmarks/figures``.
"""

import argparse
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch

from benchmarks.lib.recipes import Data, Loader, first, load
from benchmarks.lib.report import interval, markdown, stamp
from captum_classfilters import Control, InfluentialFeatures, metrics, visualize
from captum_classfilters.assets import SEEDS, load_demo_network, load_network
from captum_classfilters.influential import SELECTORS

FIGURES = Path(__file__).parents[1] / "figures"
KS = [1, 2, 3, 5, 10]
GRID = [1, 2, 3, 5, 8, 12, 20, 32]
DEPTHS = [20, 32, 44, 56]
NAMED = [name for name in SELECTORS if name != "random"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=None)
    parser.add_argument("--depth-runs", type=Path, default=None, help="the same for the depth study (default: --runs)")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="of the depth study")
    parser.add_argument("--limit", type=int, default=None, help="only so many images of each split (for a trial)")
    parser.add_argument("--parts", nargs="+", default=["curves", "grid", "claims", "depth"])
    options = parser.parse_args()
    data = load("fashion_mnist")
    data = data._replace(train=first(data.train, options.limit), test=first(data.test, options.limit))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(stamp("results.selector_results", device))
    FIGURES.mkdir(exist_ok=True)

    def network(seed: int) -> torch.nn.Module:
        return trained(20, seed, options.runs).to(device)

    parts = {
        "curves": lambda: curves({seed: network(seed) for seed in SEEDS}, data),
        "grid": lambda: grid(network(0), data),
        "claims": lambda: claims(network(0), data),
        "depth": lambda: depth(options.depth_runs or options.runs, options.depths, data, device),
    }
    for name in options.parts:
        started = time.time()
        parts[name]()
        print(f"\n<!-- {name}: {time.time() - started:.0f} s -->", flush=True)


def curves(networks: dict[int, torch.nn.Module], data: Data) -> None:
    """A_f, A_d and r_A of every selector, three seeds."""
    found = []
    for seed, model in networks.items():
        tables = InfluentialFeatures(model).attribute(Loader(data.train), selector=NAMED, class_names=data.class_names)
        curve = metrics.accuracy_curve(model, tables, Loader(data.test), KS, control=Control(10, seed))
        found.append(curve[curve.class_name == "all"].assign(seed=seed))
        if seed == 0:
            visualize.class_filters(tables["histogram"], k=5)
            _save("class_filters")
            visualize.accuracy_curve(curve)
            _save("accuracy_curve")
    seeds = pd.concat(found)
    dense = seeds[seeds.filters == "dense"]
    print(f"\n## Accuracy with k channels for each class, ResNet-20, seeds {list(networks)}\n")
    each = ", ".join(f"{row.accuracy:.4f} [{row.low:.4f}, {row.high:.4f}]" for row in dense.itertuples())
    print(f"A_f: {each}; mean {dense.accuracy.mean():.4f}")
    markdown(mean_table(seeds, "accuracy"), "A_d: mean of the seeds [lowest, highest end of their 95 % intervals]")
    markdown(mean_table(seeds, "relative"), "r_A = A_d / A_f: mean of the seeds [lowest, highest seed]")
    markdown(
        mean_table(seeds, "agreement"), "Agreement with the dense prediction: mean of the seeds [lowest, highest seed]"
    )


def grid(model: torch.nn.Module, data: Data) -> None:
    """Figure 1: accuracy over k1 and k2."""
    tables = InfluentialFeatures(model).attribute(Loader(data.train), k1=GRID, class_names=data.class_names)
    curve = metrics.accuracy_curve(model, tables, Loader(data.test), GRID)
    visualize.k_grid(curve)
    _save("k1_k2")
    rows = curve[(curve.class_name == "all") & (curve.filters != "dense")]
    widest = ((rows.high - rows.low) / 2)[rows.filters != "random"].max()
    cells = rows.assign(
        value=[
            interval(row.accuracy, row.low, row.high) if row.filters == "random" else f"{row.accuracy:.4f}"
            for row in rows.itertuples()
        ]
    ).pivot(index="filters", columns="k", values="value")
    print("\n## k1 x k2 (figure 1), ResNet-20, seed 0\n")
    markdown(
        cells.loc[[*map(str, GRID), "random"]],
        f"A_d; rows k1, columns k2; 95 % intervals (Wilson) are at most +- {widest:.4f}, for random as shown",
    )


def claims(model: torch.nn.Module, data: Data) -> None:
    """Essential, exclusive, stable, on the object? k = 5, ResNet-20, seed 0."""
    chosen = ["histogram", "mean_activation", "contribution", "margin"]
    tables = InfluentialFeatures(model).attribute(Loader(data.train), selector=chosen, class_names=data.class_names)
    print("\n## The paper's other claims at k = 5, ResNet-20, seed 0\n")
    ablation = metrics.class_ablation(model, tables["histogram"], Loader(data.test), 5, control=Control(10))
    whole = ablation[ablation.class_name == "all"]
    cells = whole.assign(value=[interval(row.accuracy, row.low, row.high) for row in whole.itertuples()])
    markdown(
        cells.pivot(index="mode", columns="channels", values="value").fillna(""),
        "Essential? Mean recall when a class's channels are overwritten (columns: which channels)",
    )
    pairs = metrics.overlap(tables, 5)
    summary = pairs[~pairs.control].groupby("filters").agg(mean=("jaccard", "mean"), largest=("jaccard", "max"))
    (chance,) = pairs[pairs.control].itertuples()
    summary = summary.assign(random=chance.jaccard, high=chance.high)
    markdown(summary.map("{:.3f}".format), "Exclusive? Jaccard index of two classes' top 5; random: mean, 97.5 % point")
    stable = metrics.stability(model, Loader(data.train), 5, selectors=chosen, draws=20)
    stable = stable[stable.class_name == "all"].set_index("filters")
    stable = stable[~stable.control].assign(random=stable.jaccard["random"])
    markdown(
        stable[["jaccard", "low", "high", "random"]].map("{:.3f}".format),
        "Stable? Jaccard index of a bootstrap replicate's top 5 and that of all 60,000 images, 20 replicates",
    )
    for weights in ("head", "ones"):
        frame = metrics.localisation(
            model, tables, Loader(data.test), 5, channel_weights=weights, control=Control(draws=10)
        )
        rows = {
            row.filters: {
                "pointing": interval(row.pointing, row.low, row.high),
                "IoU": interval(row.iou, row.iou_low, row.iou_high),
            }
            for row in frame.itertuples()
        }
        rows["blind guess"] = {"pointing": f"{frame.chance[0]:.3f}", "IoU": f"{frame.chance_iou[0]:.3f}"}
        markdown(pd.DataFrame(rows).T, f"On the object? Map of the true class's 5 channels, channel weights: {weights}")


def depth(runs: Path | None, depths: list[int], data: Data, device: str) -> None:
    """Claim 3: does r_A rise with depth?"""
    rows = []
    for layers in depths:
        if runs is None or not (runs / f"resnet{layers}-s0" / "network.safetensors").is_file():
            print(f"\nResNet-{layers}: no network in {runs}\n")
            continue
        model = trained(layers, 0, runs).to(device)
        tables = InfluentialFeatures(model).attribute(
            Loader(data.train), selector=["histogram", "contribution"], class_names=data.class_names
        )
        curve = metrics.accuracy_curve(model, tables, Loader(data.test), KS, control=Control(10))
        rows.append(curve[curve.class_name == "all"].assign(depth=layers))
    if not rows:
        return
    found = pd.concat(rows)
    print("\n## Depth (the paper's claim 3), seed 0\n")
    dense = found[found.filters == "dense"]
    print("A_f: " + ", ".join(f"ResNet-{r.depth} {interval(r.accuracy, r.low, r.high)}" for r in dense.itertuples()))
    for name in ("histogram", "contribution", "random"):
        chosen = found[found.filters == name]
        # the interval of A_d over the fixed A_f
        chosen = chosen.assign(
            value=[
                interval(r.relative, r.low * r.relative / r.accuracy, r.high * r.relative / r.accuracy)
                for r in chosen.itertuples()
            ]
        )
        markdown(chosen.pivot(index="depth", columns="k", values="value"), f"r_A of {name}, by depth and k")


def trained(depth: int, seed: int, runs: Path | None) -> torch.nn.Module:
    if runs is None:
        return load_demo_network(seed)[0]
    return load_network(runs / f"resnet{depth}-s{seed}" / "network.safetensors")[0]


def mean_table(seeds: pd.DataFrame, value: str) -> pd.DataFrame:
    low, high = ("low", "high") if value == "accuracy" else (value, value)
    rows = seeds[seeds.filters != "dense"].groupby(["filters", "k"], sort=False)
    cells = rows.apply(lambda part: interval(part[value].mean(), part[low].min(), part[high].max()))
    return cells.unstack("k").loc[[*NAMED, "random"]]


def _save(name: str) -> None:
    plt.gcf().savefig(FIGURES / f"{name}.png", dpi=110, bbox_inches="tight")
    plt.close("all")


if __name__ == "__main__":
    main()
