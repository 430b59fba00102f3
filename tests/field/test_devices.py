"""Every public call gives on another device what it gives on the CPU.

The other devices are those that SECOND_DEVICE names, see `shared.py`. Among them is ``slim``, which is emulated and
has no float64. It is tested in a process of its own, because torch knows a new device until the process ends.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from shared import SECOND, device_mode, seeded
from torch import nn

from captum_classfilters import (
    ALDSplitter,
    ClassFilters,
    HeadMoments,
    HeadPass,
    InfluentialFeatures,
    LabelSensitiveGate,
    LabelSensitiveTraining,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    PathDecoupler,
    adversarial_paths,
    aggregate,
    compare,
    decompose,
    explain_confusion,
    filter_ambiguity,
    metrics,
    recover,
)
from captum_classfilters.core.class_sums import ClassSums
from captum_classfilters.core.wide import home, wide

SELECTORS = ["histogram", "mean_activation", "contribution", "ablation", "correlation", "margin", "weight"]


def network():
    convs = [nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 8, 3)]
    layers = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())]
    return seeded(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), 0).eval()


class On:
    """A network, its data and what others need, on one device."""

    def __init__(self, device):
        generator = torch.Generator().manual_seed(1)
        self.device = device
        self.x, self.y = torch.rand(12, 3, 8, 8, generator=generator), torch.arange(12) % 4
        self.loader = [(self.x[:8], self.y[:8]), (self.x[8:], self.y[8:])]
        self.model = network().to(device)
        self.table = InfluentialFeatures(network()).attribute(self.loader)
        self.masks = torch.rand(12, 8, 8, generator=generator) > 0.6

    def gate(self, trained=False):
        weight = torch.rand(4, 8, generator=torch.Generator().manual_seed(2))
        table = ClassFilters(weight, weight, torch.ones(4, dtype=torch.int64), "gate", "11", tuple("abcd"))
        return LabelSensitiveGate.from_filters(table).to(self.device)

    def decoupler(self):
        return PathDecoupler(network(), generator=torch.Generator().manual_seed(3)).eval().to(self.device)

    def outputs(self, model):
        with torch.no_grad():
            return model(self.x.to(self.device))


def tables(on):
    found = InfluentialFeatures(on.model).attribute(on.loader, selector=SELECTORS)
    return [found[name].scores for name in SELECTORS]


def confusion(on):
    found = explain_confusion(on.model, on.x, 0, 1)
    return [found.table, found.won_by, found.lost_by, found.difference]


def trained_gate(on):
    gate, model = on.gate(), network().to(on.device)
    history = LabelSensitiveTraining(model, gate).fit(on.loader, 3)
    return [gate.weight.detach(), torch.tensor([row["loss"] for row in history])]


def pairs(on):
    found = adversarial_paths(on.decoupler(), on.loader, lambda images, labels: (images + 0.2).clamp(0, 1))
    return [torch.from_numpy(np.asarray(found.stack()[0]))]


CALLS = {
    "attribute": tables,
    "attribute of tensors": lambda on: [InfluentialFeatures(on.model).attribute(on.x.to(on.device), target=1)],
    "explain": lambda on: [InfluentialFeatures(on.model).explain(on.x, 1, on.table, 3)],
    "explain_confusion": confusion,
    "Grad-CAM++": lambda on: [LayerGradCamPlusPlus(on.model, "8").attribute(on.x, on.y.to(on.device))],
    "Grad-CAM++, chosen": lambda on: [
        LayerGradCamPlusPlus(on.model, "8").attribute(on.x, 1, channels=[1, 2], channel_weights="head")
    ],
    "Smooth Grad-CAM++": lambda on: [
        LayerSmoothGradCamPlusPlus(on.model, "8").attribute(on.x, 1, generator=torch.Generator().manual_seed(0))
    ],
    "ALDSplitter": lambda on: [ALDSplitter(on.model).attribute(on.x, 1, stage=1, min_size=2)],
    "decompose": lambda on: [on.outputs(decompose(on.model, on.table, 3))],
    "decompose, dense": lambda on: [on.outputs(decompose(on.model, on.table, 3, backend="dense"))],
    "decompose, refit": lambda on: [
        on.outputs(decompose(on.model, on.table, 3, refit="least_squares",
                             moments=HeadMoments.collect(on.model, on.loader)))
    ],
    "moments": lambda on: [HeadMoments.collect(on.model, on.loader).second],
    "recover": lambda on: [on.outputs(recover(decompose(on.model, on.table, 3, backend="dense"), on.loader, 1))],
    "aggregate": lambda on: [
        aggregate(LayerGradCamPlusPlus(on.model, "8"), on.loader, attr_dim_summation=False).scores
    ],
    "compare": lambda on: [compare(on.model, on.loader, on.loader, ks=[2]).drop(columns=["time", "seconds", "passes"],
                                                                               errors="ignore")],
    "gate": trained_gate,
    "gate_similarity": lambda on: [metrics.gate_similarity(on.model, on.table, on.loader)],
    "filter_ambiguity": lambda on: [filter_ambiguity(on.model, on.loader, steps=5).gate.weight.detach()],
    "class_ablation": lambda on: [metrics.class_ablation(on.model, on.table, on.loader, k=2)],
    "channel_deletion": lambda on: [metrics.channel_deletion(on.model, on.table, on.loader, sizes=2)],
    "localisation": lambda on: [
        metrics.localisation(on.model, on.table, on.loader, k=2, silhouette=lambda t: t[:, 0] > 0.5)
    ],
    "decoupler": lambda on: [on.outputs(on.decoupler())],
    "paths": lambda on: [on.decoupler().paths(on.loader).bits()],
    "loss of paths": lambda on: [on.decoupler().loss(on.x, on.y).total.detach()],
    "skipping": lambda on: [on.outputs(on.decoupler().skipping(on.x, measured=False))],
    "adversarial_paths": pairs,
    "activation_thresholds": lambda on: [metrics.activation_thresholds(on.model, on.loader, ["8"], quantile=0.1)["8"]],
    "head pass": lambda on: [HeadPass(on.model, on.loader).head.weight, HeadPass(on.model, on.loader).head.bias],
}  # fmt: skip


def numbers(value):
    if isinstance(value, pd.DataFrame):
        return value.select_dtypes(["number"]).to_numpy(float)
    return value.detach().cpu().double().numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "name"), [(call, name) for name in SECOND for call in CALLS])
def test_it_gives_what_the_cpu_gives(call, name):
    expected = [numbers(value) for value in CALLS[call](On("cpu"))]
    with device_mode(name):
        found = [numbers(value) for value in CALLS[call](On(name))]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SECOND)
def test_sums_are_exact(name):
    """Also where the device itself has no float64: 2**24 + 1 is not a float32."""
    with device_mode(name):
        rows = torch.tensor([[2.0**24], [1.0], [2.0**-24]]).to(name)
        sums = ClassSums(1, 1, ["mass"], rows.device)
        for row in rows:
            sums.add(torch.zeros(1, dtype=torch.int64).to(name), {"mass": row[None]})
        assert sums["mass"].item() == 2.0**24 + 1 + 2.0**-24
        assert sums.counts.item() == 3
        assert wide(rows).dtype == torch.float64
        assert home(rows.device) == (torch.device("cpu") if name == "slim" else rows.device)


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices that are written in Python",
)
def test_on_a_device_without_float64():
    environment = {**os.environ, "SECOND_DEVICE": "slim", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "slim", str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
