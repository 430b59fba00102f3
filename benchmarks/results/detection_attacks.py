"""Detection attack by attack, beside other detectors; `benchmarks.results.detection_results` says how.

python -m benchmarks.results.detection_attacks FOLDER
"""

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestClassifier

from benchmarks.lib.baselines import Mahalanobis, critical_paths, softmax_score
from benchmarks.lib.report import markdown
from benchmarks.results.detection_bench import (
    BOTH,
    MAIN,
    RUNS,
    Bench,
    auc_of,
    by_regression,
    forest,
    four_fifths,
    joined,
    judged,
    pictures,
    rows_of,
    run,
    seen,
    spread,
    together,
)
from captum_classfilters import PathOutlierDetector, PathPairs

MADE = [f"{attack} {epsilon}" for attack in ("pgd", "fgsm") for epsilon in (1, 2, 4, 8)] + ["cw"]


# -- attack by attack --------------------------------------------------------------------------------------------------


def attacks(bench: Bench) -> None:
    rows, rates = {}, {}
    maha = Mahalanobis(bench.decoupler, *seen(bench))
    for name in MADE:
        train, test = bench.pairs(name, "train"), bench.pairs(name, "test")
        if name == MAIN:
            train = train[:1000]
        rows[name], rates[name] = _by_detector(bench, train, test, maha)
    shown = _known_attacks(bench)
    for name in ("transfer 2", "local search", "one pixel"):
        label = f"{name} (not learnt)"
        rows[label], rates[label] = _by_detector(bench, shown, bench.pairs(name, "test"), maha)
    print("\n### Attack by attack: AUC\n")
    markdown(pd.DataFrame(rows).T.rename_axis("attack"), "mean over five runs, standard deviation in brackets")
    print("\n### Attack by attack: share found at 5 % false alarms\n")
    markdown(pd.DataFrame(rates).T.rename_axis("attack"), "the same")


def _by_detector(
    bench: Bench, train: PathPairs, test: PathPairs, maha: Mahalanobis
) -> tuple[dict[str, str], dict[str, str]]:
    found: dict[str, list[tuple[float, float]]] = {}
    tables = {split: pictures(pairs, maha.read) for split, pairs in (("train", train), ("test", test))}
    softmax = pictures(test, lambda given: softmax_score(bench.decoupler, given))
    outlier = PathOutlierDetector().fit(bench.clean)
    for seed in range(RUNS):
        learn, judge = four_fifths(len(train), seed), four_fifths(len(test), seed + 100)
        X, y, _ = train[learn].stack()
        Xt, yt, _ = test[judge].stack()
        shuffled = np.random.default_rng(seed).permutation(y)
        scores = {
            "forest, bits": forest(bench, seed).fit(X, y).strangeness(Xt),
            "forest, logits": forest(bench, seed, "logits").fit(X, y).strangeness(Xt),
            "forest, profiles": forest(bench, seed, "profiles").fit(X, y).strangeness(Xt),
            "forest, logits and profiles": forest(bench, seed, BOTH).fit(X, y).strangeness(Xt),
            "outlier (no attack)": outlier.strangeness(Xt),
            "largest softmax": rows_of(softmax, judge),
            "Mahalanobis": by_regression(tables["train"], learn, y, tables["test"], judge),
            "random labels": forest(bench, seed).fit(X, shuffled).strangeness(Xt),
        }
        for name, values in scores.items():
            found.setdefault(name, []).append(judged(yt, values))
    counts = {"pairs": f"{len(train)} / {len(test)}", "fooled": f"{test.success:.2f}"}
    return (
        counts | {name: spread([auc for auc, _ in values]) for name, values in found.items()},
        counts | {name: spread([rate for _, rate in values]) for name, values in found.items()},
    )


def _known_attacks(bench: Bench) -> PathPairs:
    """A thousand pairs of the attacks that there are to learn from, but the transferred kind and the black boxes."""
    return together([bench.pairs(name, "train")[:250] for name in ("pgd 2", "pgd 4", "fgsm 2", "cw")])


# -- attacks that were not learnt, and other detectors -----------------------------------------------------------------


def others(bench: Bench) -> None:
    """Learnt on one attack, judged on each; on all but one, judged on it; beside critical paths on fewer pairs."""
    names = ["pgd 1", "pgd 2", "pgd 4", "pgd 8", "fgsm 2", "fgsm 4", "cw"]
    train = {name: bench.pairs(name, "train")[:500] for name in names}
    test = {name: bench.pairs(name, "test")[:500] for name in names}
    matrix = {}
    for name in names:
        X, y, _ = train[name].stack()
        detector = forest(bench, 0, BOTH).fit(X, y)
        matrix[name] = {other: round(auc_of(detector, test[other]), 3) for other in names}
    frame = pd.DataFrame(matrix).T.rename_axis("learnt from")
    print("\n### Learnt from one attack (rows), judged on another: AUC, forest, logits and profiles, 500 pairs\n")
    markdown(frame.map("{:.2f}".format), "one run")

    families = {"PGD": names[:4], "FGSM": names[4:6], "CW": names[6:]}
    few = 100
    outlier = PathOutlierDetector().fit(bench.clean)
    maha = Mahalanobis(bench.decoupler, *seen(bench))
    critical = {
        (split, name): pictures(pairs[name][:few], lambda given: critical_paths(bench.decoupler, given))
        for split, pairs in (("train", train), ("test", test)) for name in ("pgd 2", "fgsm 2", "cw")
    }  # fmt: skip
    rows: dict[str, dict[str, str]] = {}
    for left, members in families.items():
        kept = [name for name in ("pgd 2", "fgsm 2", "cw") if name not in members]
        judge = next(name for name in ("pgd 2", "fgsm 2", "cw") if name in members)
        learn = together([train[name][:few] for name in kept])
        found: dict[str, list[float]] = {}
        tables = [pictures(learn, maha.read), pictures(test[judge][:few], maha.read)]
        paths = [joined([critical["train", name] for name in kept]), critical["test", judge]]
        for seed in range(RUNS):
            part, half = four_fifths(len(learn), seed), four_fifths(len(test[judge][:few]), seed + 100)
            X, y, _ = learn[part].stack()
            Xt, yt, _ = test[judge][:few][half].stack()
            shuffled = np.random.default_rng(seed).permutation(y)
            inner = RandomForestClassifier(300, min_samples_leaf=2, random_state=seed).fit(rows_of(paths[0], part), y)
            scores = {
                "forest, bits": forest(bench, seed).fit(X, y).strangeness(Xt),
                "forest, logits and profiles": forest(bench, seed, BOTH).fit(X, y).strangeness(Xt),
                "outlier (no attack)": outlier.strangeness(Xt),
                "Mahalanobis": by_regression(tables[0], part, y, tables[1], half),
                "critical paths, forest": inner.predict_proba(rows_of(paths[1], half))[:, 1],
                "random labels": forest(bench, seed).fit(X, shuffled).strangeness(Xt),
            }
            for name, values in scores.items():
                found.setdefault(name, []).append(judged(yt, values)[0])
        rows[f"{left} ({judge})"] = {name: spread(values) for name, values in found.items()}
    print(f"\n### Leave one family of attacks out: AUC, {few} pairs of each, the same images for all\n")
    markdown(pd.DataFrame(rows).T.rename_axis("judged on"), "mean over five runs, standard deviation in brackets")


if __name__ == "__main__":
    run("results.detection_attacks", __doc__, [attacks, others])
