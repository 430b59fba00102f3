"""Which method finds the filters that matter, and at what cost?

    python -m benchmarks.results.compare_results > tables.md

`compare` on networks that are plain, trained with a gate, decoupled, and (``--kanji FILE``) of 1,000 classes.
``--networks`` has those that do not ship.
Filters from the first 5,000 training images (kanji: ten of each class), judged by all test images. Prints Markdown.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import nn

from benchmarks.lib.networks import Networks, add_networks_argument
from benchmarks.lib.recipes import Data, Loader, Split, calibration, first, load, load_kanji
from benchmarks.lib.report import interval, markdown, stamp
from captum_classfilters import Control, HeadPass, LabelSensitiveGate, PathDecoupler, compare

KS = [1, 3, 5, 10]
IMAGES, STEPS = 5_000, 5
MANY = 10_000  # training images of the task with 1,000 classes: ten of each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kanji", type=Path, help="data.safetensors that recipes/kanji.py drew")
    parser.add_argument("--only", nargs="*", help="only the networks whose names begin so")
    add_networks_argument(parser)
    options = parser.parse_args()
    networks = Networks(options.networks)
    print(stamp("results.compare_results", "cpu"), flush=True)
    fashion = load("fashion_mnist")
    some = first(fashion.train, IMAGES)
    cases: dict[str, Any] = {}
    for seed in range(3):
        cases[f"plain ResNet-20, s{seed}"] = lambda seed=seed: (networks.plain(seed), some, fashion, None)
        cases[f"trained with a gate (LSG), s{seed}"] = lambda seed=seed: (
            networks.plain(seed, "lsg-noise"),
            some,
            fashion,
            networks.gate(seed, "lsg-noise"),
        )
    cases["decoupled ResNet-20, s0"] = lambda: (networks.decoupled(), some, fashion, None)
    if options.kanji:
        drawn = load_kanji(options.kanji)
        # degraded as the test images are
        cases["1,000 kanji, ResNet-14"] = lambda: (networks.kanji(), calibration(drawn, MANY, 0), drawn, None)
    for name, make in cases.items():
        if not options.only or any(name.startswith(start) for start in options.only):
            started = time.time()
            _table(name, *make())
            print(f"\n<!-- {name}: {time.time() - started:.0f} s -->", flush=True)


def _table(name: str, model: nn.Module, train: Split, data: Data, gate: LabelSensitiveGate | None) -> None:
    inner: Any = model.model if isinstance(model, PathDecoupler) else model
    attributions = {
        "Captum: gradient x activation": LayerGradientXActivation(model, inner.layer3),
        f"Captum: integrated gradients, {STEPS} steps": (
            LayerIntegratedGradients(model, inner.layer3),
            {"n_steps": STEPS},
        ),
    }
    frame = compare(
        HeadPass(model, Loader(train), class_names=data.class_names),
        test_loader=Loader(data.test),
        ks=KS,
        gate=gate,
        attributions=attributions,  # type: ignore[arg-type]
        control=Control(10),
    )
    frame.to_csv(sys.stderr)
    markdown(_shown(frame, 5), f"{name}: k = 5 of {inner.fc.in_features}; all channels {frame.dense.iloc[0]:.3f}")
    keep = frame.assign(value=[interval(r.keep, r.keep_low, r.keep_high) for r in frame.itertuples()])
    pivot = keep.pivot(index="method", columns="k", values="value").loc[list(frame.method.unique())]
    markdown(pivot, f"{name}: accuracy with k channels for each class")


def _shown(frame: pd.DataFrame, k: int) -> pd.DataFrame:
    rows = {}
    for row in frame[frame.k == k].itertuples():
        rows[row.method] = {
            "kept: accuracy": interval(row.keep, row.keep_low, row.keep_high),
            "own dropped (lower)": interval(row.drop_own, row.drop_own_low, row.drop_own_high),
            "another class's dropped": interval(row.drop_other, row.drop_other_low, row.drop_other_high),
            "classes overlap": f"{row.class_overlap:.3f}",
            "agrees with the others": f"{row.agreement:.2f}",
            "stability": "" if pd.isna(row.stability) else f"{row.stability:.2f}",
            "sparsity": "" if row.control else f"{row.sparsity:.2f}",
            "passes": "" if row.control else f"{row.passes:.2f}",
        }
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    main()
