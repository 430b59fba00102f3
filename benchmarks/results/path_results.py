"""The published tables of calculation paths.

    python -m benchmarks.results.path_results --parts table states > tables.md

Takes four decoupled networks, of which ``--networks`` has those that do not ship. ``--network NAME=FOLDER`` adds others
that a recipe trained, ``--static NAME=FOLDER`` networks that were pruned for good and trained on, by the recipe's
``--method l1``. "Before" is the network that each began as. Judged by test images. Prints Markdown.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import silhouette_score
from torch import Tensor, nn

from benchmarks.lib.networks import Networks, add_networks_argument
from benchmarks.lib.recipes import Loader, Split, load
from benchmarks.lib.report import markdown, stamp
from captum_classfilters import PathDecoupler, metrics
from captum_classfilters.assets import load_network
from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.intervals import wilson
from captum_classfilters.decoupling import Paths

PARTS = ["table", "controls", "states", "information", "embedding", "scores"]
PUBLISHED = (
    ("resnet20", "decoupled", 0), ("resnet20", "decoupled-r0", 0),
    ("vgg", "decoupled-paper", 0), ("inception", "decoupled-paper", 0),
)  # fmt: skip
EMBEDDED = 2_000  # test images: t-SNE takes long
SCORED = 1_000


class Network:
    """A decoupled network, or one pruned for good, and the one it began as."""

    def __init__(self, name: str, decoupler: PathDecoupler, start: nn.Module | None, gates: Any = None) -> None:
        self.name, self.decoupler, self.start, self.gates = name, decoupler.eval(), start, gates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--network", nargs="*", default=[], metavar="NAME=FOLDER[=START]", help="decoupled by a recipe")
    parser.add_argument("--static", nargs="*", default=[], metavar="NAME=FOLDER", help="pruned by a recipe")
    parser.add_argument("--only", action="store_true", help="only those of --network and --static")
    add_networks_argument(parser)
    parser.add_argument("--limit", type=int, default=None, help="only so many images (for a trial)")
    options = parser.parse_args()
    print(stamp("results.path_results", "cpu"))
    data = load("fashion_mnist")
    test = Split(*(part[: options.limit] for part in data.test))
    networks = [] if options.only else published(Networks(options.networks))
    networks += [decoupled(*given.split("=")) for given in options.network]
    static = [pruned(*given.split("=")) for given in options.static]
    paths = {network.name: network.decoupler.paths(Loader(test)) for network in networks}
    parts: dict[str, Callable[[], None]] = {
        "table": lambda: table(networks, static, paths, test),
        "controls": lambda: controls(networks, test),
        "states": lambda: states(networks, paths),
        "information": lambda: information(networks, paths),
        "embedding": lambda: embedding(networks, paths, test),
        "scores": lambda: scores(networks, test, data.class_names),
    }
    for name in options.parts:
        started = time.time()
        parts[name]()
        print(f"\n<!-- {name}: {time.time() - started:.0f} s -->", flush=True)


def published(networks: Networks) -> list[Network]:
    """The decoupled networks of the published tables."""
    return [
        Network(
            f"{name} {'R = 0' if method.endswith('r0') else 'R = .5'} s{seed}",
            networks.decoupled(seed, method, name),
            networks.plain(seed) if name == "resnet20" else None,
        )
        for name, method, seed in PUBLISHED
    ]


def decoupled(name: str, folder: str, start: str = "") -> Network:
    model, _ = load_network(Path(folder) / "network.safetensors")
    decoupler = PathDecoupler(model).load(Path(folder) / "paths.safetensors")
    return Network(name, decoupler, load_network(Path(start))[0] if start else None)


def pruned(name: str, folder: str) -> Network:
    model, _ = load_network(Path(folder) / "network.safetensors")
    gates = tuple(torch.load(Path(folder) / "gates.pt", weights_only=True))
    return Network(name, PathDecoupler(model), None, gates)


# -- one figure each ---------------------------------------------------------------------------------------------------


def table(networks: Sequence[Network], static: Sequence[Network], paths: dict[str, Paths], test: Split) -> None:
    """Accuracy against MACs: before, decoupled, pruned for good."""
    rows = []
    for network in networks:
        found = paths[network.name]
        right = int((found.predictions == found.labels).sum())
        if network.start is not None:
            rows.append(_row(f"{network.name}: before", _right(network.start, test), len(test.labels), 1.0))
        share = float(found.macs().double().mean()) / found.costs.dense
        rows.append(_row(f"{network.name}: decoupled", right, len(found), share, found))
    for network in static:
        with network.decoupler.frozen(network.gates):
            right = _right(network.decoupler, test)
        costs = network.decoupler.costs(test.images[:1].float() / 255)
        share = float(costs.of([gate.bool() for gate in network.gates], controllers=False)) / costs.dense
        rows.append(_row(f"{network.name}: l1 pruned", right, len(test.labels), share))
    show(rows, "### Accuracy against MACs")


def show(rows: list[dict[str, str]], title: str) -> None:
    markdown(pd.DataFrame(rows).set_index("network"), title)


def _row(name: str, right: int, images: int, share: float, found: Paths | None = None) -> dict[str, Any]:
    low, high = wilson(right, images)
    row = {
        "network": name, "accuracy": f"{right / images:.4f} [{float(low):.4f}, {float(high):.4f}]",
        "MACs": f"{share:.3f}", "times fewer": f"{1 / share:.2f}",
    }  # fmt: skip
    if found is not None:
        states = found.states()
        dynamic = states.dynamic.sum() / states.channels.sum()
        row |= {"open": f"{float(found.bits().double().mean()):.3f}", "dynamic": f"{dynamic:.3f}"}
        row |= {"different paths": str(len(found.codes.unique(dim=0)))}
    return row | {name: row.get(name, "") for name in ("open", "dynamic", "different paths")}


@torch.inference_mode()
def _right(model: nn.Module, test: Split) -> int:
    with borrowed(model):
        return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in Loader(test))


def controls(networks: Sequence[Network], test: Split) -> None:
    rows = []
    for network in networks:
        found = metrics.path_accuracy(network.decoupler, Loader(test))
        cells = {name: f"{row.accuracy:.4f} [{row.low:.4f}, {row.high:.4f}]" for name, row in found.iterrows()}
        rows.append({"network": network.name, **cells})
    show(rows, "### Does it matter which path? Accuracy with other gates")


def states(networks: Sequence[Network], paths: dict[str, Paths]) -> None:
    columns: dict[str, Any] = {}
    for network in networks:
        found = paths[network.name].states()
        shares = found[["energetic", "silent", "dynamic"]].div(found.channels, axis=0)
        columns[network.name] = [" / ".join(f"{value:.2f}" for value in row) for row in shares.to_numpy()]
    longest = max(map(len, columns.values()))
    padded = {name: [*cells, *[""] * (longest - len(cells))] for name, cells in columns.items()}
    table = pd.DataFrame(padded, index=pd.RangeIndex(1, longest + 1, name="layer"))
    markdown(table, "### Filter states: energetic / silent / dynamic, shares of each layer's filters")


def information(networks: Sequence[Network], paths: dict[str, Paths]) -> None:
    rows = []
    for network in networks:
        information = metrics.path_information(network.decoupler, paths[network.name])
        layers = information[~information.control & (information.layer != "all")]
        (_, whole), (_, control) = information[information.layer == "all"].iterrows()
        rows.append(
            {
                "network": network.name, "mean": f"{whole.cross_entropy:.3f} [{whole.low:.3f}, {whole.high:.3f}]",
                "first layer": f"{layers.cross_entropy.iloc[0]:.3f}",
                "middle": f"{layers.cross_entropy.iloc[len(layers) // 2]:.3f}",
                "last": f"{layers.cross_entropy.iloc[-1]:.3f}", "best layer": f"{layers.cross_entropy.min():.3f}",
                "other images' labels": f"{control.cross_entropy:.3f}",
            }
        )  # fmt: skip
    show(rows, "### What gates say of the class: cross-entropy in nats (ln 10 = 2.303 says nothing)")


def embedding(networks: Sequence[Network], paths: dict[str, Paths], test: Split) -> None:
    """Silhouettes of classes, in the plane of t-SNE and among the paths themselves."""
    rows = []
    for network in networks:
        found = paths[network.name][:EMBEDDED]
        rows.append({"network": f"{network.name}: decoupled", **_silhouettes(found)})
        if network.start is not None:
            before = activation_paths(network, found, test)
            rows.append({"network": f"{network.name}: before", **_silhouettes(before)})
    show(rows, f"### Do paths of a class lie together? Silhouettes, {EMBEDDED} test images")


def _silhouettes(found: Paths) -> dict[str, str]:
    labels = np.asarray(found.labels)
    shuffled = np.random.default_rng(0).permutation(labels)
    points, bits = found.embed(seed=0).numpy(), found.bits().numpy()
    random = np.random.default_rng(0)
    # halves without replacement: a point twice would be its own neighbour
    draws = [random.permutation(len(labels))[: len(labels) // 2] for _ in range(20)]
    spread = [silhouette_score(points[draw], labels[draw]) for draw in draws]
    return {
        "t-SNE": f"{silhouette_score(points, labels):.3f} [{min(spread):.3f}, {max(spread):.3f}]",
        "t-SNE, labels permuted": f"{silhouette_score(points, shuffled):.3f}",
        "Hamming": f"{silhouette_score(bits, labels, metric='hamming'):.3f}",
    }


@torch.inference_mode()
def activation_paths(network: Network, like: Paths, test: Split) -> Paths:
    """What stands for paths before decoupling: a channel is open where its mean response is above its own median."""
    start: Any = network.start
    pooled: dict[str, list[Tensor]] = {unit.site: [] for unit in network.decoupler.units}
    with borrowed(start) as borrow:
        for site in pooled:
            borrow.after(start.get_submodule(site), lambda _, __, out, site=site: pooled[site].append(out.mean((2, 3))))
        for images, _ in Loader(Split(*(part[: len(like)] for part in test))):
            start(images)
    responses = torch.cat([torch.cat(each) for each in pooled.values()], 1)
    bits = responses > responses.median(0).values
    codes = torch.from_numpy(np.packbits(bits.numpy(), axis=1, bitorder="little"))
    return replace(like, codes=codes)


def scores(networks: Sequence[Network], test: Split, class_names: Sequence[str]) -> None:
    """Table 1 of the paper with the object of each class for a concept."""
    images = test.images[:SCORED].float() / 255
    masks = images[:, 0] > 0.1
    loader = []
    for start in range(0, len(images), 250):
        rows = range(start, min(start + 250, len(images)))
        concepts = [_parts(class_names[int(test.labels[row])], masks[row]) for row in rows]
        loader.append((images[start : start + 250], concepts))
    rows = []
    for network in networks:
        sites = [unit.site for unit in network.decoupler.units]
        for name, model in (("decoupled", network.decoupler), ("before", network.start)):
            if model is not None:
                found = metrics.concept_scores(model, loader, sites if name == "before" else None)
                rows.append({"network": f"{network.name}: {name}", **_layer_cells(metrics.layer_scores(found))})
    show(rows, f"### Filter scores: best concept of each filter, mean over filters; {SCORED} test images")


def _parts(name: str, mask: Tensor) -> dict[str, Tensor]:
    """The upper and the lower half of the object."""
    half = mask.shape[0] // 2
    upper, lower = mask.clone(), mask.clone()
    upper[half:], lower[:half] = False, False
    return {f"{name}, upper half": upper, f"{name}, lower half": lower}


def _layer_cells(scores: pd.DataFrame) -> dict[str, str]:
    rows, controls = (scores[scores.control == side].reset_index() for side in (False, True))
    picked = [0, len(rows) // 3, 2 * len(rows) // 3, len(rows) - 1]
    cells = {}
    for place, name in zip(picked, ("first", "a third in", "two thirds in", "last"), strict=True):
        row = rows.iloc[place]
        cells[name] = f"{row.score:.3f} [{row.low:.3f}, {row.high:.3f}], random {controls.score[place]:.3f}"
    return cells


if __name__ == "__main__":
    main()
