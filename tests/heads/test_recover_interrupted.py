"""recover: an interruption costs nothing, and a checkpoint is gone on from or refused."""

import itertools
import sys

import numpy as np
import pytest
import torch
from recovering import BATCH, Noisy, assert_same, batches, differ, still
from torch import nn
from torch.utils.data import DataLoader

from captum_classfilters import Checkpoint
from captum_classfilters.core.errors import FileFormatError
from captum_classfilters.heads import recover

training_module = sys.modules["captum_classfilters.core.training"]


class Interrupted:
    """A loader that stops at one of all the batches it gives."""

    def __init__(self, loader, at, error):
        self.loader, self.left, self.error = loader, at, error

    def __iter__(self):
        for batch in self.loader:
            if self.left == 0:
                raise self.error
            self.left -= 1
            yield batch


def interrupt_forward(model, calls):
    """Its network stops in the middle of a forward pass, when the first batch norm has run."""
    left = [calls]

    def stop(module, args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    return model.conv2.register_forward_pre_hook(stop)


def interrupt_step(monkeypatch, calls):
    """Adam stops when some weights have changed and others not."""
    whole, left = torch.optim.Adam.step, [calls]

    def step(self, *args):
        left[0] -= 1
        if left[0] < 0:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)


@pytest.mark.parametrize(
    ("where", "judged"),
    [*itertools.product(["loader", "forward", "step", "skipping"], [False, True]), ("validation", True)],
)
def test_what_was_interrupted_and_resumed_is_what_went_through(where, judged, small_cnn, tmp_path, monkeypatch):
    model, path, held_out = small_cnn(), tmp_path / "checkpoint.pt", still(16) if judged else None
    options = {"lr": 2e-2, "checkpoint": Checkpoint(path, every=2)}
    whole = recover(model, batches(), 3, lr=2e-2, validation=held_out)

    def stopped(loader=None, validation=held_out):
        with pytest.raises(KeyboardInterrupt) as caught:
            recover(model, loader or batches(), 3, validation=validation, **options)
        assert differ(caught.value.partial_result, model) or judged
        assert path.is_file()

    if where == "forward":
        # eval of the start runs it twice
        handle = interrupt_forward(model, 8 + 2 * judged * 2)
        stopped()
        handle.remove()
    elif where == "step":
        with monkeypatch.context() as patch:
            interrupt_step(patch, 8)
            stopped()
    elif where == "validation":
        stopped(validation=Interrupted(held_out, 5, KeyboardInterrupt()))
    else:
        stopped(Interrupted(batches(), 8, KeyboardInterrupt()))
        if where == "skipping":
            stopped(Interrupted(batches(), 2, KeyboardInterrupt()))
    # five steps an epoch: these went on in the second
    assert torch.load(path, weights_only=True)["epoch"] == (2 if where == "validation" else 1)
    assert_same(recover(model, batches(), 3, validation=held_out, **options), whole)


class NumpyNoise(Noisy):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + float(np.random.randn()), label


@pytest.mark.parametrize("at", [5, 8])
def test_the_loader_s_own_generator_and_numpy_s_go_on_too(at, small_cnn, tmp_path):
    def run(stop=-1, path=None, seed=0):
        np.random.seed(seed)
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(NumpyNoise(), batch_size=BATCH, shuffle=True, generator=generator)
        if stop >= 0:
            # a loader's generators are found by their name
            loader_that_stops = Interrupted(loader, stop, KeyboardInterrupt())
            loader_that_stops.generator = generator
            loader = loader_that_stops
        return recover(small_cnn(), loader, 3, lr=2e-2, checkpoint=path)

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        run(at, path)
    assert_same(run(path=path, seed=5), run())


def test_a_finished_training_is_not_trained_again_and_may_be_prolonged(small_cnn, tmp_path):
    model, path = small_cnn(), tmp_path / "checkpoint.pt"
    once = recover(model, batches(), 1, checkpoint=path)
    assert_same(recover(model, [], 1, checkpoint=path), once)
    assert_same(recover(model, batches(), 2, checkpoint=path), recover(model, batches(), 2))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_another_learning_rate_holds_from_the_checkpoint_on(small_cnn, tmp_path):
    model, path = small_cnn(), tmp_path / "checkpoint.pt"
    once = recover(model, batches(), 1, checkpoint=path)
    twice = recover(model, batches(), 2, checkpoint=path, lr=1e-12)
    torch.testing.assert_close(twice.fc.weight, once.fc.weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
def test_what_ends_early_carries_the_network_so_far(error, small_cnn):
    model = small_cnn()
    with pytest.raises(type(error)) as caught:
        recover(model, Interrupted(batches(), 5, error), 2, lr=1e-2)
    assert caught.value is error
    assert_same(error.partial_result, recover(model, batches(), 1, lr=1e-2))


def test_checkpoints_of_another_training_are_refused_and_left_alone(small_cnn, tmp_path):
    path = tmp_path / "checkpoint.pt"
    recover(small_cnn(), batches(), checkpoint=path)
    saved = path.read_bytes()
    for model, seed in ((small_cnn(channels=7), 0), (small_cnn(), 1)):
        with pytest.raises(FileFormatError, match=r"(?s)not a whole checkpoint .*; delete it to start anew"):
            recover(model, batches(), 2, checkpoint=path, seed=seed)
    assert path.read_bytes() == saved
    for content in (saved[:-100], b"something else"):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match="not a whole checkpoint of this training"):
            recover(small_cnn(), batches(), 2, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_does_not_hide_what_went_wrong(small_cnn, tmp_path, monkeypatch):
    def broken():
        yield from still()
        raise RuntimeError("the disk with the images is gone")

    def full(path):
        raise OSError("no space left")

    monkeypatch.setattr(training_module, "replacing", full)
    warned = pytest.warns(UserWarning, match="could not be written: no space left")
    with warned, pytest.raises(RuntimeError, match="images is gone") as caught:
        recover(small_cnn(), broken(), checkpoint=tmp_path / "state.pt")
    assert isinstance(caught.value.partial_result, nn.Module)
