"""What each rank of `test_ranks.py` runs: ``rank_workers.py SCENARIO FOLDER``, results in the folder."""

import os
import sys
import time
import warnings
from datetime import timedelta
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from shared import SmallCNN, seeded
from torch import distributed as dist

from captum_classfilters import ClassFilters, HeadMoments, InfluentialFeatures
from captum_classfilters.core.errors import EmptyLoaderError, MergeError

SELECTORS = ("histogram", "mean_activation", "margin", "weight", "random")
K1S = [1, 3, 0.5]
SIZES = (5, 4, 1, 6, 3, 2)


def model():
    return seeded(SmallCNN(), 0).eval()


def batches():
    """All of the data; a rank's shard is every second batch."""
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 4) for n in SIZES]


def shard(rank):
    return batches()[rank::2]


def main(folder):
    """Everything that two ranks do together, one after the other."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    method, mine = InfluentialFeatures(model()), shard(rank)

    def save(name, table):
        table.save(folder / f"{name} {rank}.safetensors")

    for name, table in method.attribute(mine, selector=SELECTORS).items():
        save(name, table)
    for k1, table in method.attribute(mine, k1=K1S, distributed=True).items():
        save(f"k1={k1}", table)
    save("moments", HeadMoments.collect(model(), mine))
    save("local", method.attribute(mine, distributed=False))
    save("local moments", HeadMoments.collect(model(), mine, distributed=False))

    everything = [] if rank else batches()
    save("empty shard", method.attribute(everything))
    save("empty shard, static", method.attribute(everything, selector="weight", importance="signed"))
    save("empty shard, moments", HeadMoments.collect(model(), everything))

    # a group of one rank is that rank alone
    groups = [dist.new_group([member]) for member in range(2)]
    save("own group", method.attribute(mine, distributed=groups[rank]))

    errors = {
        "both empty": lambda: method.attribute([]),
        "both empty, moments": lambda: HeadMoments.collect(model(), []),
        "k1 differs": lambda: method.attribute(mine, k1=1 + rank),
        "number of tables differs": lambda: method.attribute(mine, selector=SELECTORS[: 2 + rank]),
        "names differ": lambda: method.attribute(mine, class_names=tuple("abcd") if rank else tuple("abce")),
        "weights differ": lambda: differing(rank).attribute(mine, selector="weight"),
        "heads differ": lambda: HeadMoments.collect(seeded(SmallCNN(channels=6 + rank), 0).eval(), mine),
    }
    for name, call in errors.items():
        try:
            call()
        except (EmptyLoaderError, MergeError) as error:
            found = getattr(error, "partial_result", None)
            (folder / f"{name} {rank}.txt").write_text(f"{type(error).__name__}\n{error}")
            if isinstance(found, dict):
                found = next(iter(found.values()))
            if found is not None:
                save(name, found)

    # stopped after so many batches on each rank, kept by rank 0, resumed, merged
    stopped_at = 1 + rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = method.attribute(islice(mine, stopped_at))
        if rank == 0:
            first.save(folder / "first.safetensors")
        dist.barrier()
        rest = method.attribute(islice(mine, stopped_at, None))
    save("resumed", ClassFilters.merge(ClassFilters.load(folder / "first.safetensors"), rest))
    dist.barrier()
    os._exit(0)  # all is saved; gloo's threads now and then abort a process that takes its time to end


def differing(rank):
    network = model()
    with torch.no_grad():
        network.fc.weight.add_(rank)
    return InfluentialFeatures(network)


def dying(folder):
    """Rank 1 ends in mid-pass; rank 0 writes down what it then gets."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    rank, started = dist.get_rank(), time.monotonic()
    try:
        InfluentialFeatures(model()).attribute(dies(shard(1)) if rank else shard(0))
    except MergeError as error:
        error.partial_result.save(folder / "partial.safetensors")
        (folder / "error.txt").write_text(f"{time.monotonic() - started}\n{error}")
    os._exit(0)  # no farewell to a group that is broken


def dies(loader):
    yield loader[0]
    os._exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"main": main, "dying": dying}[sys.argv[1]](Path(sys.argv[2]))
