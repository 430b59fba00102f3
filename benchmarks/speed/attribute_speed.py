"""What `InfluentialFeatures(model).attribute(loader)` costs above a bare inference pass over the same loader."""

import statistics
import warnings
from collections.abc import Sequence

from benchmarks.lib.report import Table
from benchmarks.lib.timing import interleaved, ratio
from benchmarks.lib.workload import Settings, Workload, inference, resnet18, resnet20
from captum_classfilters import InfluentialFeatures
from captum_classfilters.core.errors import UnseenClassWarning
from captum_classfilters.core.head_pass import Batch, HeadPass
from captum_classfilters.influential.running_sums import Options, Tables
from captum_classfilters.influential.selectors import SELECTORS

TARGET = 1.05
ROUNDS = 9


def run(settings: Settings) -> Table:
    table = Table("attribute: one pass, against bare inference over the same loader")
    for workload in (resnet20(settings.device), resnet18(settings.device)):
        _pass(table, workload, settings.device)
        _sums(table, workload, settings.device)
    table.notes = [
        f"ratio of medians over {ROUNDS} rounds in turn (least to most of the paired ratios); memory format contiguous",
        "bare: forward, argmax, count of right answers, under inference_mode; batches lie in memory",
        "running sums: their own time over the same features, as a share of the bare pass; steadier than a difference",
    ]
    return table


def _pass(table: Table, workload: Workload, device: str) -> None:
    name, model, loader = workload
    runs = {
        "bare": lambda: inference(model, loader, device),
        "histogram": lambda: attribute(workload, "histogram"),
        "all": lambda: attribute(workload, SELECTORS),
    }
    seconds = interleaved(runs, ROUNDS, device=device)
    table.add(f"{name}: bare pass, seconds", f"{statistics.median(seconds['bare']):.3f}")
    found = ratio(seconds, "histogram", "bare")
    table.add(f"{name}: histogram / bare", str(found), found.value, TARGET)
    table.add(f"{name}: all {len(SELECTORS)} selectors / bare", str(ratio(seconds, "all", "bare")))


def _sums(table: Table, workload: Workload, device: str) -> None:
    """The running sums alone, over features kept for the purpose."""
    name, model, loader = workload
    with HeadPass(model, loader).batches() as stream:
        kept = list(stream)
    runs = {
        "bare": lambda: inference(model, loader, device),
        "histogram": lambda: add_all(kept, ("histogram",)),
        "all": lambda: add_all(kept, SELECTORS),
        "without ablation": lambda: add_all(kept, [s for s in SELECTORS if s != "ablation"]),
    }
    seconds = interleaved(runs, 3, device=device)
    for what in list(runs)[1:]:
        table.add(f"{name}: running sums of {what}", f"{ratio(seconds, what, 'bare').value:.2%} of the bare pass")


def attribute(workload: Workload, selector: str | Sequence[str]) -> None:
    with warnings.catch_warnings():
        # a thousand classes and few images
        warnings.simplefilter("ignore", UnseenClassWarning)
        InfluentialFeatures(workload.model).attribute(workload.loader, selector=selector)


def add_all(kept: Sequence[Batch], names: Sequence[str]) -> None:
    tables = Tables(kept[0].head, Options.checked(names, [None], "abs"))
    for batch in kept:
        tables.add(batch.features, batch.logits, batch.labels)
