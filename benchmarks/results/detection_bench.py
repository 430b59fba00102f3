"""What the benchmarks of detection share: the network, its images, detectors and how they are judged."""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.lib.recipes import Loader
from benchmarks.lib.report import stamp
from benchmarks.results.detection_pairs import images, network, read
from captum_classfilters import PathDecoupler, PathDetector, PathPairs, Paths
from captum_classfilters.detection import ClassProfiles
from captum_classfilters.detection.pairs import stack_pairs

RUNS = 5
MAIN = "pgd 2"
BOTH = ("logits", "profiles")


class Bench(NamedTuple):
    folder: Path
    decoupler: PathDecoupler
    data: dict[str, Any]
    profiles: ClassProfiles
    clean: Paths  # of training images that no pair is made of

    def pairs(self, name: str, split: str) -> PathPairs:
        return read(self.folder, name, split)


def opened(folder: Path) -> Bench:
    """The network, and the clean paths that profiles are made of."""
    warnings.simplefilter("ignore")
    decoupler, data = network(), images()
    rest = Loader(type(data["train"])(*(part[-10_000:] for part in data["train"])))
    clean = decoupler.paths(rest, logits=True)
    return Bench(folder, decoupler, data, ClassProfiles(clean), clean)


def run(name: str, description: str | None, parts: Sequence[Callable[[Bench], None]]) -> None:
    """The command line of a benchmark: the folder of the pairs, and which parts."""
    known = {part.__name__: part for part in parts}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=known, default=known)
    options = parser.parse_args()
    print(stamp(name, "cpu"), flush=True)
    bench = opened(options.folder)
    for part in options.parts:
        started = time.time()
        known[part](bench)
        print(f"\n<!-- {part}: {time.time() - started:.0f} s -->", flush=True)


def forest(bench: Bench, seed: int, features: Any = "bits") -> PathDetector:
    inner = RandomForestClassifier(300, min_samples_leaf=2, random_state=seed)
    return PathDetector(inner, features=features, profiles=bench.profiles)


def together(parts: Sequence[PathPairs]) -> PathPairs:
    merged = {name: Paths.merge(*(getattr(part, name) for part in parts)) for name in ("clean", "adversarial", "noise")}
    pictures = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("index", "images", "adversarial_images", "noise_images")
    }
    return PathPairs(
        **merged,
        **pictures,
        misclassified=parts[0].misclassified,
        tried=sum(part.tried for part in parts),
        succeeded=sum(part.succeeded for part in parts),
    )


def judged(y: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """AUC, and the share found where 5 % of the clean ones are called adversarial."""
    false, true, _ = roc_curve(y, scores)
    return float(roc_auc_score(y, scores)), float(np.interp(0.05, false, true))


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f})"


def auc_of(detector: Any, pairs: PathPairs, noise: bool = True) -> float:
    X, y, _ = stack_pairs(pairs.clean, pairs.adversarial, pairs.noise if noise else None)
    return float(roc_auc_score(y, detector.strangeness(X)))


def four_fifths(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)[: max(1, round(count * 0.8))]


def pictures(pairs: PathPairs, read: Callable[[Tensor], np.ndarray]) -> list[np.ndarray]:
    """What a baseline reads off clean, attacked and noisy images."""
    given: Any = (pairs.images, pairs.adversarial_images, pairs.noise_images)
    return [read(each) for each in given]


def rows_of(tables: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """In the order of `stack_pairs`."""
    return np.concatenate([table[rows] for table in tables])


def joined(parts: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(kind) for kind in zip(*parts, strict=True)]


def by_regression(
    learn: list[np.ndarray], rows: np.ndarray, y: np.ndarray, judge: list[np.ndarray], some: np.ndarray
) -> np.ndarray:
    """Scores of a logistic regression on what a baseline reads."""
    inner = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(rows_of(learn, rows), y)
    return inner.decision_function(rows_of(judge, some))


def seen(bench: Bench) -> tuple[Tensor, Tensor]:
    """Training images that no pair is made of."""
    pictures, labels = (part[-10_000:] for part in bench.data["train"])
    return pictures.float() / 255, labels
