"""`PathAttribution`, and Captum's own methods with a gated network as the forward function."""

import pytest
import torch
from captum.attr import (
    DeepLift,
    FeatureAblation,
    GuidedGradCam,
    IntegratedGradients,
    LayerActivation,
    LayerConductance,
    LayerFeatureAblation,
    LayerGradCam,
    LayerIntegratedGradients,
    NoiseTunnel,
)
from shared import SmallCNN, seeded

from captum_classfilters.core.errors import OptionError
from captum_classfilters.decoupling import PathAttribution, PathDecoupler

TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.fixture
def decoupler():
    """About half of the gates open, and not the same for all images."""
    decoupler = PathDecoupler(seeded(SmallCNN(), 3), ["conv1", "conv2"], reduction=1).eval()
    seeded(decoupler.controllers, 2)
    # what Captum's hooks for gradients cannot take
    decoupler.model.relu.inplace = False
    return decoupler


@pytest.fixture
def inputs(images):
    return images() + 2 * torch.randn(6, 3, 1, 1, generator=torch.Generator().manual_seed(2))


def by_hand(decoupler, inputs, gates):
    """Logits with these gates, by the model's own parts; and what `conv2` gave on the way."""
    model, (first, second) = decoupler.model, (gate[..., None, None] for gate in gates)
    maps = model.conv2((model.bn1(model.conv1(inputs)) * first).relu())
    return model.fc((model.bn2(maps) * second).relu().mean((2, 3))), maps


# -- gates as an attribution -------------------------------------------------------------------------------------------


def test_it_is_the_activation_of_the_controllers(decoupler, inputs):
    found = PathAttribution(decoupler).attribute(inputs)
    expected = LayerActivation(decoupler, list(decoupler.controllers)).attribute(inputs)
    assert isinstance(found, tuple)
    assert [gate.shape for gate in found] == [(6, 5), (6, 6)]
    for gate, other in zip(found, expected, strict=True):
        assert torch.equal(gate, other)
        assert set(gate.unique().tolist()) == {0.0, 1.0}
        assert len(gate.unique(dim=0)) > 1
        assert not gate.requires_grad


def test_gates_are_those_of_eval_mode_and_modes_come_back(decoupler, inputs):
    expected = PathAttribution(decoupler).attribute(inputs)
    decoupler.train()
    decoupler.model.bn2.eval()
    modes = [module.training for module in decoupler.modules()]
    state = {name: value.clone() for name, value in decoupler.state_dict().items()}
    found = PathAttribution(torch.nn.DataParallel(decoupler, device_ids=[])).attribute((inputs,))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [module.training for module in decoupler.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in decoupler.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoupler.modules())


def test_logits_are_g_of_eq_2(decoupler, inputs):
    first, second = PathAttribution(decoupler).attribute(inputs, logits=True)
    gates = PathAttribution(decoupler).attribute(inputs)
    assert torch.equal(first > 0, gates[0].bool())
    assert torch.equal(second > 0, gates[1].bool())
    # the first controller reads the images
    squeeze, excite = decoupler.controllers[0].squeeze, decoupler.controllers[0].excite
    expected = (inputs.mean((2, 3)) @ squeeze.weight.T + squeeze.bias).relu() @ excite.weight.T + excite.bias
    torch.testing.assert_close(first, expected.detach())


def test_further_arguments_reach_the_model(inputs):
    class Shifted(SmallCNN):
        def forward(self, images, shift, scale=1.0):
            return super().forward(images * scale + shift)

    decoupler = PathDecoupler(seeded(Shifted(), 0), ["conv1"], reduction=1).eval()
    seeded(decoupler.controllers, 1)
    method = PathAttribution(decoupler)
    (expected,) = method.attribute(2.0 * inputs + 0.5, 0.0, logits=True)
    for further in ((0.5, 2.0), (torch.full((6, 1, 1, 1), 0.5), 2.0)):
        torch.testing.assert_close(method.attribute(inputs, further, logits=True)[0], expected)
    (same,) = method.attribute((2.0 * inputs, torch.tensor(0.5)), logits=True)
    torch.testing.assert_close(same, expected)


