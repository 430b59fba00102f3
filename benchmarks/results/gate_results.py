"""The published tables of training with a gate.

    python -m benchmarks.results.gate_results --parts table gates > tables.md

STD: three plain networks that ship; tuned, LSG: each of them trained on, without and with a gate; noise: one whose gate
that began as noise, from scratch, as the paper; fixed: one with a gate that was set by hand. What does not ship is in
``--networks``.
``--network NAME=FOLDER`` adds others that a recipe trained. Judged by test images; filters and clusters come from
training images. Prints Markdown: means over seeds, with the lowest and highest end of the seeds' 95 % intervals where a
figure has one, else with the seeds' range.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from benchmarks.lib.networks import Networks, add_networks_argument
from benchmarks.lib.recipes import Loader, Split, calibration, load, load_kanji
from benchmarks.lib.report import interval, markdown, stamp
from captum_classfilters import (
    ClassFilters,
    Control,
    HeadMoments,
    InfluentialFeatures,
    LabelSensitiveGate,
    filter_ambiguity,
    metrics,
)
from captum_classfilters.assets import load_network

KS = [1, 3, 5]
PUBLISHED = (
    ("STD", "std", (0, 1, 2)),
    ("tuned", "tuned", (0, 1, 2)),
    ("LSG", "lsg", (0, 1, 2)),
    ("noise", "lsg-noise", (0,)),
    ("fixed", "fixed-gate", (0,)),
)
PARTS = ["table", "gates", "leakage", "heads", "masking"]
# Channels of a class that its activation picks: the paper's m, a tenth of K
DOMINANT = 10
CALIBRATION = 60_000
# Training images by which the best gate of a plain network is found
CALIBRATED = 10_000

Cell = tuple[float, float, float]  # value, low, high


class Network:
    """A trained network, its gate if it had one, and what it is called in the tables."""

    def __init__(self, kind: str, seed: int, model: nn.Module, gate: LabelSensitiveGate | None) -> None:
        self.kind, self.seed, self.model, self.gate = kind, seed, model, gate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--network", nargs="*", default=[], metavar="NAME=FOLDER", help="of a recipe; its kind in front"
    )
    parser.add_argument("--kanji", type=Path, help="data.safetensors of tutorials/recipes/kanji.py: its task instead")
    parser.add_argument("--only", action="store_true", help="only those of --network")
    add_networks_argument(parser)
    parser.add_argument("--limit", type=int, default=None, help="only so many images of each split (for a trial)")
    options = parser.parse_args()
    print(stamp("results.gate_results", "cpu"))
    data = load_kanji(options.kanji) if options.kanji else load("fashion_mnist")
    seen = calibration(data, CALIBRATION, seed=0) if options.kanji else data.train
    train, test = (Loader(Split(*(part[: options.limit] for part in split))) for split in (seen, data.test))
    some = Loader(Split(*(part[:CALIBRATED] for part in seen)))
    networks = [] if options.only else published(Networks(options.networks), of_kanji=options.kanji is not None)
    networks += [trained(*given.split("=", 1)) for given in options.network]
    parts: dict[str, Callable[[], None]] = {
        "table": lambda: table(networks, test),
        "gates": lambda: gates(networks),
        "leakage": lambda: leakage(networks, test),
        "heads": lambda: heads(networks, train, test, data.class_names),
        "masking": lambda: masking(networks, some, test, data.class_names),
    }
    for name in options.parts:
        started = time.time()
        parts[name]()
        print(f"\n<!-- {name}: {time.time() - started:.0f} s -->", flush=True)


def published(networks: Networks, of_kanji: bool = False) -> list[Network]:
    """The networks of the published tables."""
    if of_kanji:
        return [Network("STD", 0, networks.kanji(), None)]
    return [
        Network(
            kind,
            seed,
            networks.plain(seed, method),
            None if method in ("std", "tuned") else networks.gate(seed, method),
        )
        for kind, method, seeds in PUBLISHED
        for seed in seeds
    ]


def trained(kind: str, folder: str) -> Network:
    model, meta = load_network(Path(folder) / "network.safetensors")
    file = Path(folder) / "gate.safetensors"
    return Network(kind, meta["seed"], model, LabelSensitiveGate.load(file) if file.is_file() else None)


# -- one figure each ---------------------------------------------------------------------------------------------------


def table(networks: list[Network], test: Loader) -> None:
    """What the README shows: a row for each figure, a column for each kind of network, a control."""
    rows: dict[str, dict[str, list[Cell]]] = {}
    for network in networks:
        found = figures(network, test)
        for name, cell in found.items():
            rows.setdefault(name, {}).setdefault(network.kind, []).append(cell)
        exact = {name: round(cell[0], 5) for name, cell in found.items() if name.startswith("Phi")}
        print(f"<!-- {network.kind} {network.seed}: {exact} -->", flush=True)
    kinds = [*dict.fromkeys(network.kind for network in networks), "control"]
    shown = {}
    for name, cells in rows.items():
        if name.startswith("control "):
            continue
        control = [cell for found in rows.get(f"control {name}", {}).values() for cell in found]
        by_kind = {**cells, "control": control}
        shown[name] = {kind: together(by_kind.get(kind, [])) for kind in kinds}
    print("\n## With a gate and without\n")
    markdown(pd.DataFrame(shown).T, "mean over seeds [lowest, highest end of their 95 % intervals]")


def together(cells: list[Cell]) -> str:
    if not cells:
        return ""
    values, low, high = (np.array(part, float) for part in zip(*cells, strict=True))
    return interval(
        values.mean(), np.where(np.isnan(low), values, low).min(), np.where(np.isnan(high), values, high).max()
    )


def figures(network: Network, test: Loader) -> dict[str, Cell]:
    """Every figure of one network; ``control ...`` are those of the random control."""
    model, found = network.model, {}
    tail, maps = Tail(model), mapped(model, test)
    fresh = untrained(network)
    fresh_tail, fresh_maps = Tail(fresh), mapped(fresh, test)
    dominant = max(1, model.fc.in_features // DOMINANT)  # type: ignore[union-attr, operator]
    accuracy = metrics.gate_leakage(tail, any_table(network), maps)
    plain = accuracy[(accuracy.features == "own") & (accuracy.gate == "none")].iloc[0]
    found["accuracy, plain path"] = (plain.label_recovered, plain.low, plain.high)
    found["control accuracy, plain path"] = (plain.chance,) * 3
    for name, anneal in (("at its minimum", True), ("searched under the whole penalty", False)):
        for control, judged, loader in (("", tail, maps), ("control ", fresh_tail, fresh_maps)):
            result = filter_ambiguity(judged, loader, anneal=anneal)
            found[f"{control}Phi, {name}"] = (result.value, np.nan, np.nan)
    if network.gate is not None:
        density = metrics.density(network.gate.class_filters())
        for control, which in (("", "gate"), ("control ", "random")):
            row = density[(density.class_name == "all") & (density.filters == which)].iloc[0]
            found[f"{control}density of its gate"] = (row.density, row.low, row.high)
    for absolute, what in ((False, ""), (True, ", magnitudes")):
        for row in metrics.inter_class_correlation(model, test, dominant, absolute=absolute).itertuples():
            found[f"{'control ' * row.control}C_IC, {row.kind}{what}"] = (row.c_ic, row.low, row.high)
    for kind in ("weights", "activations"):
        matrix = metrics.filter_correlation(*((model, test) if kind == "weights" else (tail, maps)), kind=kind)
        for row in metrics.correlated_share(matrix, [0.3]).itertuples():
            found[f"{'control ' * row.control}pairs of {kind} correlated above .3"] = (row.share, row.low, row.high)
    score = metrics.mutual_information(tail, maps, max_samples=2000).query("channel == 'all'")
    for row in score.itertuples():
        found[f"{'control ' * row.control}mutual information score, nats"] = (row.mi, row.low, row.high)
    placed = metrics.localisation(model, all_channels(network), test, model.fc.in_features)  # type: ignore[union-attr, arg-type]
    row = placed[placed.filters == "all channels"].iloc[0]
    found["CAM: pointing at the silhouette"] = (row.pointing, row.low, row.high)
    found["control CAM: pointing at the silhouette"] = (row.chance,) * 3
    found["CAM: IoU with the silhouette"] = (row.iou, row.iou_low, row.iou_high)
    found["control CAM: IoU with the silhouette"] = (row.chance_iou,) * 3
    clustered = metrics.feature_clusters(tail, any_table(network), maps).query("cluster == 'all'").set_index("control")
    clusters, shuffled = clustered.loc[False], clustered.loc[True]
    found["k-means centres: adjusted mutual information"] = (clusters.ami, np.nan, np.nan)
    if network.gate is not None:
        found["k-means centres: cosine with the gate's rows"] = (clusters.cosine, np.nan, np.nan)
        found["control k-means centres: cosine with the gate's rows"] = (
            shuffled.cosine, shuffled.cosine_low, shuffled.cosine_high,
        )  # fmt: skip
        likeness = metrics.gate_similarity(tail, network.gate.class_filters(), maps)
        for (outcome, control), part in likeness.groupby(["outcome", "control"]):
            square = part.pivot(index="class_name", columns="gate_row", values="similarity").to_numpy(float)
            name = f"{'control ' if control else ''}S_{outcome}: share of classes most like their own row"
            found[name] = diagonal(square)
    return found


class Tail(nn.Module):
    """What stands behind the last map; the same head by the same name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.avgpool, self.fc = model.avgpool, model.fc

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.avgpool(maps), 1))


