"""What the tests of pairs share."""

import pytest
from examples import decoupler_of, right_and_wrong


@pytest.fixture
def decoupler():
    return decoupler_of()


@pytest.fixture
def data(decoupler):
    return right_and_wrong(decoupler)
