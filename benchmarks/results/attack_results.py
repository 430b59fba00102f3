"""Black-box attacks on plain and gated networks.

    python -m benchmarks.results.attack_results --images 40 > attacks.md

The paper's table 3: one pixel (adversarial-robustness-toolbox) and local search (ours), on images that all of the
networks classify right, with the same budget. Prints Markdown; about half an hour on one core for 40 images.
"""

import argparse
import time
from itertools import islice

import pandas as pd

from benchmarks.lib.networks import Networks, add_networks_argument
from benchmarks.lib.report import interval, markdown, stamp
from captum_classfilters import metrics
from captum_classfilters.assets import load_images
from captum_classfilters.attacks import LocalSearch, OnePixel

TRAININGS = {"std": (0, 1, 2), "lsg": (0, 1, 2), "fixed-gate": (0,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40, help="at most, of the test sample that ships")
    parser.add_argument("--iterations", type=int, default=10, help="of one pixel; ART's population is 399")
    parser.add_argument("--rounds", type=int, default=30, help="of local search")
    parser.add_argument("--candidates", type=int, default=78, help="pixels that local search tries first: a tenth")
    add_networks_argument(parser)
    options = parser.parse_args()
    print(stamp("results.attack_results", "cpu"))
    networks = Networks(options.networks)
    models = {f"{method} {seed}": networks.plain(seed, method) for method, seeds in TRAININGS.items() for seed in seeds}
    attacks = {
        "one pixel": lambda model: OnePixel(model, max_iter=options.iterations),
        "local search": lambda model: LocalSearch(model, rounds=options.rounds, candidates=options.candidates),
    }
    started = time.time()
    # batches of few: of the images that all classify right, so many as are asked for
    loader = islice(load_images("test").batches(20), 2 + options.images // 10)
    found = metrics.attack_success(models, loader, attacks, max_images=options.images)
    found["method"] = found.model.str.rsplit(n=1).str[0]
    print("\n## Black-box attacks: share of images whose answer changes\n")
    each = found.apply(lambda row: interval(row.success, row.low, row.high), axis=1)
    markdown(pd.DataFrame({"success": each}).set_index([found.model, found.attack]).success.unstack("attack"), "")
    whole = found.groupby(["method", "attack"], sort=False)[["tried", "succeeded"]].sum()
    low, high = metrics.wilson(whole.succeeded, whole.tried)
    shown = [interval(s / t, a, b) for s, t, a, b in zip(whole.succeeded, whole.tried, low, high, strict=True)]
    print()
    markdown(
        pd.Series(shown, whole.index).unstack("attack"),
        "all seeds together [Wilson; the same images for all, so the intervals are too narrow]",
    )
    print(f"\n<!-- {time.time() - started:.0f} s; images tried: {found.tried.min()} -->")


if __name__ == "__main__":
    main()
