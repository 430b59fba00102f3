"""Gates, and frames as the metrics of gates return them, for the tests of their pictures."""

import numpy as np
import pandas as pd
import torch

from captum_classfilters.gating import LabelSensitiveGate

NAMES = ("cat", "dog", "cow")
# owners by column: dog, cat, none, cow (used by others too), cat and dog level, cow
GATE = [[0.2, 1, 0, 0.5, 1, 0], [1, 0, 0, 0.6, 1, 0], [0, 0, 0, 1, 0.3, 1]]
ORDER = [1, 0, 5, 3, 4, 2]


def of(weight, names=NAMES, counts=None):
    """A gate's table."""
    module = LabelSensitiveGate(*np.shape(weight))
    with torch.no_grad():
        module.weight.copy_(torch.tensor(weight))
        if counts is not None:
            module.counts.copy_(torch.tensor(counts))
    return module.class_filters(names)


def drawn(ax):
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def texts(labels):
    return [label.get_text() for label in labels]


def hatched(ax):
    return sorted(int(patch.get_y() + 0.5) for patch in ax.patches if patch.get_hatch())


def bar(ax):
    return ax.get_figure().axes[-1].get_ylabel()


def title(ax):
    """A title may be broken into lines."""
    return ax.get_title().replace("\n", " ")


def confusions(names=NAMES, seed=0):
    """A frame as metrics.masked_confusion returns it."""
    generator, size = np.random.default_rng(seed), len(names)
    parts = []
    for masked, control, channels in (("none", 0, 0), (names[1], 0, 4), (names[1], 1, 4), ("cat + cow", 0, 7)):
        shares = generator.dirichlet(np.ones(size), size)
        part = {"class_name": np.repeat(names, size), "predicted": np.tile(names, size), "share": shares.ravel()}
        parts.append(pd.DataFrame(part).assign(masked=masked, control=bool(control), channels=channels))
    return pd.concat(parts, ignore_index=True)


def similarities(names=NAMES, seed=0):
    """A frame as metrics.gate_similarity returns it; of the last class there is no FN."""
    size = len(names)
    part = {"class_name": np.tile(np.repeat(names, size), 2), "gate_row": np.tile(names, 2 * size)}
    values = np.random.default_rng(seed).random(2 * size**2) * 30
    frame = pd.DataFrame(part).assign(outcome=np.repeat(["TP", "FN"], size**2), similarity=values, samples=0)
    frame["control"] = False
    frame["samples"] = np.where(frame["outcome"] == "TP", 40, 3)
    frame.loc[(frame["outcome"] == "FN") & (frame["class_name"] == names[-1]), ["similarity", "samples"]] = [np.nan, 0]
    return frame


def clusters(names=NAMES, channels=6, seed=0):
    """A frame as metrics.feature_clusters returns it: clusters in any order."""
    generator = np.random.default_rng(seed)
    order = ["all", *generator.permutation(np.array(names))]
    values = generator.random((len(order), channels)) * 4
    frame = pd.DataFrame(values, columns=[f"channel {i}" for i in range(channels)]).assign(class_name=order, ami=0.7)
    judged = frame.assign(cosine=[0.91, *[0.5] * len(names)], control=False)
    return pd.concat(
        [judged, frame.assign(cosine=[0.42, *[0.3] * len(names)], control=True)], ignore_index=True
    )  # fmt: skip


def shares(*names, controls=None, thresholds=(0.0, 0.25, 0.5)):
    """A frame as metrics.correlated_share returns it; every number in it is another."""
    rows = []
    for i, name in enumerate(names):
        for t in thresholds:
            share, chance = 0.6 - t - 0.01 * i, 0.5 - t / 2 - 0.1 * (controls or [0] * len(names))[i]
            rows.append((name, t, share, share - 0.02, share + 0.03, False))
            rows.append((name, t, chance, chance - 0.01, chance + 0.015, True))
    return pd.DataFrame(rows, columns=["correlation", "threshold", "share", "low", "high", "control"])


def matrix(size, seed=0):
    """A frame as metrics.filter_correlation returns it."""
    frame = pd.DataFrame(np.corrcoef(np.random.default_rng(seed).normal(size=(size, 9))))
    frame.attrs.update(kind="weights", layer="conv2", dimension=9)
    return frame
