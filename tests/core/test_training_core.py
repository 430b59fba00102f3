"""Random states that are kept and put back, batches that come to the model, loaders that can be read once."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from captum_classfilters.core.errors import EmptyLoaderError, LabelError, OptionError, ShapeError
from captum_classfilters.core.training import get_random, refuse_iterators, samplers, set_random, to_model

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


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_comes_to_the_model_s_device_and_dtype(device, assert_close):
    with device.mode:
        inputs = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
        tokens = torch.tensor([[1, 2], [3, 4]])
        raw = ((inputs, tokens, "as it is"), torch.tensor([1, 0], dtype=torch.int32))
        (first, second, third), labels = to_model(raw, 0, torch.device(device.name), torch.bfloat16)
        assert_close(first, inputs.to(device.name, torch.bfloat16))
        assert_close(second, tokens.to(device.name))
        assert third == "as it is"
        assert_close(labels, torch.tensor([1, 0], device=device.name))


@pytest.mark.parametrize(
    "raw",
    [(torch.ones(2, 3), [1, 0]), [torch.ones(2, 3), torch.tensor([1, 0]), "more"],
     {"image": torch.ones(2, 3), "target": torch.tensor([1, 0])}],
    ids=["tuple", "list", "dict"],
)  # fmt: skip
def test_forms_of_batches(raw):
    inputs, labels = to_model(raw, 0, CPU, torch.float32)
    assert torch.equal(inputs[0], torch.ones(2, 3))
    assert len(inputs) == 1
    assert labels.tolist() == [1, 0]
    assert labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("raw", "error", "message"),
    [
        (torch.ones(2, 3), LabelError, "batch 7 has no labels"),
        ((torch.ones(2, 3), torch.tensor([1])), LabelError, r"must have shape \(2,\), got \(1,\) in batch 7"),
        ((torch.ones(2, 3), torch.ones(2)), LabelError, "must be integers, got torch.float32 in batch 7"),
        ({"pictures": torch.ones(2, 3)}, ShapeError, "batch 7 is a mapping with keys"),
        (3, ShapeError, "batch 7 is int; expected"),
    ],
    ids=str,
)
def test_bad_batches_are_refused_with_their_number(raw, error, message):
    with pytest.raises(error, match=message):
        to_model(raw, 7, CPU, torch.float32)


def test_what_can_be_read_once_is_refused():
    for loader in (iter([1]), (batch for batch in [1]), iter(DataLoader(DATA)), zip([1], [2], strict=True)):
        with pytest.raises(EmptyLoaderError, match=f"train is an iterator, {type(loader).__name__}, which can be read"):
            refuse_iterators(loader, "train")
    for loader in ([1], (1,), DataLoader(DATA), range(3)):
        refuse_iterators(loader, "train")
