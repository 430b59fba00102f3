"""The fingerprint of a decoupler: read from the weights once, and again whenever they have changed."""

import copy

import pytest
import torch
from test_decoupler import decoupled, images, network

from captum_classfilters.core import fingerprint as module
from captum_classfilters.core.errors import MergeError


@pytest.fixture
def hashed(monkeypatch):
    """How many values of parameters were hashed."""
    counts = []
    real = module._bytes_of

    def counting(value):
        if isinstance(value, torch.nn.Parameter):
            counts.append(value.numel())
        return real(value)

    monkeypatch.setattr(module, "_bytes_of", counting)
    return counts


def weights_of(decoupler):
    return sum(value.numel() for name, value in decoupler.named_parameters() if not name.startswith("readers."))


def test_weights_are_hashed_once_for_any_number_of_calls(hashed):
    decoupler = decoupled(network())
    first = decoupler.paths(images(4))
    assert sum(hashed) == weights_of(decoupler)
    for _ in range(3):
        assert decoupler.paths(images(2)).fingerprint == first.fingerprint == decoupler.fingerprint()
    assert sum(hashed) == weights_of(decoupler)
    # a copy is another decoupler with the same weights
    assert copy.deepcopy(decoupler).fingerprint() == first.fingerprint
    assert sum(hashed) == 2 * weights_of(decoupler)


def step_of_an_optimizer(decoupler):
    decoupler.train().loss(images(), torch.arange(6) % 3).total.backward()
    torch.optim.SGD(decoupler.parameters(), 0.1).step()


def state_of_another(decoupler):
    decoupler.load_controllers_state_dict(decoupled(network(), seed=5).controllers_state_dict())


def in_place(decoupler):
    with torch.no_grad():
        decoupler.model.get_submodule(decoupler.layers[0]).weight[0, 0] += 1


def through_a_view(decoupler):
    decoupler.controllers[1].excite.bias.detach().view(-1)[0].add_(1)


def another_parameter(decoupler):
    layer = decoupler.controllers[0].squeeze
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 1)


def other_data(decoupler):
    layer = decoupler.controllers[0].squeeze
    layer.weight.data = layer.weight.data + 1


def there_and_back(decoupler):
    # rounded to half precision; torch may give the new weights the old address
    decoupler.half().float()


def running_statistics(decoupler):
    # torch does not count this change of a buffer
    norm = next(layer for layer in decoupler.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    torch.nn.functional.batch_norm(
        torch.randn(4, norm.num_features, 3), norm.running_mean, norm.running_var, training=True
    )


CHANGES = [
    step_of_an_optimizer, state_of_another, in_place, through_a_view, another_parameter, other_data, there_and_back,
    running_statistics,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_weights_is_noticed(change):
    decoupler = decoupled(network())
    before = decoupler.fingerprint()
    change(decoupler)
    assert decoupler.fingerprint() != before
    module._LAST.clear()
    afresh = decoupler.fingerprint()
    assert decoupler.fingerprint() == afresh != before


def test_paths_from_before_a_change_do_not_go_with_those_after():
    decoupler = decoupled(network())
    paths = decoupler.paths(images(4))
    in_place(decoupler)
    with pytest.raises(MergeError, match="of another network or other controllers"):
        paths.distances(decoupler.paths(images(4)))


def test_readers_are_no_part_of_it():
    decoupler = decoupled(network())
    before = decoupler.fingerprint()
    with torch.no_grad():
        decoupler.readers[0].weight.zero_()
    assert decoupler.fingerprint() == before


def test_weights_made_in_inference_mode_have_one_too():
    with torch.inference_mode():
        decoupler = decoupled(network())
        before = decoupler.fingerprint()
        in_place(decoupler)
        assert decoupler.fingerprint() != before
