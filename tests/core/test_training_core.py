"""Random states that are kept and put back."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from captum_classfilters.core.errors import OptionError
from captum_classfilters.core.training import get_random, samplers, set_random

CPU = torch.device("cpu")
DATA = list(range(12))


def seeded_generator():
    return torch.Generator().manual_seed(3)


def shared():
    return DataLoader(DATA, 4, shuffle=True, generator=seeded_generator())


def of_the_sampler():
    return DataLoader(DATA, 4, sampler=RandomSampler(DATA, generator=seeded_generator()))


def of_the_batch_sampler():
    return DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=seeded_generator()), 4, False))


def two():
    return DataLoader(DATA, 4, sampler=RandomSampler(DATA, generator=seeded_generator()), generator=torch.Generator())


LOADERS = {
    "a list": (lambda: [1], 0),
    "torch's own": (lambda: DataLoader(DATA, 4, shuffle=True), 0),
    "shared": (shared, 1),
    "of the sampler": (of_the_sampler, 1),
    "of the batch sampler": (of_the_batch_sampler, 1),
    "two": (two, 2),
}


def draws(loader):
    order = [torch.as_tensor(batch).tolist() for batch in loader]
    return order, torch.randn(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random()


@pytest.mark.parametrize(("make", "count"), LOADERS.values(), ids=LOADERS)
def test_generators_go_on_from_where_they_were(make, count, tmp_path):
    loader = make()
    # numpy and Python keep the second one of a pair of normal numbers
    torch.randn(1), np.random.randn(1), random.gauss(0, 1), next(iter(loader))
    torch.save(get_random(CPU, loader), tmp_path / "state.pt")
    expected = draws(loader)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["loader"]) == count
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        again = make()
        for _ in range(seed):
            list(again)
        assert draws(again) != expected
        set_random(state, CPU, again)
        assert draws(again) == expected


@pytest.mark.parametrize(("name", "count"), [("two", 2), ("torch's own", 0)])
def test_a_loader_of_another_make_is_refused_and_no_generator_moves(name, count):
    state = get_random(CPU, shared())
    loader = LOADERS[name][0]()
    here = get_random(CPU, loader)
    expected = draws(loader)
    set_random(here, CPU, loader)
    with pytest.raises(OptionError, match=rf"has {count} generators, the one whose states were kept had 1; pass one"):
        set_random(state, CPU, loader)
    assert draws(loader) == expected


def test_which_part_of_the_loader_owns_the_generator_does_not_matter():
    state = get_random(CPU, shared())
    loader = of_the_sampler()
    next(iter(loader))
    set_random(state, CPU, loader)
    torch.testing.assert_close(get_random(CPU, loader)["loader"], state["loader"], rtol=0, atol=0)


def test_samplers_are_those_of_a_loader_each_once():
    loader = shared()
    assert samplers(loader) == [loader.sampler, loader.batch_sampler]
    nested = of_the_batch_sampler()
    assert samplers(nested)[-1] is nested.batch_sampler.sampler
    assert samplers([1, 2]) == []
