"""How well calculation paths tell adversarial images, and what is left of it when the attacker knows.

    python -m benchmarks.results.detection_pairs FOLDER
    python -m benchmarks.results.detection_results FOLDER
    python -m benchmarks.results.detection_attacks FOLDER

Every detector counts noise of the attack's size as clean, in training and in judging. It learns from images of the
training set; its alarm is calibrated on the first half of the test set and judged on the second. Cells are the mean
over five runs and their standard deviation; a run draws four fifths of the pairs, by image, and seeds the classifier.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import AdaBoostClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.metrics import roc_auc_score

from benchmarks.lib.recipes import Loader
from benchmarks.lib.report import markdown
from benchmarks.results.detection_bench import BOTH, MAIN, RUNS, Bench, auc_of, forest, judged, run, spread
from benchmarks.results.detection_pairs import pgd
from captum_classfilters import PathDetector, PathOutlierDetector, PathPairs, adversarial_paths
from captum_classfilters.attacks import Attack
from captum_classfilters.detection import AdaptivePGD, PathMatching, distil
from captum_classfilters.detection.conformal import false_positive_interval
from captum_classfilters.metrics import wilson

ADAPTIVE_IMAGES, ADAPTIVE_STEPS = 400, 40


# -- the attacker who knows --------------------------------------------------------------------------------------------


def adaptive(bench: Bench) -> None:
    """First, since it is what a detector is worth."""
    train = bench.pairs(MAIN, "train")[:1000]
    X, y, _ = train.stack()
    detectors: dict[str, Any] = {
        "forest, bits": forest(bench, 0).fit(X, y),
        "forest, logits and profiles": forest(bench, 0, BOTH).fit(X, y),
        "outlier": PathOutlierDetector().fit(bench.clean),
    }
    alarm_set = bench.decoupler.paths(Loader(bench.data["calibration"]), logits=True)
    for detector in detectors.values():
        detector.calibrate(alarm_set, alpha=0.05)
    asked, _, _ = train.stack()
    # each reads what its detector does
    reads = {name: "logits" if "logits" in name else "bits" for name in detectors}
    surrogates = {name: distil(detector, asked, reads=reads[name]) for name, detector in detectors.items()}
    some = Loader(type(bench.data["test"])(*(part[:ADAPTIVE_IMAGES] for part in bench.data["test"])), 200)
    rows = []
    for epsilon in (2, 4):
        attacks: dict[str, Any] = {
            "PGD-40, gates constant": pgd(bench.decoupler),
            "PGD-40, through the gates": AdaptivePGD(bench.decoupler),
        }
        for name, surrogate in surrogates.items():
            attacks[f"and past: {name}"] = AdaptivePGD(bench.decoupler, surrogate, reads=reads[name])
        attacks["path matching"] = PathMatching(bench.decoupler, bench.clean[:3000])
        for name, attack in attacks.items():
            budget = Attack(attack, epsilon / 255, step_num=ADAPTIVE_STEPS, step_size=epsilon / 255 / 8)
            pairs = adversarial_paths(bench.decoupler, some, budget, logits=True)
            row = {"attack": f"{name}, {epsilon}/255", "fooled": f"{pairs.success:.2f} of {pairs.tried}"}
            for known, detector in detectors.items():
                looked_at, marks, _ = pairs.stack()
                unseen = int((~detector.alarms(pairs.adversarial)).sum())
                low, high = wilson(unseen, pairs.tried)
                auc = roc_auc_score(marks, detector.strangeness(looked_at))
                row[known] = f"{auc:.2f}, {unseen / pairs.tried:.2f} [{low:.2f}, {high:.2f}]"
            rows.append(row)
    print("\n### The attacker who knows\n")
    title = "AUC; share of attacked images that are seen wrong and not noticed at 5 % false alarms [Wilson]"
    markdown(pd.DataFrame(rows).set_index("attack"), title)


# -- how many pairs, which classifier: table 4 -------------------------------------------------------------------------


def sizes(bench: Bench) -> None:
    train, test = bench.pairs(MAIN, "train"), bench.pairs(MAIN, "test")
    kinds: dict[str, Callable[[int], Any]] = {
        "random forest": lambda seed: RandomForestClassifier(300, min_samples_leaf=2, random_state=seed),
        "AdaBoost": lambda seed: AdaBoostClassifier(random_state=seed),
        "gradient boosting": lambda seed: HistGradientBoostingClassifier(random_state=seed),
        "random labels (forest)": lambda seed: RandomForestClassifier(100, random_state=seed),
    }
    rows: dict[str, dict[str, str]] = {}
    for kind, make in kinds.items():
        found: dict[str, list[float]] = {}
        for seed in range(RUNS):
            generator = np.random.default_rng(seed)
            one_each = _each_class(test, 1, generator)
            judges = {"1 per class": one_each, "all": np.arange(len(test))}
            for size in ("1 per class", "5 per class", "10 per class", 1000, 3000, len(train)):
                rows_of = (
                    _each_class(train, int(size.split()[0]), generator)
                    if isinstance(size, str)
                    else generator.permutation(len(train))[:size]
                )
                X, y, _ = train[rows_of].stack()
                y = generator.permutation(y) if kind.startswith("random labels") else y
                detector = PathDetector(make(seed)).fit(X, y)
                for judge, chosen in judges.items():
                    if isinstance(size, str) or judge == "all":
                        Xt, yt, _ = test[chosen].stack()
                        label = f"{size}, judged on {judge}" if isinstance(size, str) else f"{size} pairs"
                        found.setdefault(label, []).append(judged(yt, detector.strangeness(Xt))[0])
        rows[kind] = {label: spread(values) for label, values in found.items()}
    print(f"\n### How many pairs to learn from ({MAIN}/255, {len(test)} pairs to judge by)\n")
    markdown(pd.DataFrame(rows).rename_axis("learnt from"), "AUC on bits")


def _each_class(pairs: PathPairs, count: int, generator: Any) -> np.ndarray:
    labels: Any = pairs.clean.labels
    chosen = [generator.permutation((labels == label).nonzero()[:, 0].numpy())[:count] for label in labels.unique()]
    return np.concatenate(chosen)


# -- the alarm ---------------------------------------------------------------------------------------------------------


def calibration(bench: Bench) -> None:
    """The realised rate of false alarms on images never seen."""
    X, y, _ = bench.pairs(MAIN, "train")[:1000].stack()
    alarm_set = bench.decoupler.paths(Loader(bench.data["calibration"]), logits=True)
    unseen = bench.decoupler.paths(Loader(bench.data["test"]), logits=True)
    wrong = torch.ne(unseen.predictions, unseen.labels).numpy()
    detectors: dict[str, Any] = {
        "forest, bits": forest(bench, 0).fit(X, y),
        "forest, logits and profiles": forest(bench, 0, BOTH).fit(X, y),
        "outlier": PathOutlierDetector().fit(bench.clean),
    }
    rows = []
    for name, detector in detectors.items():
        detector.calibrate(alarm_set, alpha=0.01)
        for alpha in (0.01, 0.05, 0.1):
            alarms = detector.alarms(unseen, alpha)
            low, high = false_positive_interval(alpha, len(alarm_set), len(unseen))
            inside = "yes" if low <= alarms.mean() <= high else "NO"
            rows.append({
                "detector": f"{name}, {alpha:g} asked", "alarms": f"{alarms.mean():.4f}",
                "99 % interval": f"[{low:.4f}, {high:.4f}]", "inside": inside,
                "of images seen wrong": f"{alarms[wrong].mean():.3f} of {wrong.sum()}",
                "of images seen right": f"{alarms[~wrong].mean():.3f}",
            })  # fmt: skip
    print("\n### False alarms on 5,000 images never seen, calibrated on 5,000 others\n")
    markdown(pd.DataFrame(rows).set_index("detector"), "all of them clean")


def noise(bench: Bench) -> None:
    """Whether it is noise that is found: alarms on noise, and what the AUC would be if noise were left out."""
    rows = {}
    alarm_set = bench.decoupler.paths(Loader(bench.data["calibration"]), logits=True)
    for name in ("pgd 1", "pgd 2", "pgd 4", "pgd 8"):
        train, test = bench.pairs(name, "train")[:1000], bench.pairs(name, "test")
        row = {}
        for label, told in (("noise counted as clean", True), ("noise left out", False)):
            X, y, _ = train.stack(noise=told)
            detector = forest(bench, 0, BOTH).fit(X, y).calibrate(alarm_set)
            row[f"AUC, {label}"] = f"{auc_of(detector, test, noise=told):.3f}"
            row[f"alarms on noise, {label}"] = f"{detector.alarms(test.noise).mean():.3f}"
            if told:
                row["alarms on the attack"] = f"{detector.alarms(test.adversarial).mean():.3f}"
                row["alarms on their clean twins"] = f"{detector.alarms(test.clean).mean():.3f}"
        rows[name] = row
    print("\n### Noise of the same size (alarm at 5 %; forest, logits and profiles)\n")
    markdown(pd.DataFrame(rows).T.rename_axis("attack"), "one run")


if __name__ == "__main__":
    run("results.detection_results", __doc__, [adaptive, sizes, calibration, noise])
