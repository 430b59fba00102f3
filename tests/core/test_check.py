"""Arguments: what is accepted, as which plain Python value, and what a refusal says."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from captum_classfilters import Control
from captum_classfilters.core.check import integer, integers, number, one_of, some_of
from captum_classfilters.core.control import random_masks
from captum_classfilters.core.errors import OptionError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)], ids=repr)
def test_an_integer_of_python_or_numpy_is_a_plain_one(value):
    assert type(integer(value, "k", 3, 3)) is int
    assert integer(value, "k", 1, 64) == 3


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.float64(1), np.int64(0), Fraction(1, 2)], ids=repr)
def test_a_number_of_python_or_numpy_is_a_plain_float(value):
    found = number(value, "share", 0, 1)
    assert type(found) is float
    assert found == float(value)


@pytest.mark.parametrize(
    ("value", "low", "high", "message"),
    [
        (0, 1, 64, r"k must be an integer in \[1, 64\], the number of channels; got 0"),
        (65, 1, 64, r"k must be an integer in \[1, 64\], the number of channels; got 65"),
        (-1, 0, None, "k must be an integer of at least 0, the number of channels; got -1"),
        (True, 0, None, "got True"),
        (np.True_, 0, None, "got (np.)?True"),
        (3.0, 0, None, "got 3.0"),
        (np.float64(3), 0, None, "got (np.float64.)?3.0"),
        ("3", 0, None, "got '3'"),
        (None, 0, None, "got None"),
        (torch.tensor(3), 0, None, r"got tensor\(3\)"),
    ],
)
def test_what_is_no_such_integer_is_refused(value, low, high, message):
    with pytest.raises(OptionError, match=message):
        integer(value, "k", low, high, meaning="the number of channels")


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (2, (0, 1), r"share must be a number in \[0, 1\], of all; got 2"),
        (-0.1, (0, 1), r"in \[0, 1\]"),
        (math.nan, (), "share must be a finite number, of all; got nan"),
        (math.inf, (), "a finite number, of all; got inf"),
        (-1, (0,), "a finite number of at least 0, of all; got -1"),
        (True, (0, 1), "got True"),
        (np.False_, (0, 1), "got (np.)?False"),
        ("0.5", (0, 1), "got '0.5'"),
        (1j, (0, 1), "got 1j"),
        (None, (0, 1), "got None"),
    ],
)
def test_what_is_no_such_number_is_refused(value, bounds, message):
    with pytest.raises(OptionError, match=message):
        number(value, "share", *bounds, meaning="of all")


@pytest.mark.parametrize("value", [0, 1])
def test_open_ends_leave_the_bounds_out(value):
    assert number(value, "share", 0, 1) == value
    with pytest.raises(OptionError, match="a number between 0 and 1; got"):
        number(value, "share", 0, 1, open_ends=True)
    with pytest.raises(OptionError, match="a finite number above 0; got 0"):
        number(0, "share", 0, open_ends=True)


def test_integers_are_sorted_and_each_is_there_once():
    for values in ((8, 1, 8), np.array([8, 1]), iter([1, 8]), {8, 1}):
        found = integers(values, "ks", 1, 64)
        assert found == [1, 8]
        assert {type(value) for value in found} == {int}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (5, r"ks must be a list of integers, such as \[1, 3, 5\]; got 5"),
        ("15", "ks must be a list of integers"),
        ([], "at least one integer"),
        ([1, 65], r"each of ks must be an integer in \[1, 64\]; got 65"),
        ([True], "each of ks must be an integer"),
        ([2.5], "each of ks must be an integer"),
    ],
)
def test_what_is_no_list_of_integers_is_refused(values, message):
    with pytest.raises(OptionError, match=message):
        integers(values, "ks", 1, 64)


def test_names_are_among_the_options():
    assert one_of("abs", "importance", ("abs", "signed")) == "abs"
    assert one_of(None, "refit", (None, "omp")) is None
    assert some_of("zero", "modes", ("noise", "zero")) == ["zero"]
    assert some_of(iter(["zero", "noise", "zero"]), "modes", ("noise", "zero")) == ["zero", "noise"]


@pytest.mark.parametrize("value", ["Abs", None, ["abs"], np.zeros(2), {}], ids=repr)
def test_one_of_refuses_other_names_and_what_is_none(value):
    with pytest.raises(OptionError, match=r"importance must be one of \['abs', 'signed'\], got "):
        one_of(value, "importance", ("abs", "signed"))


@pytest.mark.parametrize("values", [[], "shuffle", ["zero", "shuffle"], 3, [["zero"]]], ids=repr)
def test_some_of_refuses_other_names_and_none_at_all(values):
    with pytest.raises(OptionError, match=r"modes must be some of \['noise', 'zero'\], got "):
        some_of(values, "modes", ("noise", "zero"))


# -- the control -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 4}, "draws must be an integer in \\[5, 10000\\], enough to say what chance does; got 4"),
        ({"draws": 5.0}, "draws must be an integer"),
        ({"draws": True}, "draws must be an integer"),
        ({"seed": -1}, "seed must be an integer of at least 0; got -1"),
        ({"seed": None}, "seed must be an integer"),
    ],
)
def test_a_control_of_too_few_draws_or_no_seed_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Control(**options)


def test_a_control_is_a_frozen_record_of_plain_numbers():
    control = Control(np.int64(7), np.int64(3))
    assert control == Control(draws=7, seed=3)
    assert hash(control) == hash(Control(7, 3))
    assert (type(control.draws), type(control.seed)) == (int, int)
    assert Control() == Control(5, 0)
    with pytest.raises(AttributeError):
        control.draws = 8


def test_a_control_draws_the_same_rankings_every_time():
    control = Control(6, seed=2)
    first, again, other = control.rankings((4, 9)), control.rankings((4, 9)), Control(6, seed=3).rankings((4, 9))
    assert len(first) == 6
    for ranking in first:
        assert torch.equal(ranking.sort(1).values, torch.arange(9).expand(4, 9))
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(torch.stack(first), torch.stack(other))
    assert len({ranking.numpy().tobytes() for ranking in first}) == 6
    # more draws go on where fewer end
    assert torch.equal(torch.stack(Control(9, seed=2).rankings((4, 9))[:6]), torch.stack(first))


@pytest.mark.parametrize("k", [0, 3, 9])
def test_random_masks_have_k_channels_of_each_class(k):
    masks = torch.stack(random_masks((4, 9), k, 200, torch.Generator().manual_seed(0)))
    assert masks.dtype == torch.bool
    assert (masks.sum(2) == k).all()
    # every channel as often as any other
    torch.testing.assert_close(masks.double().mean((0, 1)), torch.full((9,), k / 9).double(), rtol=0, atol=0.07)