def test_under_a_noise_tunnel_it_is_how_often_a_channel_is_open(decoupler, inputs):
    method = PathAttribution(decoupler)
    plain = method.attribute(inputs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        still = NoiseTunnel(method).attribute(inputs, nt_type="smoothgrad", nt_samples=5, stdevs=1e-6)
        noisy = NoiseTunnel(method).attribute(inputs, nt_type="smoothgrad", nt_samples=20, stdevs=3.0)
    for gates, near, far in zip(plain, still, noisy, strict=True):
        torch.testing.assert_close(near, gates)
        assert far.shape == gates.shape
        assert bool(((far >= 0) & (far <= 1)).all())
        assert bool(((far > 0) & (far < 1)).any())
        # means of 20 zeros and ones
        torch.testing.assert_close(far * 20, (far * 20).round(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "bad", [SmallCNN(), None, "decoupler", torch.nn.DataParallel(SmallCNN(), device_ids=[])], ids=str
)
def test_anything_but_a_decoupler_is_refused(bad):
    with pytest.raises(OptionError, match=r"expected a PathDecoupler, got \w+; PathDecoupler\(model\) makes one"):
        PathAttribution(bad)


# -- Captum's methods on the gated network -----------------------------------------------------------------------------


def test_layer_grad_cam_is_that_of_a_hand_computation(decoupler, inputs):
    gates = tuple(gate.detach() for gate in decoupler.gates(inputs)[1])
    logits, maps = by_hand(decoupler, inputs, gates)
    torch.testing.assert_close(decoupler(inputs), logits)
    (slope,) = torch.autograd.grad(logits[range(6), TARGETS].sum(), maps)
    expected = (slope.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True)
    found = LayerGradCam(decoupler, decoupler.model.conv2).attribute(inputs, TARGETS)
    assert found.shape == (6, 1, 4, 4)
    torch.testing.assert_close(found, expected)
    assert float(expected.detach().abs().max()) > 1e-3
    # and it differs from that of the network without gates
    plain = LayerGradCam(decoupler.model, decoupler.model.conv2).attribute(inputs, TARGETS)
    assert not torch.allclose(plain, found, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Setting (forward|backward)", "ignore:Input Tensor .* did not already require")
@pytest.mark.parametrize(("attribute", "shape"), [
    (lambda d, x: LayerIntegratedGradients(d, d.model.conv1).attribute(x, target=TARGETS, n_steps=4), (6, 5, 6, 6)),
    (lambda d, x: LayerConductance(d, d.model.conv2).attribute(x, target=TARGETS, n_steps=4), (6, 6, 4, 4)),
    (lambda d, x: FeatureAblation(d).attribute(x, target=TARGETS, feature_mask=torch.arange(3).view(1, 3, 1, 1)),
     (6, 3, 8, 8)),
    (lambda d, x: DeepLift(d).attribute(x, target=TARGETS), (6, 3, 8, 8)),
    (lambda d, x: GuidedGradCam(d, d.model.conv2).attribute(x, target=TARGETS), (6, 3, 8, 8)),
], ids=["LayerIntegratedGradients", "LayerConductance", "FeatureAblation", "DeepLift", "GuidedGradCam"])  # fmt: skip
def test_captum_s_methods_run_on_a_gated_network(decoupler, inputs, attribute, shape):
    before = decoupler(inputs).detach()
    found = attribute(decoupler, inputs)
    assert found.shape == shape
    assert torch.isfinite(found).all()
    assert float(found.detach().abs().max()) > 0
    # all hooks are gone, Captum's too
    assert torch.equal(decoupler(inputs), before)
    modules = list(decoupler.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


def test_feature_ablation_closes_and_opens_gates_with_the_image(decoupler, inputs):
    mask = torch.arange(3).view(1, 3, 1, 1)
    found = FeatureAblation(decoupler).attribute(inputs, target=TARGETS, feature_mask=mask)
    rows = torch.arange(6)
    for colour in range(3):
        without = inputs.clone()
        without[:, colour] = 0
        expected = decoupler(inputs)[rows, TARGETS] - decoupler(without)[rows, TARGETS]
        torch.testing.assert_close(found[:, colour, 0, 0], expected.detach())


@pytest.mark.parametrize("live", [False, True])
def test_a_channel_that_is_closed_scores_nothing_and_an_open_one_what_it_adds(decoupler, inputs, live):
    gates = tuple(gate.detach() for gate in decoupler.gates(inputs)[1])
    mask = torch.arange(6).view(1, 6, 1, 1)
    method = LayerFeatureAblation(decoupler, decoupler.model.conv2)
    if live:
        found = method.attribute(inputs, target=TARGETS, layer_mask=mask)
    else:
        with decoupler.frozen(gates):
            found = method.attribute(inputs, target=TARGETS, layer_mask=mask)
    scores = found[:, :, 0, 0].detach()
    closed = gates[1] == 0
    assert closed.any()
    assert bool((scores[closed] == 0).all())
    model = decoupler.model
    logits, maps = by_hand(decoupler, inputs, gates)
    for k in range(6):
        without = maps.clone()
        without[:, k] = 0
        rest = model.fc((model.bn2(without) * gates[1][..., None, None]).relu().mean((2, 3)))
        expected = (logits - rest)[range(6), TARGETS]
        torch.testing.assert_close(scores[:, k], expected.detach(), rtol=1e-4, atol=1e-5)
    assert bool((scores[~closed] != 0).any())


@pytest.mark.parametrize("index", range(3))
def test_on_a_frozen_path_integrated_gradients_are_complete(decoupler, inputs, index):
    image, target = inputs[index : index + 1], int(TARGETS[index])
    baseline = torch.zeros_like(image)
    gates = tuple(gate.detach() for gate in decoupler.gates(image)[1])
    with decoupler.frozen(gates):
        change = (decoupler(image) - decoupler(baseline))[0, target].item()
        found, delta = IntegratedGradients(decoupler).attribute(
            image, baseline, target, n_steps=300, return_convergence_delta=True, internal_batch_size=100
        )
        layer, layer_delta = LayerIntegratedGradients(decoupler, decoupler.model.conv1).attribute(
            image, baseline, target, n_steps=300, return_convergence_delta=True
        )
    assert abs(change) > 1e-3
    assert found.sum().item() == pytest.approx(change, abs=0.01 * abs(change))
    assert layer.sum().item() == pytest.approx(change, abs=0.01 * abs(change))
    assert abs(delta.item()) < 0.01 * abs(change)
    assert abs(layer_delta.item()) < 0.01 * abs(change)
    # what it has of a closed channel is nothing
    assert bool((layer[0, gates[0][0] == 0] == 0).all())
    assert bool((layer[0, gates[0][0] == 1] != 0).any())
    # and the path is the image's own outside again
    assert torch.equal(PathAttribution(decoupler).attribute(image)[0], gates[0])
