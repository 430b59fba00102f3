"""How far the batch size moves a table: the sums are exact, the convolutions under them are not.

A vote moves where two features of an image are so near that the last bits of the forward pass put them in order.
"""

import torch

from benchmarks.lib.report import Table
from benchmarks.lib.workload import Settings
from captum_classfilters import InfluentialFeatures
from captum_classfilters.assets import load_demo_network, load_images, load_network

SIZES = (1, 7, 64, 250, 1000)
REFERENCE = 64
K = 5


def run(settings: Settings) -> Table:
    model, _ = load_network(settings.network) if settings.network else load_demo_network()
    model.to(settings.device)
    sample = load_images("train")
    found = {size: InfluentialFeatures(model).attribute(sample.batches(size)) for size in SIZES}
    reference = found[REFERENCE]
    again = InfluentialFeatures(model).attribute(sample.batches(REFERENCE))
    classes, cells = reference.num_classes, reference.scores.numel()

    table = Table(f"determinism: tables at other batch sizes, against batches of {REFERENCE}")
    for name, other in {f"{REFERENCE} again": again, **{str(s): f for s, f in found.items() if s != REFERENCE}}.items():
        moved = int((other.scores != reference.scores).sum())
        sets = int((other.mask(K) != reference.mask(K)).any(1).sum())
        mass = float(((other.mass - reference.mass).abs() / reference.mass.clamp(min=1)).max())
        shown = f"{moved} of {cells} vote cells, {sets} of {classes} top-{K} sets differ; mass by {mass:.1e} at most"
        same_size = {"value": moved + mass, "target": 0} if other is again else {}
        table.add(f"batches of {name}", shown, **same_size)
    votes = int(reference.scores.sum())
    table.notes = [
        f"{len(sample.labels)} training images, {votes} votes, {settings.network or 'the packaged ResNet-20'}, "
        f"threads: {torch.get_num_threads()}; "
        "mass: relative difference",
        "a whole number of votes moves in a cell or none; the same batch size gives the same table bit for bit",
    ]
    return table
