"""Captum's own methods on gated models: the same as on that network written by hand, and complete on a frozen path."""

import pytest
import torch
from captum.attr import (
    DeepLift,
    FeatureAblation,
    GuidedBackprop,
    GuidedGradCam,
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerFeatureAblation,
    LayerGradCam,
    LayerIntegratedGradients,
)
from gated_models import KINDS, hook_counts, without_autograd

from captum_classfilters import InfluentialFeatures, PathAttribution

CHANNELS = torch.arange(6).view(1, 6, 1, 1)
COLOURS = torch.arange(3).view(1, 3, 1, 1)
STEPS = {"n_steps": 100, "return_convergence_delta": True}

METHODS = {
    "LayerGradCam": lambda m, conv, x, told: LayerGradCam(m, conv).attribute(x, **told),
    "LayerConductance": lambda m, conv, x, told: LayerConductance(m, conv).attribute(x, **told, **STEPS),
    "LayerIntegratedGradients": lambda m, conv, x, told: LayerIntegratedGradients(m, conv).attribute(
        x, **told, **STEPS
    ),
    "LayerFeatureAblation": lambda m, conv, x, told: LayerFeatureAblation(m, conv).attribute(
        x, **told, layer_mask=CHANNELS.to(x.device)
    ),
    "FeatureAblation": lambda m, conv, x, told: FeatureAblation(m).attribute(
        x, **told, feature_mask=COLOURS.to(x.device)
    ),
    "DeepLift": lambda m, conv, x, told: DeepLift(m).attribute(x, **told, return_convergence_delta=True),
    "LayerDeepLift": lambda m, conv, x, told: LayerDeepLift(m, conv).attribute(
        x, **told, return_convergence_delta=True
    ),
    "GuidedBackprop": lambda m, conv, x, told: GuidedBackprop(m).attribute(x, **told),
    "GuidedGradCam": lambda m, conv, x, told: GuidedGradCam(m, conv).attribute(x, **told),
}
# what these two have of the change of the output is exact; the integrals are sums of steps
TOLERANCE = {"DeepLift": 1e-4, "LayerDeepLift": 1e-4, "LayerConductance": 0.02, "LayerIntegratedGradients": 0.02}

# where Captum itself asks a tensor for its values, which a fake one has not: where in a list a layer's outputs lie, and
# which features a mask has
NOT_FAKE = {"LayerIntegratedGradients", "LayerFeatureAblation", "FeatureAblation"}


def able(device, method):
    if method in NOT_FAKE and device.name == "cuda" and not torch.cuda.is_available():
        pytest.skip("Captum reads values here, which fake tensors have not")


pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting (forward|backward)", "ignore:Input Tensor .* did not already require"
)


def split(found):
    return found if isinstance(found, tuple) else (found, None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_model_is_attributed_like_the_network_by_hand(device, assert_close, kind, method):
    able(device, method)
    made = KINDS[kind]()
    with device.mode, without_autograd(device):
        gated = made.to(device.name)
        run, convs = METHODS[method], {"found": gated.conv, "expected": gated.by_hand.net.conv2}
        with gated.frozen():
            output = gated(gated.inputs)
            hooks = hook_counts(gated.model)
            found, delta = split(run(gated.model, convs["found"], gated.inputs, gated.told))
            assert hook_counts(gated.model) == hooks
        expected, _ = split(run(gated.by_hand, convs["expected"], gated.inputs, gated.told))
        size = float(expected.detach().abs().max())
        assert size > 0
        assert_close(found, expected, rtol=1e-3, atol=1e-4 * size)
        if isinstance(found, torch._subclasses.FakeTensor):
            return
        plain, _ = split(run(gated.plain, gated.plain.conv2, gated.inputs, {"target": gated.targets}))
        assert not torch.allclose(plain, found, rtol=0.01, atol=0.01 * size)  # the gates do something
        if delta is not None:
            blank = torch.zeros_like(gated.inputs)
            with gated.frozen():
                start = gated(blank)
            rows = torch.arange(6)
            change = (output - start)[rows, gated.targets].detach()
            assert float(change.abs().max()) > 0.1
            assert bool((delta.abs() < TOLERANCE[method] * change.abs().max()).all()), delta
            torch.testing.assert_close(found.detach().flatten(1).sum(1) - change, delta.detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["LayerConductance", "LayerIntegratedGradients", "LayerFeatureAblation"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_channel_scores_exactly_nothing(device, kind, method):
    able(device, method)
    made = KINDS[kind]()
    with device.mode, without_autograd(device):
        gated = made.to(device.name)
        with gated.frozen():
            found, _ = split(METHODS[method](gated.model, gated.conv, gated.inputs, gated.told))
        assert found.shape == (6, 6, 4, 4)
        assert found.device.type == device.name
        if isinstance(found, torch._subclasses.FakeTensor):
            return
        size = found.detach().abs().amax((2, 3))
        assert 0 < int(gated.closed.sum()) < 36
        assert bool((size[gated.closed] == 0).all())
        assert bool((size[~gated.closed] > 0).sum() > 5)


@pytest.mark.parametrize("method", METHODS)
def test_with_live_gates_they_run_too(device, method):
    able(device, method)
    # at a black image other gates are open, so nothing is complete there; ablations count what gates then do
    made = KINDS["decoupler"]()
    with device.mode, without_autograd(device):
        gated = made.to(device.name)
        found, _ = split(METHODS[method](gated.model, gated.conv, gated.inputs, gated.told))
        assert found.device.type == device.name
        assert torch.isfinite(found).all()
        assert float(found.detach().abs().max()) > 0
        with gated.frozen():
            frozen, _ = split(METHODS[method](gated.model, gated.conv, gated.inputs, gated.told))
        if not isinstance(found, torch._subclasses.FakeTensor):
            # those that never leave the image, or ablate behind the last gates, see its own path
            same = method in ("LayerGradCam", "LayerFeatureAblation", "GuidedBackprop", "GuidedGradCam")
            assert torch.allclose(found, frozen, rtol=1e-4, atol=1e-6) is same


def test_layer_activation_is_path_attribution(device, assert_close):
    made = KINDS["decoupler"]()
    with device.mode:
        gated = made.to(device.name)
        found = PathAttribution(gated.model).attribute(gated.inputs)
        expected = LayerActivation(gated.model, list(gated.model.controllers)).attribute(gated.inputs)
        assert isinstance(found, tuple)
        for gate, other, channels in zip(found, expected, (5, 6), strict=True):
            assert gate.shape == (6, channels)
            assert_close(gate, other, rtol=0, atol=0)


def test_layer_activation_of_a_label_gate_is_one_tensor(device, assert_close):
    made = KINDS["label gate"]()
    with device.mode:
        gated = made.to(device.name)
        found = LayerActivation(gated.model, gated.model.gate).attribute(gated.inputs, gated.extra)
        rows = gated.model.gate.weight[gated.targets][..., None, None]
        assert_close(found, (gated.model.maps(gated.inputs) * rows).detach(), rtol=0, atol=0)


def test_layer_activation_of_a_head_is_influential_features(device, assert_close):
    made = KINDS["decoupler"]()
    with device.mode:
        net, inputs = (gated := made.to(device.name)).plain, gated.inputs
        features = LayerActivation(net, net.fc).attribute(inputs, attribute_to_layer_input=True)
        found = InfluentialFeatures(net).attribute(inputs, target=2)
        assert_close(found, (features * net.fc.weight[2]).detach(), rtol=1e-5, atol=1e-6)
