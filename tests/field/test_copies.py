"""A copy of a model is a copy: what is done to it reaches its output, and nothing reaches the original."""

import threading

import pytest
import torch
from torch import nn

from captum_classfilters import InfluentialFeatures, decompose, recover
from captum_classfilters.core.copies import copied
from captum_classfilters.core.errors import LayerError


def cnn():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*trunk, nn.Linear(8, 4)).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(2)]


IMAGES = batches()[0][0]


def compiled():
    model = cnn()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def old_weight_norm():
    model = cnn()
    for place in (0, 4):
        with pytest.warns(FutureWarning):
            model[place] = nn.utils.weight_norm(model[place])
    return model


def with_cached_features():
    model = cnn()
    model.last = model[:4](IMAGES)  # with its graph
    model.history = [{"features": model[0](IMAGES)}]
    return model


def with_lock():
    model = cnn()
    model.lock, model[0].guard = threading.Lock(), threading.RLock()
    return model


def bound_elsewhere():
    """A forward that is bound to the instance, as accelerate sets it."""
    from types import MethodType

    model = cnn()
    model.forward = MethodType(lambda self, x: nn.Sequential.forward(self, x), model)
    return model


@pytest.mark.parametrize("make", [compiled, old_weight_norm, with_cached_features, with_lock, bound_elsewhere])
def test_what_is_done_to_the_copy_reaches_its_output_and_no_more(make):
    model = make()
    before = model(IMAGES).detach().clone()
    filters = InfluentialFeatures(model).attribute(batches())
    with torch.no_grad():
        features = model[:4](IMAGES)
        weight = model[4].weight.detach() * filters.mask(1)
        expected = features @ weight.T + model[4].bias
    torch.testing.assert_close(decompose(model, filters, 1)(IMAGES), expected, rtol=1e-4, atol=1e-5)
    trained = recover(model, batches(), 1, lr=0.1)
    assert not torch.allclose(trained(IMAGES), before, atol=1e-3)
    assert torch.equal(model(IMAGES), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def closure():
    model = cnn()
    inner = model.forward
    model.forward = lambda x: inner(x) * 1.0
    return model


NET = cnn()


def by_a_global_name():
    NET.forward = lambda x: nn.Sequential.forward(NET, x)
    return NET


def inside():
    model = cnn()
    conv = model[0]
    convolve = conv.forward
    conv.forward = lambda x: convolve(x) + 0
    return model


@pytest.mark.parametrize("make", [closure, by_a_global_name, inside])
def test_a_function_that_runs_the_original_is_refused_and_the_remedy_works(make):
    model = make()
    filters = InfluentialFeatures(model).attribute(batches())
    for call in (lambda: decompose(model, filters, 1), lambda: recover(model, batches(), 1)):
        with pytest.raises(LayerError, match=r"'forward' of .* runs the original model.* del model\.forward"):
            call()
    del (model[0] if make is inside else model).forward
    assert decompose(model, filters, 1)(IMAGES).shape == (8, 4)


def test_what_cannot_be_copied_is_said_in_words(tmp_path):
    model = cnn()
    with (tmp_path / "log").open("w") as file:
        model.log = file
        with pytest.raises(LayerError, match=r"the model cannot be copied .* take what is no part of the network"):
            copied(model)
    del model.log
    assert copied(model)(IMAGES).shape == (8, 4)


def test_a_reference_to_another_model_is_copied_with_it():
    model, teacher = cnn(), cnn()
    model.teacher = [teacher]
    twin = copied(model)
    assert twin.teacher[0] is not teacher
    assert torch.equal(twin(IMAGES), model(IMAGES))


class Holder:
    """An object of one's own that keeps the network."""

    def __init__(self, trunk, head):
        self.trunk, self.head = trunk, head

    def __deepcopy__(self, memo):
        return self

    def answer(self, images):
        return self.head(self.trunk(images))


class ByAHolder(nn.Module):
    def __init__(self):
        super().__init__()
        model = cnn()
        self.trunk, self.fc = model[:4], model[4]
        self.holder = Holder(self.trunk, self.fc)

    def forward(self, images):
        return self.holder.answer(images)


class ByTheClass(nn.Module):
    """Its code uses a module by a global name."""

    def __init__(self):
        super().__init__()
        self.net = NET_OF_CLASS

    def forward(self, images):
        return NET_OF_CLASS(images)


NET_OF_CLASS = cnn()


@pytest.mark.parametrize("make", [ByAHolder, ByTheClass])
def test_a_forward_shows_what_no_look_at_functions_does(make):
    model = make().eval()
    filters = InfluentialFeatures(model).attribute(batches())
    before = [parameter.clone() for parameter in model.parameters()]
    for call in (lambda: decompose(model, filters, 1), lambda: recover(model, batches(), 1)):
        with pytest.raises(LayerError, match=r"still runs the original.* self\.<name>"):
            call()
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, was)
