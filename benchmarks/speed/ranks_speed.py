"""Two processes with a thread each, against one process with one thread, over the same loader."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed as dist

from benchmarks.lib.report import Table
from benchmarks.lib.workload import Settings, resnet20
from captum_classfilters import ClassFilters, InfluentialFeatures

TARGET = 1.8
BATCHES, ROUNDS = 24, 3


def run(settings: Settings) -> Table:
    table = Table("ranks: two processes against one, over the same data")
    with tempfile.TemporaryDirectory() as folder:
        seconds = {ranks: [_launch(ranks, Path(folder)) for _ in range(ROUNDS)] for ranks in (1, 2, 1, 2)}
        tables = [ClassFilters.load(Path(folder) / f"{ranks}.safetensors") for ranks in (1, 2)]
    found = statistics.median(seconds[1]) / statistics.median(seconds[2])
    shown = f"{found:.2f} ({statistics.median(seconds[1]):.1f} s to {statistics.median(seconds[2]):.1f} s)"
    table.add(f"ResNet-20, 28x28, {BATCHES} x 125: one process / two", shown, found, TARGET, at_least=True)
    same = torch.equal(tables[0].scores, tables[1].scores) and torch.equal(tables[0].mass, tables[1].mass)
    table.add("bit-identical tables", "yes" if same else "NO")
    table.notes = [
        "torchrun, gloo; one thread each; from the first batch to the merged table, without the start of the processes",
        f"median of {ROUNDS} launches; every second batch is a rank's",
    ]
    return table


def _launch(ranks: int, folder: Path) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*command, "-m", "benchmarks.speed.ranks_speed", str(folder / f"{ranks}.safetensors")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def _work(path: str) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    workload = resnet20("cpu", BATCHES)
    workload.model(workload.loader[0][0])
    dist.barrier()
    start = time.perf_counter()
    filters = InfluentialFeatures(workload.model).attribute(workload.loader[rank::ranks])
    seconds = time.perf_counter() - start
    if rank == 0:
        filters.save(path)
        print(seconds)
    dist.destroy_process_group()


if __name__ == "__main__":
    _work(sys.argv[1])
