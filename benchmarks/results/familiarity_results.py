"""Images of no known class: our detectors beside those of pytorch-ood, on the same features.

    pip install pytorch-ood --no-deps
    python tutorials/recipes/train_fashion_mnist.py --without shirt sneaker --seed 0 --epochs 10 --out eight/s0
    python tutorials/recipes/train_fashion_mnist.py --without coat sandal --seed 1 --epochs 10 --out eight/s1
    python -m benchmarks.results.familiarity_results eight/s0 eight/s1

Detectors learn from all training images, whose features pytorch-ood gets as they are. Known images: test images. Far:
letters, digits, turned images, noise, for the three networks that ship. Near: the two classes that a network of eight
classes never saw.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from benchmarks.lib.networks import Networks
from benchmarks.lib.recipes import Loader, Split, load
from benchmarks.lib.report import markdown, stamp
from benchmarks.lib.strange_images import far
from captum_classfilters import HeadMoments, HeadPass, InfluentialFeatures, assets, decompose
from captum_classfilters.detection import FamiliarityDetector
from captum_classfilters.detection.conformal import false_positive_interval
from captum_classfilters.detection.familiarity import METHODS
from captum_classfilters.metrics import mean_interval

Array = np.ndarray[Any, Any]
HELD_OUT = (("shirt", "sneaker"), ("coat", "sandal"))
SPARSE = (5, 10, 20)


class Seen(NamedTuple):
    """What a network says of some images."""

    features: Tensor
    logits: Tensor
    labels: Tensor | None


def seen(head_pass: HeadPass) -> Seen:
    with head_pass.batches(need_labels=False) as stream:
        parts = [(batch.features, batch.logits, batch.labels) for batch in stream]
    features, logits, labels = zip(*parts, strict=True)
    return Seen(torch.cat(features), torch.cat(logits), None if labels[0] is None else torch.cat(labels))


class Contest:
    """All detectors fitted on one network's training images."""

    def __init__(self, model: nn.Module, train: Split, head: nn.Linear) -> None:
        self.model = model
        learnt = HeadPass(model, Loader(train)).cached()
        self.ours = {name: FamiliarityDetector(name).fit(learnt) for name in METHODS}
        self.theirs = _theirs(seen(learnt), head)
        filters = InfluentialFeatures(model).attribute(Loader(train), selector="contribution")
        moments = HeadMoments.collect(learnt)
        self.sparse = {
            f"energy, {k} channels a class": decompose(model, filters, k, refit="least_squares", moments=moments)
            for k in SPARSE
        }

    def scores(self, images: Any) -> dict[str, Array]:
        """Of each detector, larger for stranger images."""
        head_pass = HeadPass(self.model, images).cached(need_labels=False)
        mine = {name: detector.strangeness(head_pass) for name, detector in self.ours.items()}
        data = seen(head_pass)
        other = {f"{name} (pytorch-ood)": np.asarray(score(data), float) for name, score in self.theirs.items()}
        small = {}
        with torch.inference_mode():
            for name, model in self.sparse.items():
                logits = torch.cat([model(batch[0] if isinstance(batch, tuple) else batch) for batch in images])
                small[name] = -torch.logsumexp(logits, 1).numpy()
        return mine | other | small


def _theirs(learnt: Seen, head: nn.Linear) -> dict[str, Callable[[Seen], Any]]:
    from pytorch_ood import detector as ood

    weight, bias = head.weight.detach(), head.bias.detach()
    mahalanobis, relative, neighbours = ood.Mahalanobis(None), ood.RMD(None), ood.KNN(None, k=50)
    features, labels = learnt.features, learnt.labels
    vim, dice, she = ood.ViM(None, d=32, w=weight, b=bias), ood.DICE(None, w=weight, b=bias, p=0.7), ood.SHE(None, head)
    some = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:10_000]
    for fitted in (mahalanobis, relative, vim, dice, she):
        fitted.fit_features(features, labels)
    neighbours.fit_features(features[some], labels[some])  # as many as ours keeps
    threshold = float(np.percentile(features[some].numpy(), 90))
    with_features = {
        "Mahalanobis": mahalanobis, "RMD": relative, "KNN": neighbours, "ViM": vim, "DICE": dice,
    }  # fmt: skip
    scores: dict[str, Callable[[Seen], Any]] = {
        name: lambda data, fitted=fitted: fitted.predict_features(data.features)
        for name, fitted in with_features.items()
    }
    scores["SHE"] = lambda data: she.predict_features(data.features)
    scores["EnergyBased"] = lambda data: ood.EnergyBased(None).predict_logits(data.logits)
    scores["MaxSoftmax"] = lambda data: ood.MaxSoftmax(None).predict_logits(data.logits)
    scores["ReAct"] = lambda data: -torch.logsumexp(head(data.features.clamp(max=threshold)), 1).detach()
    return scores


def judged(known: Array, strange: Array) -> tuple[float, float]:
    """AUROC, and the share of known images that raise an alarm where 95 % of the strange ones do."""
    truth = np.r_[np.zeros(len(known)), np.ones(len(strange))]
    scores = np.r_[known, strange]
    false, true, _ = roc_curve(truth, scores)
    return float(roc_auc_score(truth, scores)), float(false[np.argmax(true >= 0.95)])


