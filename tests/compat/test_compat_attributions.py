"""This package's attributions in the hands of Captum's: noise tunnels, concepts, loaders, metrics, attacks."""

import copy
import pickle

import pytest
import torch
from captum.attr import DataLoaderAttribution, FeatureAblation, LayerAttribution, NoiseTunnel
from captum.concept import TCAV, Classifier, Concept
from captum.metrics import infidelity, sensitivity_max
from captum.robust import FGSM, PGD
from gated_models import KINDS, TARGETS, tinted, without_autograd
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import (
    ALDSplitter,
    InfluentialFeatures,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    PathAttribution,
)

# each of a decoupled network, and what it is told beside images
OURS = {
    "InfluentialFeatures": lambda g: (InfluentialFeatures(g.plain), {"target": TARGETS.tolist()}),
    "PathAttribution": lambda g: (PathAttribution(g.model), {}),
    "LayerGradCamPlusPlus": lambda g: (LayerGradCamPlusPlus(g.model, g.conv), {"target": TARGETS.tolist()}),
    "LayerSmoothGradCamPlusPlus": lambda g: (LayerSmoothGradCamPlusPlus(g.model, g.conv), {"target": TARGETS.tolist()}),
    "ALDSplitter": lambda g: (ALDSplitter(g.plain), {"target": TARGETS.tolist(), "stage": 1, "min_size": 2}),
}

NOT_FAKE = {"ALDSplitter": "a head is split by its values", "LayerSmoothGradCamPlusPlus": "noise is drawn"}
pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require")


def fake(device):
    return device.name == "cuda" and not torch.cuda.is_available()


def needs_values(device, why):
    if fake(device):
        pytest.skip(f"{why}, which fake tensors have not")


