"""Rule 1 of the house: what is done to the user's model is undone, whatever happens."""

import pytest
import torch
from contract import ROWS, Snapshot
from torch import nn

from captum_classfilters import ClassFilters, InfluentialFeatures
from captum_classfilters.core.borrow import borrowed, unwrap
from captum_classfilters.core.errors import LabelError


class Tripwire(nn.Module):
    """Passes its input through ``inner``; armed, it raises after so many calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.error = None
        self.calls_left = 0

    def forward(self, x):
        self.calls_left -= 1
        if self.error is not None and self.calls_left < 0:
            raise self.error
        return self.inner(x)


def noop(*args):
    return None


@pytest.fixture
def used_model(small_cnn, images):
    """A model in the middle of its owner's training: mixed modes, frozen parts, gradients, hooks of its own."""

    def make(error=None, calls_before=0):
        model = small_cnn()
        model.pool = Tripwire(model.pool)
        model.train()
        model.bn1.eval()
        model.dropout.eval()
        model.conv1.requires_grad_(False)
        model.fc.bias.requires_grad_(False)
        model(images()).square().sum().backward()
        model.conv2.register_forward_hook(noop)
        model.fc.register_forward_pre_hook(noop)
        model.relu.register_full_backward_hook(noop)
        model.pool.error, model.pool.calls_left = error, calls_before
        return model

    return make


GOOD, BAD = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 1, 2, 99, 0])


def loader_of(images, labels=GOOD, error=None):
    """A good batch, one with ``labels``, then the error, if there is one, and a last batch."""
    yield images(6, seed=1), torch.tensor([0, 1, 2, 3, 0, 1])
    yield images(5, seed=2), labels
    if error is not None:
        raise error
    yield images(3, seed=3), torch.tensor([2, 3, 0])


def prepared(row, scenario, used_model, images):
    """The model, the arguments of the row's call after it, and what the call is to raise."""
    loader = row.reads == "loader"
    good = (loader_of(images),) if loader else (images(), 1)
    if scenario == "success":
        return used_model(), good, None
    if scenario == "bad target":
        return used_model(), (loader_of(images, BAD),) if loader else (images(), 99), LabelError
    if scenario == "exception in the model":
        return used_model(ZeroDivisionError(), calls_before=int(loader)), good, ZeroDivisionError
    if loader:
        return used_model(), (loader_of(images, error=KeyboardInterrupt()),), KeyboardInterrupt
    return used_model(KeyboardInterrupt()), good, KeyboardInterrupt


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("scenario", ["success", "bad target", "exception in the model", "KeyboardInterrupt"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_model_is_given_back(row, scenario, grad, used_model, images):
    model, arguments, error = prepared(row, scenario, used_model, images)
    with torch.set_grad_enabled(grad):
        before = Snapshot.of(model)
        if error is None:
            row.run(model, *arguments)
        else:
            with pytest.raises(error):
                row.run(model, *arguments)
        Snapshot.of(model).assert_same(before)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_call_runs_in_eval_mode_without_gradients(row, used_model, images):
    model, arguments, _ = prepared(row, "success", used_model, images)
    modes = []

    def note(module, args):
        modes.append((any(m.training for m in model.modules()), torch.is_grad_enabled()))

    model.fc.register_forward_pre_hook(note)
    row.run(model, *arguments)
    assert set(modes) == {(False, False)}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError(), OSError("disk")], ids=repr)
def test_an_error_of_the_loader_carries_the_table_so_far(error, used_model, images):
    model = used_model()
    method = InfluentialFeatures(model)
    with pytest.raises(type(error)) as caught:
        method.attribute(loader_of(images, error=error))
    assert caught.value is error
    assert_same_tables(error.partial_result, method.attribute(list(loader_of(images))[:2]))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
def test_an_error_of_the_model_carries_the_table_so_far(error, used_model, images):
    with pytest.raises(type(error)):
        InfluentialFeatures(used_model(error, calls_before=2)).attribute(loader_of(images))
    assert_same_tables(error.partial_result, InfluentialFeatures(used_model()).attribute(list(loader_of(images))[:2]))


@pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.UnseenClassWarning")
def test_a_bad_label_carries_the_table_so_far(used_model, images):
    method = InfluentialFeatures(used_model())
    with pytest.raises(LabelError) as caught:
        method.attribute(loader_of(images, BAD))
    assert_same_tables(caught.value.partial_result, method.attribute(list(loader_of(images))[:1]))


