"""Numbers that are too large, weights that cannot be read: refused in words, before or instead of a wrong table."""

import warnings

import pytest
import torch
from torch import nn

from captum_classfilters import (
    Control,
    HeadPass,
    InfluentialFeatures,
    LayerGradCamPlusPlus,
    decompose,
    recover,
)
from captum_classfilters.core.errors import DeviceError, HeadError, NonFiniteError, OptionError


def cnn(classes=4):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*trunk, nn.Linear(8, classes)).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(2)]


@pytest.mark.parametrize("selector", ["ablation", "margin", "contribution", "histogram"])
def test_logits_that_overflow_are_refused(selector):
    model = cnn()
    with torch.no_grad():
        model[4].weight.mul_(1e38)
    loader = [(images * 1e3, labels) for images, labels in batches()]
    with pytest.raises(NonFiniteError, match=r"expected finite logits.* in batch 0.*use a wider dtype"):
        InfluentialFeatures(model).attribute(loader, selector=selector)
    wide = InfluentialFeatures(model.double()).attribute(loader, selector=selector)
    assert torch.isfinite(wide.scores).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: InfluentialFeatures(model).attribute(batches()),
        lambda model: HeadPass(model, batches()),
        lambda model: LayerGradCamPlusPlus(model, model[0]).attribute(batches()[0][0], 0),
        lambda model: recover(model, batches(), 1),
    ],
    ids=["attribute", "HeadPass", "CAM", "recover"],
)
def test_a_model_without_weights_is_refused_and_the_remedy_works(call):
    model = cnn().to("meta")
    with pytest.raises(DeviceError, match=r"on the meta device; load them first, model.to_empty"):
        call(model)
    model = model.to_empty(device="cpu")
    model.load_state_dict(cnn().state_dict())
    call(model)


def test_a_quantised_network_is_refused_by_its_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(cnn(), {nn.Linear}, dtype=torch.qint8)
    filters = InfluentialFeatures(cnn()).attribute(batches())
    for call in (
        lambda: InfluentialFeatures(model).attribute(batches()),
        lambda: HeadPass(model, batches(), layer="4").head,
        lambda: decompose(model, filters, 2),
    ):
        with pytest.raises(HeadError, match="quantised, its weights cannot be read; use the network before"):
            call()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_weights_are_read_as_what_they_are():
    model, plain = cnn(), cnn()
    model[4].weight = nn.Parameter(plain[4].weight.detach().to_sparse_csr(), requires_grad=False)
    for selector in ("histogram", "contribution"):
        found, expected = (InfluentialFeatures(m).attribute(batches(), selector=selector) for m in (model, plain))
        torch.testing.assert_close(found.scores, expected.scores)


def test_huge_counts_are_refused_at_once():
    with pytest.raises(OptionError, match=r"draws must be an integer in \[5, 10000\]"):
        Control(10**9)
    with pytest.raises(OptionError, match="k1 must be an integer"):
        InfluentialFeatures(cnn()).attribute(batches(), k1=10**30)
    with pytest.raises(OptionError, match="the head 4 has 4 outputs"):
        InfluentialFeatures(cnn()).attribute(batches(), num_classes=10**30)
