"""Peak memory at ten times the samples: the same, since no sample is kept.

Each pass runs in its own process: ``python -m benchmarks.speed.memory SAMPLES DEVICE THREADS`` prints its peak in MiB.
"""

import resource
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.lib.report import Table
from benchmarks.lib.workload import Settings
from captum_classfilters import InfluentialFeatures

TARGET = 1.02
# small batches: the C allocator settles within the few samples, and its noise is small against what is asked
FEW, MANY, BATCH = 4_000, 40_000, 50
FEATURES = 2048


class Made(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches made when asked for and then forgotten."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.samples // BATCH):
            labels = torch.randint(10, (BATCH,), generator=generator)
            yield torch.rand(BATCH, 1, 28, 28, generator=generator), labels


def run(settings: Settings) -> Table:
    table = Table(f"memory: peak of attribute at {MANY:,} samples against {FEW:,}")
    few, many = (_in_own_process(samples, settings.device) for samples in (FEW, MANY))
    table.add(f"peak at {FEW:,} samples, MiB", f"{few:.1f}")
    table.add(f"peak at {MANY:,} samples, MiB", f"{many:.1f}")
    table.add("ratio", f"{many / few:.4f}", many / few, TARGET)
    kind = "allocated on the GPU" if settings.device == "cuda" else "resident set of the whole process"
    kept = (MANY - FEW) * FEATURES * 4 / 2**20
    table.notes = [
        f"{FEATURES} features before the head, batches of {BATCH}, histogram; {kind}, one process for each",
        f"had the features been kept, they would add {kept:.0f} MiB",
    ]
    return table


def peak(samples: int, device: str) -> float:
    torch.manual_seed(0)
    # as wide as ResNet-50's head, so that kept features would show; small maps, so that the C allocator does not
    layers = (nn.Flatten(), nn.Linear(28 * 28, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 10))
    model = nn.Sequential(*layers).to(device)
    InfluentialFeatures(model).attribute(DataLoader(Made(samples), batch_size=None))
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _in_own_process(samples: int, device: str) -> float:
    command = [sys.executable, "-m", "benchmarks.speed.memory", str(samples), device, str(torch.get_num_threads())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(peak(int(sys.argv[1]), sys.argv[2]))