def parts(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
@pytest.mark.parametrize("name", OURS)
def test_an_attribution_is_copied_with_its_model(name, copied):
    gated = KINDS["decoupler"]()
    method, told = OURS[name](gated)
    twin = copied(method)
    expected = parts(method.attribute(gated.inputs, **told))
    with torch.no_grad():
        for parameter in gated.model.parameters():  # the copy has its own
            parameter.zero_()
    assert all(map(torch.equal, parts(twin.attribute(gated.inputs, **told)), expected))


# -- noise tunnels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_under_a_noise_tunnel_tiny_noise_is_none_and_much_is_seen(device, assert_close, name):
    if name in NOT_FAKE:
        needs_values(device, NOT_FAKE[name])
    made = KINDS["decoupler"]()
    with device.mode, without_autograd(device), torch.random.fork_rng():
        torch.manual_seed(0)
        gated = made.to(device.name)
        method, told = OURS[name](gated)
        plain = parts(method.attribute(gated.inputs, **told))
        # the smooth one's own noise is that of its batch: of single copies it is the same
        few, many = (1, 1) if "Smooth" in name else (3, 4)
        tunnel = NoiseTunnel(method)
        near = tunnel.attribute(gated.inputs, nt_type="smoothgrad", nt_samples=few, stdevs=1e-6, **told)
        far = tunnel.attribute(gated.inputs, nt_type="smoothgrad", nt_samples=many, stdevs=2.0, **told)
        assert type(near) is type(method.attribute(gated.inputs, **told))
        for one, other, off in zip(parts(near), plain, parts(far), strict=True):
            assert_close(one, other, rtol=1e-3, atol=1e-5)
            assert off.shape == other.shape
            assert fake(device) or not torch.allclose(off, other, rtol=0.01)


# -- concepts ----------------------------------------------------------------------------------------------------------


class Linear(Classifier):
    """Tells two concepts apart; Captum's own draws at random which examples it learns from."""

    def __init__(self):
        self.fitted = LogisticRegression()

    def train_and_eval(self, dataloader, **options):
        rows, known = (torch.cat(each).cpu().numpy() for each in zip(*dataloader, strict=True))
        self.fitted.fit(rows, known)

    def weights(self):
        row = torch.as_tensor(self.fitted.coef_[0], dtype=torch.float32)
        return torch.stack([-row, row])

    def classes(self):
        return self.fitted.classes_.tolist()


# model, layer, whether its input, the method (at first of another layer: TCAV sets its own), further options
BY_CONCEPT = {
    "InfluentialFeatures": lambda g: (g.plain, "fc", True, InfluentialFeatures(g.plain, "conv1"), {}),
    "LayerGradCamPlusPlus": lambda g: (
        g.model, "model.conv2", False, LayerGradCamPlusPlus(g.model, "model.conv1"), {"attr_dim_summation": False},
    ),
    "LayerSmoothGradCamPlusPlus": lambda g: (
        g.model, "model.conv2", False, LayerSmoothGradCamPlusPlus(g.model, "model.conv1"),
        {"attr_dim_summation": False},
    ),
}  # fmt: skip


# Captum 0.8 loads its own concept vectors in a way of which older torch warns
@pytest.mark.filterwarnings("ignore:You are using .torch.load:FutureWarning")
@pytest.mark.parametrize("name", BY_CONCEPT)
def test_tcav_takes_them_for_its_layer_attr_method(real_device, tmp_path, name):
    # PathAttribution has no target, and ALDSplitter gives one map and no channels: neither is a sensitivity
    gated = KINDS["decoupler"]().to(real_device)
    model, layer, to_input, method, options = BY_CONCEPT[name](gated)
    concepts = [
        Concept(label, word, DataLoader((tinted(8, seed=label) + 3 * label).to(real_device), batch_size=4))
        for label, word in enumerate(("dark", "bright"))
    ]
    tcav = TCAV(
        model, layer, classifier=Linear(), layer_attr_method=method, attribute_to_layer_input=to_input,
        save_path=str(tmp_path),
    )  # fmt: skip
    scores = tcav.interpret(gated.inputs, [concepts], target=2, **options)["0-1"][layer]
    expected = method.attribute(gated.inputs, 2, attribute_to_layer_input=to_input, **options).detach()
    assert expected.flatten(1).shape[1] == (6 if to_input else 6 * 4 * 4)
    weights = tcav.cavs["0-1"][layer].stats["weights"].to(expected)
    along = expected.flatten(1) @ weights.T
    torch.testing.assert_close(scores["sign_count"], (along > 0).float().mean(0))
    torch.testing.assert_close(scores["magnitude"], along.mean(0), rtol=1e-4, atol=1e-6)
    assert float(along.abs().max()) > 1e-4


# -- a loader ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_data_loader_attribution_over_gated_models(real_device, kind):
    gated = KINDS[kind]().to(real_device)
    told = (gated.inputs, gated.targets)
    colours = torch.arange(3, device=real_device).view(1, 3, 1, 1).expand(1, 3, 8, 8)

    def of_the_labels(total, output, batch):
        rows = output[torch.arange(len(output)), batch[1]].sum()
        return rows if total is None else total + rows

    # labels are an argument of the one model, and of no other: role 1 or 2
    found = DataLoaderAttribution(FeatureAblation(gated.model)).attribute(
        DataLoader(TensorDataset(*told), batch_size=4),
        input_roles=(0, 2 if gated.extra is None else 1),
        feature_mask=colours,
        reduce=of_the_labels,
        return_input_shape=False,
    )
    for colour in range(3):
        total = 0.0
        for image, label in zip(gated.inputs, gated.targets, strict=True):
            both = image.repeat(2, 1, 1, 1)
            both[1, colour] = 0
            whole, without = (
                gated.model(each[None], *(() if gated.extra is None else (label[None],)))[0, label] for each in both
            )
            total += whole - without
        torch.testing.assert_close(found.flatten()[colour], total.detach(), rtol=1e-3, atol=1e-4)
    assert float(found.abs().min()) > 1e-3


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_infidelity_of_a_map_of_a_gated_model(device, assert_close, kind):
    made = KINDS[kind]()
    with device.mode, without_autograd(device):
        gated = made.to(device.name)
        heat = LayerGradCamPlusPlus(gated.model, gated.conv).attribute(gated.inputs, **gated.told)
        heat = LayerAttribution.interpolate(heat, (8, 8)).expand(6, 3, 8, 8)
        found = infidelity(
            gated.model, lambda x: (0.5 * x, 0.5 * x), gated.inputs, heat, **gated.told, n_perturb_samples=3
        )
        rows = torch.arange(6, device=device.name)
        change = (gated(gated.inputs) - gated(0.5 * gated.inputs))[rows, gated.targets]
        expected = ((0.5 * gated.inputs * heat).sum((1, 2, 3)) - change) ** 2
        assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert float(found.max()) > 1e-3


@pytest.mark.parametrize("name", OURS)
def test_sensitivity_of_every_attribution(device, assert_close, name):
    if name in NOT_FAKE:
        needs_values(device, NOT_FAKE[name])
    made = KINDS["decoupler"]()
    with device.mode, without_autograd(device):
        gated = made.to(device.name)
        method, told = OURS[name](gated)
        step = torch.linspace(-1, 1, 192).reshape(3, 8, 8).to(device.name)

        def explained(images, **options):
            # Captum takes several apart, and one tensor it would take for several: also that of its own layer methods
            return parts(method.attribute(images, **options))

        def asked(radius):
            return sensitivity_max(
                explained, gated.inputs, lambda x, r: x + r * step, radius,
                n_perturb_samples=1, **told,
            )  # fmt: skip

        before, after = (parts(method.attribute(x, **told)) for x in (gated.inputs, gated.inputs + 2.0 * step))
        joined = [torch.cat([each.flatten(1) for each in found], 1) for found in (before, after)]
        length = joined[0].norm(dim=1)
        expected = (joined[1] - joined[0]).norm(dim=1) / torch.where(length == 0, 1.0, length)
        assert_close(asked(2.0), expected, rtol=1e-3, atol=1e-5)
        assert_close(asked(0.0), torch.zeros_like(expected))
        assert float(expected.max()) > 0.01


# -- attacks -----------------------------------------------------------------------------------------------------------

LOSS = nn.CrossEntropyLoss(reduction="none")


def lost(gated, images):
    return LOSS(gated(images), gated.targets).mean().detach()


@pytest.mark.parametrize("kind", KINDS)
def test_fgsm_steps_by_the_sign_of_the_gradient_on_the_path(device, assert_close, kind):
    made = KINDS[kind]()
    with device.mode, without_autograd(device):
        gated = made.to(device.name)
        found = FGSM(gated.model, LOSS, -5.0, 5.0).perturb(gated.inputs, 0.1, gated.targets, gated.extra)
        images = gated.inputs.clone().requires_grad_()
        (slope,) = torch.autograd.grad(LOSS(gated.by_hand(images), gated.targets).sum(), [images])
        # a slope of nothing, to Captum below 1e-6, is no step
        step = torch.where(slope.abs() > 1e-5, slope.sign(), (found - gated.inputs) / 0.1)
        assert_close(found, (gated.inputs + 0.1 * step).clamp(-5.0, 5.0), rtol=0, atol=1e-5)
        assert fake(device) or (slope.abs() > 1e-5).float().mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_pgd_on_a_gated_model_and_on_its_frozen_path(device, assert_close, kind):
    made = KINDS[kind]()
    with device.mode, without_autograd(device):
        gated = made.to(device.name)
        told = (gated.inputs, 0.3, 0.1, 5, gated.targets)
        live = PGD(gated.model, LOSS, -5.0, 5.0).perturb(*told, gated.extra)
        with gated.frozen():
            frozen = PGD(gated.model, LOSS, -5.0, 5.0).perturb(*told, gated.extra)
        assert_close(frozen, PGD(gated.by_hand, LOSS, -5.0, 5.0).perturb(*told), rtol=1e-4, atol=1e-4)
        if fake(device):
            return
        assert float((live - gated.inputs.clamp(-5.0, 5.0)).abs().max()) < 0.3 + 1e-4
        assert float(live.abs().max()) <= 5.0
        assert float(lost(gated, live)) > float(lost(gated, gated.inputs.clamp(-5.0, 5.0))) + 0.01
        # where gates look at the image they change on the way
        assert torch.equal(live, frozen) is (kind != "decoupler")
