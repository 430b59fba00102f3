"""`LabelSensitiveTraining.fit`: the loop it stands for, bit for bit, killed or not, and what it refuses."""

import copy
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gated_workers import (
    BATCH,
    COUNT,
    EPOCHS,
    KINDS,
    Drawn,
    batches_of,
    loader_of,
    outcome,
    seed_all,
    states_of,
    trained,
)
from gating_loop import assert_states_equal, optimizer_of
from shared import alternating, paper_training, started_gate
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

import captum_classfilters
from captum_classfilters import Checkpoint, GateSchedule

WORKERS = Path(__file__).with_name("gated_workers.py")


@pytest.fixture
def batches(images):
    return batches_of(images)


# -- it is the loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_lr", [None, 0.03])
def test_it_is_the_loop_of_the_class_s_docstring(gate_lr, small_cnn, gate):
    model = small_cnn().train()
    twin, other = copy.deepcopy(model), copy.deepcopy(gate)
    seed_all(0)
    found = paper_training(model, gate).fit(loader_of("global", Drawn(), 0), 4, lr=(0.2, gate_lr) if gate_lr else 0.2)

    seed_all(0)
    training, loader, expected = paper_training(twin, other), loader_of("global", Drawn(), 0), []
    groups = [{"params": twin.parameters()}, other.parameter_group(lr=gate_lr or 0.2)]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    for epoch in range(4):
        losses = []
        for x, y in loader:
            optimizer.zero_grad()
            loss = training.loss(x, y, epoch)
            loss.backward()
            optimizer.step()
            training.after_step()
            losses.append(float(loss.detach()) / (COUNT // len(y)))
        expected.append({"epoch": epoch, "gated": epoch == 1, "loss": sum(losses), "density": other.density})
        for group, start in zip(optimizer.param_groups, (0.2, gate_lr or 0.2), strict=True):
            group["lr"] = start * (1 + math.cos(math.pi * (epoch + 1) / 4)) / 2
    # the cosine of torch is computed from its last value
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gate.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)
    assert [sorted(row) for row in found] == [["density", "epoch", "gated", "loss"]] * 4
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)


def test_with_the_same_optimiser_it_is_so_bit_for_bit(small_cnn, gate):
    model = small_cnn().train()
    twin, other = copy.deepcopy(model), copy.deepcopy(gate)
    seed_all(0)
    paper_training(model, gate).fit(loader_of("global", Drawn(), 0), 4)
    after = torch.rand(())
    seed_all(0)
    training, loader = paper_training(twin, other), loader_of("global", Drawn(), 0)
    groups = [{"params": twin.parameters()}, other.parameter_group(lr=0.1)]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for epoch in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            training.loss(x, y, epoch).backward()
            optimizer.step()
            training.after_step()
        cosine.step()
    assert_states_equal(model.state_dict(), twin.state_dict())
    assert_states_equal(gate.state_dict(), other.state_dict())
    assert torch.equal(after, torch.rand(()))
    assert gate.counts.sum() == COUNT  # of one gated epoch


def test_the_mean_loss_counts_samples_not_batches(model, gate, batches):
    losses = []
    training = paper_training(model, gate)
    training.loss, whole = lambda *args: losses.append(whole(*args)) or losses[-1], training.loss
    (row,) = training.fit(batches, 1)
    expected = sum(float(loss.detach()) * len(labels) for loss, (_, labels) in zip(losses, batches, strict=True)) / 16
    assert row["loss"] == pytest.approx(expected, rel=1e-6)


