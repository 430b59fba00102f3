"""`LabelSensitiveTraining.fit`: what it refuses, and what a failure leaves as it was."""

import math

import pytest
import torch
from gated_workers import batches_of, states_of
from gating_loop import optimizer_of
from shared import alternating, paper_training
from torch.optim import lr_scheduler

from captum_classfilters import GatePenalty, LabelSensitiveGate
from captum_classfilters.core.errors import EmptyLoaderError, FileFormatError, NonFiniteError, OptionError


@pytest.fixture
def batches(images):
    return batches_of(images)


def assert_as_before(parts, before):
    for now, was in zip(states_of(*parts), before, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


def spoilt(batches, at):
    """The batches, with a NaN in the one at ``at`` of all that are read."""
    left = [at]

    class Loader:
        def __iter__(self):
            for inputs, labels in batches:
                left[0] -= 1
                yield inputs * math.nan if left[0] == -1 else inputs, labels

    return Loader()


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "epoch", "step"), [(0, 0, 0), (2, 0, 2), (4, 1, 1), (6, 2, 0)])
def test_nan_names_epoch_and_step_and_leaves_what_was_there(at, epoch, step, small_cnn, gate, batches, tmp_path):
    model, path = small_cnn(), tmp_path / "checkpoint.pt"
    seen = []
    training = paper_training(model, gate)
    training.loss, whole = lambda *args: seen.append(states_of(model, gate)) or whole(*args), training.loss
    with pytest.raises(NonFiniteError, match=rf"the loss is nan in epoch {epoch}, step {step}; no step was taken"):
        training.fit(spoilt(batches, at), 4, checkpoint=path)
    assert len(seen) == at + 1
    assert_as_before([model, gate], seen[-1])
    assert not any(module.training for module in model.modules())
    if epoch:
        assert len(torch.load(path, weights_only=True)["ranks"][0]["history"]) == epoch
    else:
        assert not path.exists()
    # the same training goes on from the checkpoint, and counts anew
    with pytest.raises(NonFiniteError, match=rf"in epoch {epoch}, step 1;"):
        training.fit(spoilt(batches, 1), 4, checkpoint=path)


def overflow(parameter, at):
    """Let the gradient be infinite at the ``at``-th step."""
    left = [at]

    def hook(grad):
        left[0] -= 1
        return grad * math.inf if left[0] == -1 else None

    return parameter.register_hook(hook)


def test_a_step_of_a_gated_epoch_that_ends_in_nan_is_undone(model, gate, batches):
    seen = []
    training = paper_training(model, gate, schedule=alternating(period=1, phase=0))
    training.loss, whole = lambda *args: seen.append(states_of(model, gate)) or whole(*args), training.loss
    overflow(model.conv2.weight, 4)
    with pytest.raises(NonFiniteError, match="became NaN or infinite in epoch 1, step 1; both are as before that"):
        training.fit(batches, 3)
    assert_as_before([model, gate], seen[-1])
    # a second fit that fails in its first step goes back to where it began, not to where the first one did
    with torch.no_grad():
        model.conv1.weight.add_(1)
    before = states_of(model, gate)
    overflow(model.conv2.weight, 0)
    with pytest.raises(NonFiniteError, match="in epoch 0, step 0; both"):
        training.fit(batches, 3)
    assert_as_before([model, gate], before)


