"""Targets as Captum takes them, where they must be classes; layers by name."""

import numpy as np
import pytest
import torch
from torch import nn

from captum_classfilters.core.errors import HeadError, LabelError, LayerError, OptionError
from captum_classfilters.core.head import last_layers
from captum_classfilters.core.layers import ITSELF, find_module
from captum_classfilters.core.targets import classes_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (2, [2, 2, 2]),
        (np.int64(2), [2, 2, 2]),
        (torch.tensor(2), [2, 2, 2]),
        ([2], [2, 2, 2]),
        ([0, 3, 1], [0, 3, 1]),
        ((0, 3, 1), [0, 3, 1]),
        (np.array([0, 3, 1], np.uint8), [0, 3, 1]),
        (torch.tensor([0, 3, 1], dtype=torch.int16), [0, 3, 1]),
    ],
    ids=repr,
)
def test_classes(target, expected):
    found = classes_of(target, 3, 4, CPU)
    assert found.tolist() == expected
    assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("coat", r"target must be a class index, got the name 'coat'; use class_names.index\('coat'\)"),
        (None, "target must be a class index, or one for each sample; got None"),
        (["a", "b", "c"], "got the name 'a'"),
        (1.0, "target must be integers, got torch.float32; pass class indices"),
        (True, "target must be integers, got torch.bool"),
        ([0, 1], r"target must be an int or 3 of them, one for each sample; got shape \(2,\)"),
        (torch.zeros(3, 1, dtype=torch.long), r"got shape \(3, 1\)"),
        (4, r"target must lie in \[0, 4\), got 4"),
        (-1, r"target must lie in \[0, 4\), got -1"),
        ([0, 1, 9], "got 9"),
    ],
    ids=repr,
)
def test_what_is_no_class_is_refused(target, message):
    with pytest.raises(LabelError, match=message):
        classes_of(target, 3, 4, CPU)


def test_classes_are_where_they_are_wanted(device):
    with device.mode:
        for target in (2, [0, 3, 1], torch.tensor([0, 3, 1])):
            found = classes_of(target, 3, 4, torch.device(device.name))
            assert (found.shape, found.dtype, found.device.type) == ((3,), torch.int64, device.name)


# -- layers ------------------------------------------------------------------------------------------------------------


def test_a_layer_is_itself_or_its_name(small_cnn):
    model = small_cnn()
    assert find_module(model, "conv2") is model.conv2
    assert find_module(model, model.conv2) is model.conv2
    assert find_module(model, ITSELF) is model
    assert find_module(None, model.conv2) is model.conv2
    nested = nn.Sequential(nn.Sequential(model))
    assert find_module(nested, "0.0.fc") is model.fc


def test_what_is_no_layer_is_refused(small_cnn):
    model = small_cnn()
    with pytest.raises(LayerError, match=r"the model has no layer 'conv'; did you mean one of \['conv2', 'conv1'\]\?"):
        find_module(model, "conv")
    with pytest.raises(HeadError, match=r"no layer 'zzz'; did you mean one of \['conv1', 'conv2'\]"):
        find_module(model, "zzz", error=HeadError, likely=lambda module: isinstance(module, nn.Conv2d))
    with pytest.raises(LayerError, match="layer Linear is not a module of this model; pass one that is, or its name"):
        find_module(model, nn.Linear(2, 2))
    with pytest.raises(LayerError, match="layer='fc' is a name, but the model is a bare function: pass the module"):
        find_module(None, "fc")
    with pytest.raises(OptionError, match="layer must be a module or its dotted name, got NoneType"):
        find_module(model, None)


# -- the last head -----------------------------------------------------------------------------------------------------


def test_the_last_layer_with_a_matrix_could_be_the_head(small_cnn):
    model = small_cnn()
    assert list(last_layers(model)) == [model.fc]
    alone = nn.Linear(3, 2)
    assert list(last_layers(alone)) == [alone]
    tail = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1))
    assert list(last_layers(tail)) == [tail[1]]
    model.second = nn.Linear(6, 4)
    assert list(last_layers(model)) == [model.second, model.fc]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), "the model has no layer with a matrix of weights, so no head"),
        (nn.Sequential(nn.Linear(3, 2), nn.Conv2d(3, 4, 3)), "a 1x1 convolution without groups, got Conv2d"),
        (nn.Sequential(nn.Linear(3, 2), nn.Conv2d(4, 4, 1, groups=2)), "without groups, got Conv2d"),
        (nn.Sequential(nn.Linear(3, 2), nn.Embedding(5, 3)), "got Embedding; its input features"),
    ],
)
def test_a_last_layer_that_is_no_head_is_refused(model, message):
    with pytest.raises(HeadError, match=message):
        next(last_layers(model))
