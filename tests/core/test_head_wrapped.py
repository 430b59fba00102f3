"""Heads at other precisions, in other memory formats, and inside wrappers."""

import pytest
import torch
from reading import Tail, read
from torch import nn

from captum_classfilters import InfluentialFeatures
from captum_classfilters.core.errors import HeadError


def test_device(device, small_cnn, images, assert_close):
    with device.mode:
        model, inputs = small_cnn(device=device.name), images().to(device.name)
        batch = read(model, inputs, need_maps=True)
        assert batch.head.feature_map.layout.name == "NCHW"
        with torch.no_grad():
            assert_close(batch.features, model.penultimate(inputs))
            assert_close(batch.features @ batch.head.weight.T + batch.head.bias, model(inputs))
        assert batch.maps.device.type == device.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype, small_cnn, images):
    model = small_cnn().to(dtype)
    batch = read(model, images(), need_maps=True)
    assert {batch.features.dtype, batch.logits.dtype, batch.head.weight.dtype, batch.maps.dtype} == {dtype}
    assert (batch.head.name, batch.head.feature_map.name) == ("fc", "relu")
    torch.testing.assert_close(batch.features, model.penultimate(images().to(dtype)).detach())


def test_autocast(small_cnn, images):
    model = small_cnn()
    with torch.autocast("cpu", torch.bfloat16):
        batch = read(model, images())
    assert (batch.head.name, batch.head.feature_map.name) == ("fc", "relu")
    assert batch.logits.dtype == torch.bfloat16
    torch.testing.assert_close(batch.features.float(), model.penultimate(images()).detach(), rtol=5e-2, atol=5e-2)


def test_autocast_with_logits_back_in_float32(small_cnn, images):
    with torch.autocast("cpu", torch.bfloat16):
        assert read(Tail(small_cnn(), lambda z: z.float()), images()).head.name == "model.fc"


def test_inference_mode(small_cnn, images):
    model, inputs = small_cnn(), images()
    with torch.inference_mode():
        assert read(model, inputs).head.name == "fc"
        with pytest.raises(HeadError, match="an activation stands between"):
            read(Tail(model, torch.relu_), inputs)


def test_channels_last(small_cnn, images):
    model = small_cnn()
    plain = read(model, images(), need_maps=True)
    batch = read(
        model.to(memory_format=torch.channels_last),
        images().to(memory_format=torch.channels_last),
        need_maps=True,
    )
    assert batch.head.feature_map == plain.head.feature_map
    torch.testing.assert_close(batch.maps, plain.maps)


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "a compiled part": lambda model: Tail(torch.compile(model, backend="eager"), nn.Identity()),
    "model.compile": lambda model: model.compile(backend="eager") or model,
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "ran before"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper, ran_before, small_cnn, images):
    model = small_cnn()
    expected = read(model, images(), need_maps=True)
    wrapped = WRAPPERS[wrapper](model)
    if ran_before:
        # a compiled forward that has been traced in the same modes calls no new hook
        with torch.no_grad():
            wrapped(images())
    batch = read(wrapped, images(), need_maps=True)
    assert batch.head.module is model.fc
    torch.testing.assert_close(batch.features, expected.features)
    torch.testing.assert_close(batch.maps, expected.maps)


def test_the_method_takes_them_all(small_cnn, images):
    """From the front door: the same table through every wrapper."""
    loader = [(images(8), torch.arange(8) % 4)]
    expected = InfluentialFeatures(small_cnn()).attribute(loader)
    for wrap in WRAPPERS.values():
        found = InfluentialFeatures(wrap(small_cnn())).attribute(loader)
        assert torch.equal(found.scores, expected.scores)