def test_a_fit_that_was_stopped_between_loss_and_step_leaves_no_trace_in_the_next(model, gate, batches):
    training = paper_training(model, gate, schedule=alternating(period=1, phase=0))
    handle = model.conv2.weight.register_hook(lambda grad: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        training.fit(batches, 1)
    handle.remove()
    with torch.no_grad():
        model.conv1.weight.add_(1)
    before = states_of(model, gate)
    overflow(model.conv2.weight, 0)
    with pytest.raises(NonFiniteError, match="in epoch 0, step 0; both"):
        training.fit(batches, 1)
    assert_as_before([model, gate], before)


def test_an_epoch_that_ends_in_nan_does_not_reach_the_checkpoint(model, gate, batches, tmp_path):
    path = tmp_path / "checkpoint.pt"
    training = paper_training(model, gate, schedule=alternating(warmup=9))
    overflow(model.conv2.weight, 5)
    with pytest.raises(NonFiniteError, match="the network became NaN or infinite in epoch 1; a checkpoint is of the "):
        training.fit(batches, 3, checkpoint=path)
    state = torch.load(path, weights_only=True)
    assert len(state["ranks"][0]["history"]) == 1
    assert all(bool(torch.isfinite(value).all()) for value in state["network"].values())


# -- checkpoints of something else -------------------------------------------------------------------------------------


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def foreign(path):
    torch.save({"weight": torch.ones(2)}, path)


def pickled(path):
    torch.save(LabelSensitiveGate(4, 6), path)


def edited(**changes):
    def edit(path):
        torch.save({**torch.load(path, weights_only=True), **changes}, path)

    return edit


BROKEN = {
    "text": lambda path: path.write_text("something else"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncated,
    "foreign": foreign,
    "pickled": pickled,
    "another kind": edited(kind="captum_classfilters recover"),
    "another version": edited(version=99),
    "an older version": edited(version=1),
    "no ranks": edited(ranks=[]),
    "no optimiser": edited(optimizers=[]),
    "no network": edited(network={}),
}


@pytest.mark.parametrize("breaks", BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused_and_nothing_changes(breaks, model, gate, batches, tmp_path):
    path = tmp_path / "checkpoint.pt"
    training, optimizer = paper_training(model, gate), optimizer_of(model, gate, momentum=0.9)
    schedule = lr_scheduler.StepLR(optimizer, 1)
    training.fit(batches, 2, optimizer=optimizer, scheduler=schedule, checkpoint=path)
    training.fit(batches, 1, optimizer=optimizer)
    breaks(path)
    content, parts = path.read_bytes(), [model, gate, optimizer, schedule]
    before, drawn = states_of(*parts), torch.get_rng_state()
    with pytest.raises(FileFormatError, match=r"(?s)is not a whole checkpoint of this training .*; delete it to start"):
        training.fit(batches, 4, optimizer=optimizer, scheduler=schedule, checkpoint=path)
    assert_as_before(parts, before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert path.read_bytes() == content
    # and they can be trained as before
    gate.project_()
    training.fit(batches, 1, optimizer=optimizer)


@pytest.mark.parametrize(
    ("size", "options", "fit", "told"),
    [
        (
            {"num_classes": 5},
            {"penalty": GatePenalty(0.325)},
            {},
            "5 classes x 6 channels, the checkpoint's 4 x 6",
        ),
        ({"channels": 7}, {}, {}, "this gate is 4 classes x 7 channels, the checkpoint's 4 x 6"),
        ({"bias": False}, {}, {}, "Unexpected key"),
        (
            {},
            {"penalty": GatePenalty(sparsity=0.1), "schedule": alternating(2)},
            {},
            r"other options: period was 3, is 2, sparsity was 0.02, is 0.1\)",
        ),
        ({}, {"penalty": GatePenalty(0.5)}, {}, "density"),
        ({}, {}, {"lr": 0.2}, r"other options: lr was \(0.1, 0.1\), is \(0.2, 0.2\)\)"),
        ({}, {}, {"lr": (0.1, 0.2)}, r"other options: lr was \(0.1, 0.1\), is \(0.1, 0.2\)\)"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_training_is_refused(size, options, fit, told, small_cnn, gate, batches, tmp_path):
    path = tmp_path / "checkpoint.pt"
    paper_training(small_cnn(), gate).fit(batches, 2, checkpoint=path)
    model = small_cnn(**size)
    other = LabelSensitiveGate(*model.fc.weight.shape)
    before = states_of(model, other)
    with pytest.raises(FileFormatError, match=told):
        paper_training(model, other, **options).fit(batches, **{"epochs": 2, **fit}, checkpoint=path)
    assert_as_before([model, other], before)


def test_a_checkpoint_of_an_older_version_says_so(model, gate, batches, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"kind": "captum_classfilters gated training", "version": 1, "options": {}}, path)
    with pytest.raises(FileFormatError, match="an older version of captum_classfilters wrote it, in format 1"):
        paper_training(model, gate).fit(batches, 1, checkpoint=path)


def test_a_loader_of_another_make_is_refused(model, gate, batches, tmp_path):
    path = tmp_path / "checkpoint.pt"
    paper_training(model, gate).fit(batches, 1, checkpoint=path)
    data = [(inputs[0], int(labels[0])) for inputs, labels in batches]
    loader = torch.utils.data.DataLoader(data, shuffle=True, generator=torch.Generator())
    with pytest.raises(FileFormatError, match="the loader has 1 generators, the one whose states were kept had 0"):
        paper_training(model, gate).fit(loader, 1, checkpoint=path)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1; got 0"),
        ({"epochs": 1.0}, "epochs must be an integer of at least 1; got 1.0"),
        ({"epochs": True}, "got True"),
        ({"lr": 0.0}, "lr must be a finite number above 0; got 0.0"),
        ({"lr": (0.1, math.nan)}, "lr must be a finite number above 0; got nan"),
        ({"max_norm": -1}, "max_norm must be a finite number above 0; got -1"),
        ({"lr": "0.1"}, "lr must be a finite number above 0; got '0.1'"),
        ({"optimizer": "sgd"}, "optimizer must be of type Optimizer, or a list of several, got str"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message, model, gate, batches):
    with pytest.raises(OptionError, match=message):
        paper_training(model, gate).fit(batches, **{"epochs": 1, **options})


def test_optimisers_and_schedulers_that_would_do_nothing_are_refused(model, gate, batches):
    training = paper_training(model, gate)
    without, whole = torch.optim.SGD(model.parameters(), lr=0.1), optimizer_of(model, gate)
    foreign = lr_scheduler.StepLR(without, 1)
    cases = [
        ({"optimizer": without}, "no optimiser has the gate, so it would not be trained; add it with"),
        ({"optimizer": whole, "scheduler": foreign}, "made for an optimiser that was not given; pass it in optimizer="),
        ({"optimizer": whole, "scheduler": lr_scheduler.ReduceLROnPlateau(whole)}, "ReduceLROnPlateau waits for a los"),
        (
            {"optimizer": whole, "scheduler": "cosine"},
            "scheduler must be of type LRScheduler, or a list of several",
        ),
        ({"scheduler": foreign}, "a scheduler steps the optimiser that it was made for, and none was given"),
    ]
    before = states_of(model, gate)
    for options, message in cases:
        with pytest.raises(OptionError, match=message):
            training.fit(batches, 1, **options)
    assert_as_before([model, gate], before)
    # of a gate that is not trained no optimiser need know
    fixed = LabelSensitiveGate.fixed(4, 6, exclusive=1)
    paper_training(model, fixed).fit(batches, 2, optimizer=without)
    assert torch.equal(fixed.weight, LabelSensitiveGate.fixed(4, 6, exclusive=1).weight)


def test_what_can_be_read_once_is_refused_for_more_than_one_epoch(model, gate, batches, tmp_path):
    training, path = paper_training(model, gate), tmp_path / "checkpoint.pt"
    before = states_of(model, gate)
    with pytest.raises(EmptyLoaderError, match="loader is an iterator, list_iterator, which can be read only once"):
        training.fit(iter(batches), 2)
    assert_as_before([model, gate], before)
    optimizer = optimizer_of(model, gate)
    for epochs in (1, 2):
        # one epoch is left each time
        history = training.fit(iter(batches), epochs, optimizer=optimizer, checkpoint=path)
        assert len(history) == epochs


def test_a_loader_without_a_batch_is_refused(model, gate, tmp_path):
    with pytest.raises(EmptyLoaderError, match="the loader gave no sample; expected at least one batch"):
        paper_training(model, gate).fit([], 1, checkpoint=tmp_path / "checkpoint.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told_before_the_training(model, gate, batches, tmp_path):
    before = states_of(model, gate)
    with pytest.raises(FileNotFoundError):
        paper_training(model, gate).fit(batches, 1, checkpoint=tmp_path / "none" / "checkpoint.pt")
    assert_as_before([model, gate], before)
