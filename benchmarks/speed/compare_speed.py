"""`aggregate` beside a bare loop over a Captum attribution, and `compare` on the data of the demo."""

import time

import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients

from benchmarks.lib.report import Table
from benchmarks.lib.timing import interleaved, ratio
from benchmarks.lib.workload import Settings
from captum_classfilters import aggregate, compare
from captum_classfilters.assets import load_demo_network, load_images

STEPS, LIMIT = 10, 120.0


def run(settings: Settings) -> Table:
    table = Table("aggregate and compare")
    model, _ = load_demo_network()
    model = model.to(settings.device)
    train, test = load_images("train"), load_images("test")
    batches = [(x.to(settings.device), y.to(settings.device)) for x, y in train.batches()]
    for name, kind, options in (
        ("LayerGradientXActivation", LayerGradientXActivation, {}),
        ("LayerIntegratedGradients, 10 steps", LayerIntegratedGradients, {"n_steps": STEPS}),
    ):
        attribution = kind(model, model.layer3)

        def bare(attribution=attribution, options=options) -> torch.Tensor:
            total = torch.zeros(10, 64, device=settings.device)
            for x, y in batches:
                found = attribution.attribute(x, target=y, **options).detach().sum((2, 3))
                total.index_add_(0, y, found)
            return total

        seconds = interleaved(
            {"aggregate": lambda a=attribution, o=options: aggregate(a, batches, **o), "bare": bare},
            rounds=7 if kind is LayerGradientXActivation else 3,
            device=settings.device,
        )
        found = ratio(seconds, "aggregate", "bare")
        table.add(f"{name}: aggregate / bare loop of Captum's", str(found), found.value, 1.1)
    started = time.perf_counter()
    attributions = {
        "gradient x activation": LayerGradientXActivation(model, model.layer3),
        "integrated gradients": (LayerIntegratedGradients(model, model.layer3), {"n_steps": STEPS}),
    }
    frame = compare(model, batches, list(test.batches()), [1, 3, 5, 10], attributions=attributions)
    seconds_taken = time.perf_counter() - started
    table.add(
        f"compare, {frame.method[~frame.control].nunique()} methods, 1,000 + 1,000 images, seconds",
        f"{seconds_taken:.0f}",
        seconds_taken,
        LIMIT,
    )
    for row in frame[(frame.k == 1) & ~frame.control].itertuples():
        table.add(f"{row.method}: time / inference pass", f"{row.passes:.2f}")
    return table
