"""Gating against a bare elementwise multiplication, and a gated step of training against a plain one."""

import torch
from torch.nn import functional as F

from benchmarks.lib.report import Table
from benchmarks.lib.timing import interleaved, ratio
from benchmarks.lib.workload import Settings
from captum_classfilters import GateSchedule, LabelSensitiveGate, LabelSensitiveTraining
from captum_classfilters.assets.networks import SmallResNet

TARGET = 1.1
# A gated step against a plain one; the pass for the start against one epoch of inference
STEP_TARGET, START_TARGET = 1.02, 1.0
CLASSES = 10
SHAPES = {
    "256 x 64": (256, 64),
    "256 x 2048": (256, 2048),
    "4096 x 2048": (4096, 2048),
    "128 x 64 x 7 x 7": (128, 64, 7, 7),
}
ROUNDS, REPEATS, STEPS, BATCHES = 15, 40, 7, 4


def run(settings: Settings) -> Table:
    table = Table("gate: what it costs")
    for name, shape in SHAPES.items():
        _gating(table, name, shape, settings.device)
    _steps(table, settings.device)
    _start(table, settings.device)
    table.notes = [
        "bare multiplication: by rows of the gate that lie ready, one for each sample; the gate picks them, checks the "
        "labels and multiplies; no gradients",
        "a step: ResNet-20, 64 images of 28 x 28: forward, backward, SGD, projection; joint: both losses in one pass",
        "start: the pass before the first gated epoch, 4 such batches; inference: the network alone on the same ones",
    ]
    return table


def _gating(table: Table, name: str, shape: tuple[int, ...], device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(shape, generator=generator).to(device)
    labels = torch.randint(CLASSES, shape[:1], generator=generator).to(device)
    gate = LabelSensitiveGate(CLASSES, shape[1], generator=generator).to(device).eval()
    rows = gate.weight.detach()[labels].reshape(*shape[:2], *(1,) * (len(shape) - 2))
    weight = gate.weight.detach()

    def repeated(call):
        def timed():
            with torch.no_grad():
                for _ in range(REPEATS):
                    call()

        return timed

    seconds = interleaved(
        {
            "gate": repeated(lambda: gate(features, labels)),
            "multiply": repeated(lambda: features * rows),
            "pick and multiply": repeated(lambda: features * weight[labels].reshape(rows.shape)),
        },
        ROUNDS,
        device=device,
    )
    found = ratio(seconds, "gate", "multiply")
    table.add(f"{name}: gate / bare multiplication", str(found), found.value, TARGET)
    table.add(f"{name}: gate / features * G[labels]", str(ratio(seconds, "gate", "pick and multiply")))


def _steps(table: Table, device: str) -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(64, 1, 28, 28, device=device), torch.randint(CLASSES, (64,), device=device)
    runs = {}
    for scheme, epoch in (("alternating", 1), ("joint", 0)):
        model = SmallResNet(20).to(device)
        gate = LabelSensitiveGate(CLASSES, 64).to(device)
        training = LabelSensitiveTraining(model, gate, schedule=GateSchedule(scheme=scheme))
        training.before_epoch(epoch, [(images, labels)])
        optimizer = torch.optim.SGD([{"params": model.parameters()}, gate.parameter_group(0.1)], lr=0.01, momentum=0.9)
        name = "gated step" if scheme == "alternating" else "joint step"
        runs[name] = _step(optimizer, lambda t=training, e=epoch: t.loss(images, labels, e), training.after_step)
    plain = SmallResNet(20).to(device)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    runs["plain step"] = _step(optimizer, lambda: F.cross_entropy(plain(images), labels), lambda: None)
    seconds = interleaved(runs, STEPS, device=device)
    for name in ("gated step", "joint step"):
        cost = ratio(seconds, name, "plain step")
        table.add(f"{name} / plain step without a gate", str(cost), cost.value, STEP_TARGET)


def _start(table: Table, device: str) -> None:
    torch.manual_seed(0)
    model = SmallResNet(20).to(device).eval()
    labels = torch.arange(64, device=device) % CLASSES
    batches = [(torch.rand(64, 1, 28, 28, device=device), labels) for _ in range(BATCHES)]

    def start():
        gate = LabelSensitiveGate(CLASSES, 64).to(device)
        LabelSensitiveTraining(model, gate, schedule=GateSchedule(phase=0)).before_epoch(0, batches)

    @torch.inference_mode()
    def inference():
        for images, _ in batches:
            model(images)

    seconds = interleaved({"start": start, "inference": inference}, STEPS, device=device)
    cost = ratio(seconds, "start", "inference")
    table.add("start of the gate / one epoch of inference", str(cost), cost.value, START_TARGET)


def _step(optimizer, loss, after):
    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        after()

    return step