def table(rows: list[dict[str, Any]], title: str) -> None:
    """Mean over networks with its interval; one column for each set of images."""
    frame = pd.DataFrame(rows)

    def cell(values: pd.Series) -> str:
        if len(values) < 2:
            return f"{values.iloc[0]:.3f}"
        mean, low, high = mean_interval(values.to_numpy())
        return f"{mean:.3f} [{max(low, 0):.3f}, {min(high, 1):.3f}]"

    for measure in ("auroc", "fpr95"):
        shown = frame.pivot_table(index="detector", columns="images", values=measure, aggfunc=list, sort=False)
        shown = shown.map(lambda values: cell(pd.Series(values)))
        whole = frame.groupby(["detector", "network"], sort=False)[measure].mean().groupby("detector", sort=False)
        shown.insert(0, "mean of all sets", whole.apply(cell))
        order = whole.mean().sort_values(ascending=measure == "fpr95").index
        markdown(shown.loc[order], f"{title}: {measure}, mean over networks [95 % interval]")


def far_images(networks: Networks) -> None:
    data = load("fashion_mnist")
    sets, rows, alarms = far(data.test), [], []
    half = len(data.test.labels) // 2
    first, second = (Split(*(part[rows_] for part in data.test)) for rows_ in (slice(half), slice(half, None)))
    for seed in range(3):
        model = networks.plain(seed)
        contest = Contest(model, data.train, model.fc)  # type: ignore[arg-type]
        known = contest.scores(Loader(second))
        for name, images in sets.items():
            strange = contest.scores(list(images.split(500)))
            for detector, scores in strange.items():
                auroc, fpr = judged(known[detector], scores)
                rows.append({"network": seed, "images": name, "detector": detector, "auroc": auroc, "fpr95": fpr})
        clean, other = (HeadPass(model, Loader(part)).cached() for part in (first, second))
        for name, detector in contest.ours.items():
            p = detector.calibrate(clean).p_value(other)
            alarms += [
                {"detector": name, "asked": a, "alarms": (p <= a * (1 + 1e-9)).mean()} for a in (0.01, 0.05, 0.1)
            ]
        print(f"<!-- network {seed} done -->", flush=True)
    table(rows, "Far: letters, digits, turned images, noise")
    frame = pd.DataFrame(alarms).groupby(["detector", "asked"], sort=False).alarms.agg(["min", "max"]).reset_index()
    frame["rates"] = [f"{row['min']:.4f} to {row['max']:.4f}" for _, row in frame.iterrows()]
    shown = frame.pivot(index="detector", columns="asked", values="rates")
    bounds = {a: "{:.4f} to {:.4f}".format(*false_positive_interval(a, half, half)) for a in (0.01, 0.05, 0.1)}
    shown.loc["99 % interval by chance"] = bounds
    markdown(shown, "Alarms on 5,000 known images, calibrated on 5,000 others: lowest to highest of three networks")
    timing(networks.plain(0), data)


def near_images(folders: list[Path]) -> None:
    data, rows = load("fashion_mnist"), []
    for number, (folder, names) in enumerate(zip(folders, HELD_OUT, strict=True)):
        model, about = assets.load_network(folder / "network.safetensors")
        unknown = torch.tensor([data.class_names.index(name) for name in names])
        kept = [index for index in range(10) if index not in unknown]

        def part(split: Split, kept: list[int] = kept) -> Split:
            inside = torch.isin(split.labels, torch.tensor(kept))
            return Split(split.images[inside], torch.searchsorted(torch.tensor(kept), split.labels[inside]))

        strange = Split(*(values[torch.isin(data.test.labels, unknown)] for values in data.test))
        contest = Contest(model, part(data.train), model.fc)  # type: ignore[arg-type]
        known, new = contest.scores(Loader(part(data.test))), contest.scores(Loader(strange))
        print(f"<!-- {names} held out, accuracy on the other eight {about['test_accuracy']:.4f} -->", flush=True)
        for detector in known:
            auroc, fpr = judged(known[detector], new[detector])
            rows.append(
                {"network": number, "images": " and ".join(names), "detector": detector, "auroc": auroc, "fpr95": fpr}
            )
    table(rows, "Near: the two classes that a network never saw")


def timing(model: nn.Module, data: Any, rounds: int = 7) -> None:
    """Scoring beside a bare pass over the same images, by turns."""
    batches = list(Loader(Split(*(part[:2000] for part in data.test))))
    detectors = {name: FamiliarityDetector(name).fit(HeadPass(model, batches)) for name in METHODS}

    def bare() -> None:
        with torch.inference_mode():
            for images, _ in batches:
                model(images)

    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, detector in detectors.items():
            seconds = []
            for call in (bare, lambda detector=detector: detector.strangeness(HeadPass(model, batches))):
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
            ratios[name].append(seconds[1] / seconds[0])
    shown = pd.DataFrame(
        {
            "scoring / bare pass": {
                name: f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
                for name, values in ratios.items()
            }
        }
    )
    markdown(shown, f"Time, ResNet-20, 2,000 images in batches of 500: median of {rounds} (lowest to highest)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eight", type=Path, nargs="*", help="folders of the two networks of eight classes")
    parser.add_argument("--skip-far", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(stamp("results.familiarity_results", "cpu"), flush=True)
    if not options.skip_far:
        far_images(Networks())
    if options.eight:
        near_images(options.eight)


if __name__ == "__main__":
    main()