def test_several_tables_so_far_are_a_dict(used_model, images):
    model = used_model()
    with pytest.raises(KeyboardInterrupt) as caught:
        InfluentialFeatures(model).attribute(loader_of(images, error=KeyboardInterrupt()), k1=[1, 2])
    assert [table.meta["k1"] for table in caught.value.partial_result.values()] == [1, 2]


def test_an_error_before_the_first_batch_carries_nothing(used_model):
    def broken():
        raise ZeroDivisionError
        yield

    with pytest.raises(ZeroDivisionError) as caught:
        InfluentialFeatures(used_model()).attribute(broken())
    assert not hasattr(caught.value, "partial_result")


def test_the_rest_can_be_merged(used_model, images):
    method = InfluentialFeatures(used_model())
    with pytest.raises(KeyboardInterrupt) as caught:
        method.attribute(loader_of(images, error=KeyboardInterrupt()))
    with pytest.warns(UserWarning, match="no sample of class 1"):
        rest = method.attribute(list(loader_of(images))[2:])
    assert_same_tables(ClassFilters.merge(caught.value.partial_result, rest), method.attribute(loader_of(images)))


def assert_same_tables(actual, expected):
    for name in ("scores", "mass", "counts"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0)
    assert (actual.method, actual.layer, actual.class_names) == (expected.method, expected.layer, expected.class_names)
    assert actual.meta == expected.meta
    assert actual.counts.sum() > 0


class MergesOnEval(nn.Linear):
    """As some adapters do: `eval` changes the weights, and only `train` changes them back."""

    def train(self, mode=True):
        if self.training and not mode:
            self.weight.data += 1
        if not self.training and mode:
            self.weight.data -= 1
        return super().train(mode)


def test_an_overridden_eval_is_not_called():
    model = MergesOnEval(3, 2)
    weight = model.weight.detach().clone()
    with borrowed(model):
        assert not model.training
    assert model.training
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize("grad", [True, False])
def test_grad_is_what_was_asked_for(grad, small_cnn):
    with torch.set_grad_enabled(not grad), borrowed(small_cnn(), grad=grad):
        assert torch.is_grad_enabled() is grad


def test_a_hook_may_leave_early_and_the_rest_leave_at_the_end(small_cnn, images):
    model, calls = small_cnn(), []
    with borrowed(model) as borrow:
        remove = borrow.after(model.fc, lambda *_: calls.append("early"))
        borrow.after(model.fc, lambda *_: calls.append("late"))
        model(images())
        remove()
        model(images())
    model(images())
    assert calls == ["early", "late", "late"]


def test_borrowing_twice_is_given_back_once_each(small_cnn):
    model = small_cnn().train()
    with borrowed(model):
        with borrowed(model):
            pass
        assert not model.training
    assert all(module.training for module in model.modules())


def test_a_module_that_comes_twice_is_given_back():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), shared).train()
    shared.eval()
    with borrowed(model):
        pass
    assert [module.training for module in model.modules()] == [True, False, True]


def test_without_a_model_only_grad_mode_and_hooks_are_borrowed():
    layer, calls = nn.Linear(2, 2), []
    with borrowed(None) as borrow:
        borrow.after(layer, lambda *_: calls.append(torch.is_grad_enabled()))
        layer(torch.ones(1, 2))
    layer(torch.ones(1, 2))
    assert calls == [False]
    assert layer.training


def test_compilation_is_back_afterwards(small_cnn, images):
    model = small_cnn()
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    InfluentialFeatures(model).attribute(images(), 1)
    assert model._compiled_call_impl is compiled
    stance = getattr(torch._dynamo.eval_frame, "_stance", None)  # torch 2.4 has none
    assert stance is None or stance.stance == "default"


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_part_is_given_back_compiled_and_in_its_mode(training, small_cnn, images):
    model, graphs = small_cnn().train(training), []
    part = torch.compile(model, backend=lambda graph, example: graphs.append(graph) or graph.forward)
    whole = nn.Sequential(part)
    InfluentialFeatures(whole).attribute(images(), 1)
    assert {module.training for module in model.modules()} == {training}
    assert not graphs
    whole(images())
    assert graphs


def test_unwrap_goes_through_every_wrapper(small_cnn):
    model = small_cnn()
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(torch.compile(nn.DataParallel(model)))) is model
    assert unwrap(len) is len