# -- killed and started again ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """What processes ended with that went on from where others had been killed."""
    folder = tmp_path_factory.mktemp("killed")
    root = str(Path(captum_classfilters.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(WORKERS), "killed", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {kind: torch.load(folder / f"{kind} found.pt", weights_only=True) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_killed_and_started_again_is_what_went_through(kind, resumed):
    expected, found = outcome(*trained(kind)), resumed[kind]
    assert found["history"] == expected["history"]
    assert len(found["history"]) == EPOCHS
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # and it did learn, with noise that differs from another seed's
    assert not torch.equal(trained(kind, seed=5)[1].weight, expected["gate"]["weight"])


def test_a_training_that_is_through_is_not_trained_again_and_gives_its_history(small_cnn, batches, tmp_path):
    path = tmp_path / "checkpoint.pt"
    model, gate, *_, history = trained("own", path)
    saved = path.read_bytes()
    again, other, *_, found = trained("own", path, data=Drawn(0, pytest.fail))
    assert found == history
    assert_states_equal(again.state_dict(), model.state_dict())
    assert_states_equal(other.state_dict(), gate.state_dict())
    assert path.read_bytes() == saved
    # with an optimiser of one's own it may go on
    assert [row["epoch"] for row in trained("own", path, epochs=5)[3]] == [0, 1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_run_can_be_lengthened_and_the_rest_follows_the_cosine_over_all_epochs(small_cnn, batches, tmp_path):
    def start():
        model = small_cnn().train()
        model.dropout.p = 0.0
        return model, started_gate()

    for epochs in (1, 3):
        model, gate = start()
        training = paper_training(model, gate, schedule=alternating(period=2))
        history = training.fit(batches, epochs, lr=(0.2, 0.1), checkpoint=tmp_path / "run.pt")
    assert [row["epoch"] for row in history] == [0, 1, 2]

    twin, other = start()
    by_hand = paper_training(twin, other, schedule=alternating(period=2))
    optimizer = torch.optim.SGD([{"params": twin.parameters()}, other.parameter_group(lr=0.1)], lr=0.2, momentum=0.9)
    # the first epoch began at the full rate, then come two and three thirds of the way down
    for epoch, share in enumerate([1, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(2 * math.pi / 3)) / 2]):
        for group, rate in zip(optimizer.param_groups, (0.2, 0.1), strict=True):
            group["lr"] = rate * share
        for x, y in batches:
            optimizer.zero_grad()
            by_hand.loss(x, y, epoch).backward()
            optimizer.step()
            by_hand.after_step()
    torch.testing.assert_close(states_of(model, gate), states_of(twin, other), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_within_an_epoch_is_gone_on_from_to_the_same_bits(kind, tmp_path):
    def stop():
        raise KeyboardInterrupt

    # the fourth batch of the third epoch is never whole; the checkpoint is of its second
    checkpoint = Checkpoint(tmp_path / "run.pt", every=2)
    with pytest.raises(KeyboardInterrupt):
        trained(kind, checkpoint, data=Drawn(2 * COUNT + 3 * BATCH + 2, stop))
    state = torch.load(checkpoint.path, weights_only=True)
    assert (state["epoch"], state["step"]) == (2, 2)
    found, expected = outcome(*trained(kind, checkpoint, seed=5)), outcome(*trained(kind))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


SCHEDULES = {
    "OneCycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
    "MultiStep": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 2]),
    "Sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)], [2]
    ),
    "Lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
}


# torch 2.4's SequentialLR itself calls what it deprecates
@pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step")
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimisers_and_schedulers_of_one_s_own_go_on_too(kind, name, small_cnn, batches, tmp_path):
    def run(epochs, checkpoint=None):
        model, gate = small_cnn().train(), started_gate()
        model.dropout.p = 0.0
        one, two = kind(model.parameters(), lr=0.01), torch.optim.SGD([gate.parameter_group(0.1)], lr=0.1)
        schedules = [SCHEDULES[name](one), lr_scheduler.StepLR(two, 1, 0.5)]
        training = paper_training(model, gate)
        training.fit(batches, epochs, optimizer=[one, two], scheduler=schedules, checkpoint=checkpoint)
        return states_of(model, gate, one, two)

    path = tmp_path / "checkpoint.pt"
    run(2, path)
    torch.testing.assert_close(run(4, path), run(4), rtol=0, atol=0)


# -- schedules, options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"period": 2}, {"warmup": 9}, {"scheme": "joint"}], ids=str)
def test_rates_fall_after_every_epoch_gated_or_plain(options, model, gate, batches):
    optimizer, rates = optimizer_of(model, gate), []
    schedules = [lr_scheduler.StepLR(optimizer, 1, 0.5)]
    training = paper_training(model, gate, schedule=GateSchedule(**options))
    training.after_step, whole = (
        lambda: rates.append([g["lr"] for g in optimizer.param_groups]) or whole(),
        (training.after_step),
    )
    training.fit(batches, 4, optimizer=optimizer, scheduler=schedules)
    assert rates == [[0.1 * 0.5**epoch] * 2 for epoch in range(4) for _ in batches]


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(model, gate, batches):
    start = states_of(model, gate)
    optimizer = torch.optim.SGD([*model.parameters(), gate.weight], lr=1.0)
    paper_training(model, gate, schedule=alternating(1, 0)).fit(batches[:1], 1, optimizer=optimizer, max_norm=1e-3)
    norm = torch.cat([p.grad.flatten() for p in [*model.parameters(), gate.weight]]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    moved = sum(float((p.detach() - start[0][name]).square().sum()) for name, p in model.named_parameters())
    assert 0 < moved <= 1.0001e-6


def test_the_bar_is_shown_only_where_it_was_asked_for(model, gate, batches, capsys):
    paper_training(model, gate).fit(batches, 2, show_progress=True)
    shown = capsys.readouterr().err
    assert "epoch 1/2: 100%" in shown
    assert "epoch 2/2: 100%" in shown
    assert "3/3" in shown
    paper_training(model, gate).fit(batches, 1)
    assert capsys.readouterr().err == ""


# -- the model, the batches --------------------------------------------------------------------------------------------


def test_a_model_in_eval_mode_is_trained_in_train_mode_and_given_back(small_cnn, gate, batches):
    model, modes = small_cnn(), []
    model.fc.register_forward_pre_hook(lambda *_: modes.append(model.dropout.training and model.bn1.training))
    mean = model.bn1.running_mean.clone()
    paper_training(model, gate).fit(batches, 2)
    # the first call looks for the head
    assert modes == [False] + [True] * 6
    assert not any(module.training for module in model.modules())
    assert not torch.equal(model.bn1.running_mean, mean)


@pytest.mark.parametrize("error", [KeyboardInterrupt, None])
def test_batch_norms_that_were_frozen_stay_so(error, model, gate, batches):
    model.bn1.eval()
    before, mean = [module.training for module in model.modules()], model.bn1.running_mean.clone()
    if error:
        with pytest.raises(error):
            paper_training(model, gate).fit(raises_after(batches, error), 1)
    else:
        paper_training(model, gate).fit(batches, 2)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model.bn1.running_mean, mean)


def raises_after(batches, error):
    yield from batches
    raise error


def test_batches_may_be_tuples_dicts_of_float64_or_of_unknown_number(small_cnn, batches):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(batches)

    forms = {
        "lists": [[inputs, labels] for inputs, labels in batches],
        "several inputs": [((inputs,), labels) for inputs, labels in batches],
        "dicts": [{"pixel_values": inputs, "labels": labels} for inputs, labels in batches],
        "float64": [(inputs.double(), labels.int()) for inputs, labels in batches],
        "stream": DataLoader(Stream(), batch_size=None),
    }

    def run(loader):
        model, gate = small_cnn().train(), started_gate()
        model.dropout.p = 0.0
        paper_training(model, gate).fit(loader, 2)
        return {**model.state_dict(), "gate": gate.weight}

    expected = run(batches)
    for form in forms.values():
        assert_states_equal(run(form), expected)


def test_under_an_autocast_around_it_all_it_learns_as_without(model, gate, batches):
    twin, other = copy.deepcopy(model), copy.deepcopy(gate)
    expected = paper_training(twin, other).fit(batches, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = paper_training(model, gate).fit(batches, 3)
    assert all(p.dtype == torch.float32 for p in [*model.parameters(), gate.weight])
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=0.05)
    torch.testing.assert_close(gate.weight, other.weight, rtol=0.1, atol=0.05)
    assert not torch.equal(gate.weight, other.weight)


def test_several_generators_are_where_a_training_without_a_checkpoint_leaves_them(model, gate, batches, tmp_path):
    def draws(**options):
        seed_all(0)
        paper_training(model, gate).fit(batches, 1, **options)
        return float(torch.rand(())), float(np.random.rand()), random.random()

    assert draws() == draws(checkpoint=tmp_path / "checkpoint.pt")


def test_a_finished_training_that_is_opened_again_gives_the_same_table(batches, small_cnn, tmp_path):
    def fitted():
        training = paper_training(small_cnn(), started_gate())
        return training, training.fit(batches, 2, checkpoint=tmp_path / "run.pt")

    (first, told), (again, told_again) = fitted(), fitted()
    assert told == told_again
    assert (again.gate.layer, first.gate.layer) == ("fc", "fc")
    assert torch.equal(again.gate.class_filters().scores, first.gate.class_filters().scores)
    assert torch.equal(again.gate.counts, first.gate.counts)


def test_a_batch_of_no_samples_is_passed_over(batches, small_cnn, gate):
    empty = (batches[0][0][:0], batches[0][1][:0])
    model, twin, other = small_cnn(), small_cnn(), copy.deepcopy(gate)
    model.dropout.p = twin.dropout.p = 0.0
    paper_training(model, gate).fit([empty, *batches], 2)
    paper_training(twin, other).fit(batches, 2)
    assert torch.equal(gate.weight, other.weight)
