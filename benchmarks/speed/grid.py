"""The grid of k1 and k2 of figure 1 of Badola et al. 2022 in two passes: one for the tables, one for the accuracies."""

import statistics

from benchmarks.lib.report import Table
from benchmarks.lib.timing import interleaved, ratio
from benchmarks.lib.workload import Settings, Workload, inference, resnet20
from captum_classfilters import Control, InfluentialFeatures, metrics

TARGET = 2.2
ROUNDS = 7
KS = (1, 2, 3, 5, 8, 13, 21, 34)


def run(settings: Settings) -> Table:
    workload = resnet20(settings.device, batches=8)
    table = Table(f"grid: accuracy at {len(KS)} x {len(KS)} (k1, k2), in passes over the data")
    runs = {
        "bare": lambda: inference(workload.model, workload.loader, settings.device),
        "tables": lambda: tables(workload),
        "grid": lambda: grid(workload),
    }
    seconds = interleaved(runs, ROUNDS, device=settings.device)
    table.add(f"{workload.name}: bare pass, seconds", f"{statistics.median(seconds['bare']):.3f}")
    table.add(f"attribute(k1={list(KS)}) / bare", str(ratio(seconds, "tables", "bare")))
    found = ratio(seconds, "grid", "bare")
    table.add("attribute and accuracy_curve / bare", str(found), found.value, TARGET)
    classes = workload.model.fc.out_features
    scans, evaluations = len(KS) * classes, len(KS) ** 2
    table.add("the published way, passes (counted)", f"{scans} + {evaluations} = {scans + evaluations}")
    table.notes = [
        f"ratio of medians over {ROUNDS} rounds in turn; accuracy_curve with its 5 random controls included",
        f"published: a scan per class for each k1 ({len(KS)} x {classes}), an evaluation for each (k1, k2); not run",
    ]
    return table


def tables(workload: Workload) -> dict[int, object]:
    return InfluentialFeatures(workload.model).attribute(workload.loader, k1=list(KS))


def grid(workload: Workload) -> None:
    # the same images for tables and accuracies: this measures time, and reads no accuracy
    metrics.accuracy_curve(workload.model, tables(workload), workload.loader, KS, control=Control(5, 0))
