"""A gate and a network it fits, in train mode."""

import pytest
import torch

from captum_classfilters import LabelSensitiveGate


@pytest.fixture
def gate():
    return LabelSensitiveGate(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(small_cnn):
    """In train mode; dropout off, so that two passes are the same."""
    network = small_cnn().train()
    network.dropout.p = 0.0
    return network