@torch.inference_mode()
def mapped(model: nn.Module, loader: Loader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The loader with the last map in the place of images: most figures need no more of the network."""
    seen: list[torch.Tensor] = []
    handle = model.avgpool.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))  # type: ignore[union-attr]
    labels = [y for x, y in loader if model(x) is not None]
    handle.remove()
    return list(zip(seen, labels, strict=True))


def diagonal(square: Any) -> Cell:
    own = np.nanmean([row.argmax() == index for index, row in enumerate(square) if not np.isnan(row).any()])
    return (float(own), np.nan, np.nan)


def any_table(network: Network) -> ClassFilters:
    """Its gate, or all ones."""
    return all_channels(network) if network.gate is None else network.gate.class_filters()


def all_channels(network: Network) -> ClassFilters:
    gate = LabelSensitiveGate.fixed(*network.model.fc.weight.shape, exclusive=0)  # type: ignore[union-attr]
    gate.layer = "fc"
    return gate.class_filters()


def untrained(network: Network) -> nn.Module:
    """The same network with new random weights: the control of what only training can give."""
    torch.manual_seed(network.seed)
    fresh = type(network.model)(num_classes=network.model.fc.out_features)  # type: ignore[union-attr]
    fresh.normalise = network.model.normalise
    return fresh.eval()


# -- gates -------------------------------------------------------------------------------------------------------------


def gates(networks: list[Network]) -> None:
    """How many channels a class has for itself, and what a trained gate owes to the noise it began as."""
    rows = {}
    for network in networks:
        if network.gate is None:
            continue
        weight = network.gate.weight.detach()
        own, related = network.gate.exclusive(), weight >= 0.5
        classes, channels = weight.shape
        noise = LabelSensitiveGate(classes, channels, generator=torch.Generator().manual_seed(network.seed)).weight
        other = LabelSensitiveGate(
            classes, channels, generator=torch.Generator().manual_seed(network.seed + 100)
        ).weight
        each = own.sum(1).double()
        rows[f"{network.kind} {network.seed}"] = {
            "density": f"{network.gate.density:.3f}",
            "of one class": f"{float(own.sum()) / channels:.3f}",
            "of several": f"{float((related.sum(0) > 1).sum()) / channels:.3f}",
            "of all": f"{float((related.sum(0) == classes).sum()) / channels:.3f}",
            "a class's own": f"{float(each.mean()):.1f} ({int(each.min())} to {int(each.max())})",
            "rank correlation with its start": f"{ranks(weight, noise):.3f}",
            "with another start": f"{ranks(weight, other):.3f}",
        }
    print("\n## Gates: channels with G >= .5 for one class, for several\n")
    markdown(pd.DataFrame(rows).T, "shares of the K channels")


def ranks(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(stats.spearmanr(a.detach().flatten().numpy(), b.detach().flatten().numpy()).statistic)


def leakage(networks: list[Network], test: Loader) -> None:
    """What the label alone gives: never accuracy."""
    cells: dict[str, dict[str, list[Cell]]] = {}
    for network in networks:
        if network.gate is None:
            continue
        for row in metrics.gate_leakage(network.model, network.gate.class_filters(), test).itertuples():
            cell = (row.label_recovered, row.low, row.high)
            cells.setdefault(f"features {row.features}, gate {row.gate}", {}).setdefault(network.kind, []).append(cell)
    print("\n## Leakage: share answered with the label that the gate was told\n")
    shown = {name: {kind: together(found) for kind, found in kinds.items()} for name, kinds in cells.items()}
    markdown(pd.DataFrame(shown).T, "mean over seeds [lowest, highest end of their 95 % intervals]")


def heads(networks: list[Network], train: Loader, test: Loader, names: tuple[str, ...]) -> None:
    """`decompose` at k features of each class: chosen by votes, and by the gate."""
    found = []
    for network in networks:
        tables = {"votes": InfluentialFeatures(network.model).attribute(train, class_names=names)}
        if network.gate is not None:
            tables["gate"] = network.gate.class_filters(names)
        moments = HeadMoments.collect(network.model, train)
        for refit in (None, "least_squares"):
            given = {} if refit is None else {"refit": refit, "moments": moments}
            curve = metrics.accuracy_curve(network.model, tables, test, KS, control=Control(10, network.seed), **given)
            found.append(curve[curve.class_name == "all"].assign(kind=network.kind, refit=refit or "none"))
    rows = pd.concat(found)
    rows = rows[(rows.filters != "dense") | (rows.refit == "none")]
    cells = rows.groupby(["kind", "filters", "refit", "k"], sort=False)[["accuracy", "low", "high"]].apply(
        lambda part: together(list(part.itertuples(index=False, name=None)))
    )
    print("\n## `decompose` at k features of each class: accuracy\n")
    shown = cells.unstack("k").fillna("")
    shown.index = [
        f"{kind}, {filters}{'' if refit == 'none' else ', refitted'}" for kind, filters, refit in shown.index
    ]
    markdown(shown, "mean over seeds [lowest, highest end of their 95 % intervals]; dense: k = K")


def masking(networks: list[Network], some: Loader, test: Loader, names: tuple[str, ...]) -> None:
    """Recall when one class's channels are set to zero for all images: its own, and what it does to the others.

    A plain network is masked by tables of the same kind as gates start from, each column over its maximum, and by the
    gate that suits it best: what of a result the choice of channels explains.
    """
    found: dict[str, list[pd.DataFrame]] = {}
    for network in networks:
        for what, filters in masks(network, some, names).items():
            frame = metrics.class_masking(network.model, filters, test, threshold=0.5)
            found.setdefault(f"{network.kind}, {what}", []).append(frame[frame.class_name != "all"])
    rows = {}
    for name, frames in found.items():
        seeds = pd.DataFrame([masked(frame) for frame in frames])
        rows[name] = {"seeds": str(len(seeds))} | {column: over_seeds(seeds[column]) for column in seeds}
    print("\n## Masking a class's channels for all images\n")
    markdown(
        pd.DataFrame(rows).T, "mean over classes and seeds [95 %, Student's t over seeds, where there are several]"
    )


def masks(network: Network, some: Loader, names: tuple[str, ...]) -> dict[str, ClassFilters]:
    """Tables by which a network's channels are masked where they are above .5."""
    if network.gate is None:
        chosen = InfluentialFeatures(network.model)
        tables = {
            f"its {selector.replace('_', ' ')} as the mask": LabelSensitiveGate.from_filters(
                chosen.attribute(some, selector=selector, class_names=names)
            )
            for selector in ("contribution", "mean_activation")
        }
        tables["the best gate for it as the mask"] = filter_ambiguity(network.model, some).gate
        return {what: gate.class_filters(names) for what, gate in tables.items()}
    cases = {"its gate": network.gate.class_filters(names)}
    if bool(network.gate.exclusive().any()):
        own = network.gate.class_filters(names)
        kept = own.scores * network.gate.exclusive().double()
        cases["channels of one class alone"] = ClassFilters(kept, kept, own.counts, "gate", own.layer, names)
    return cases


def masked(frame: pd.DataFrame) -> dict[str, float]:
    """The figures of one network."""
    frame, chance = frame[~frame.control], frame[frame.control]
    mine, others = frame[frame.masked == frame.class_name], frame[frame.masked != frame.class_name]
    drawn = chance[chance.masked == chance.class_name]
    return {
        "channels": mine.channels.mean(),
        "own recall": mine.recall.mean(),
        "own, random channels": drawn.recall.mean(),
        "classes at or below 5 %": float((mine.recall <= 0.05).sum()),
        "loss of the others": others["drop"].mean(),
        "others within 2 points": (others["drop"].abs() <= 0.02).mean(),
        "others lose at most 2 points": (others["drop"] <= 0.02).mean(),
    }


def over_seeds(values: pd.Series) -> str:
    """The mean, with Student's interval where there are several."""
    mean = float(values.mean())
    if len(values) == 1:
        return f"{mean:.3f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std()) / len(values) ** 0.5
    return interval(mean, mean - half, mean + half)


if __name__ == "__main__":
    main()
