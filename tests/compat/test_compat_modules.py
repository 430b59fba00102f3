"""Modules and models as PyTorch handles them: copies, files, number formats, layouts, compilation, several devices."""

import copy
import io
import pickle

import pytest
import torch
from captum.attr import LayerGradCam
from gated_models import KINDS, TARGETS, Gated, Net, decoupled, firing, table, tinted
from torch import nn

from captum_classfilters import (
    ALDSplitter,
    DecomposedLinear,
    InfluentialFeatures,
    LabelSensitiveGate,
    LayerGradCamPlusPlus,
    LayerSmoothGradCamPlusPlus,
    PathAttribution,
    decompose,
)


def noise(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def linear():
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.copy_(noise(4, 6))
        layer.bias.copy_(noise(4, seed=1))
    return layer


def sparse(form):
    return lambda: DecomposedLinear.from_linear(linear(), table().mask(2), form)


FORMS_OF_HEADS = ("auto", "csr", "bag", "gather")
# how it is made, and what it is called with
MODULES = {
    "LabelSensitiveGate": (
        lambda: LabelSensitiveGate(4, 6, generator=torch.Generator().manual_seed(0)).eval(), (noise(6, 6), TARGETS),
    ),
    "LabelSensitiveGate.fixed": (
        lambda: LabelSensitiveGate.fixed(4, 6, exclusive=1).eval(), (noise(6, 6), TARGETS),
    ),
    "a network with a gate": (lambda: KINDS["label gate"]().model, (tinted(), TARGETS)),
    "PathDecoupler": (decoupled, (tinted(),)),
    "skipping": (lambda: decoupled().skipping(tinted(), measured=False), (tinted(),)),
    "skipping, measured": (lambda: decoupled().skipping(tinted()), (tinted(),)),
    **{f"DecomposedLinear, {form}": (sparse(form), (noise(6, 6, seed=3),)) for form in FORMS_OF_HEADS},
    "a decomposed network": (lambda: decompose(firing(Net()), table(), 2, backend="bag"), (tinted(),)),
}  # fmt: skip


def emptied(module):
    """Zeros for numbers."""
    for value in [*module.parameters(), *module.buffers()]:
        if value.is_floating_point():
            value.zero_()
    return module


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("name", MODULES)
def test_copies_give_the_same_and_share_nothing(name, copied):
    make, given = MODULES[name]
    module = make()
    with torch.no_grad():
        expected = module(*given)
        twin = copied(module)
        assert type(twin) is type(module)
        assert torch.equal(twin(*given), expected)
        assert [m.training for m in twin.modules()] == [m.training for m in module.modules()]
        emptied(twin)
        assert torch.equal(module(*given), expected)  # nothing is shared
        assert not torch.equal(twin(*given), expected)


@pytest.mark.parametrize("name", MODULES)
def test_state_dicts_are_strict(name):
    make, given = MODULES[name]
    # of the same network: what skips holds no filters that its controllers never open
    with torch.no_grad():
        module, into = make(), emptied(make())
        assert not torch.equal(into(*given), module(*given))
        state = {key: value.clone() for key, value in module.state_dict().items()}
        assert not into.load_state_dict(state, strict=True).missing_keys
        # where clocks chose another way to compute the same, digits differ
        torch.testing.assert_close(into(*given), module(*given), rtol=1e-4, atol=1e-5)
    first = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        into.load_state_dict({key: value for key, value in state.items() if key != first}, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        into.load_state_dict({**state, "one.more": torch.ones(1)}, strict=True)


# -- attributions of a network in another form ------------------------------------------------------------------------

ATTRIBUTIONS = {
    "InfluentialFeatures": lambda model, g: InfluentialFeatures(model, g.plain.fc).attribute(g.inputs, TARGETS),
    "explain": lambda model, g: InfluentialFeatures(model).explain(g.inputs, 1, table(), 2),
    "loader": lambda model, g: InfluentialFeatures(model).attribute([(g.inputs, TARGETS)], selector="contribution")
    .scores,
    "LayerGradCamPlusPlus": lambda model, g: LayerGradCamPlusPlus(model, g.plain.relu2).attribute(g.inputs, TARGETS),
    "LayerSmoothGradCamPlusPlus": lambda model, g: LayerSmoothGradCamPlusPlus(model, g.plain.relu2).attribute(
        g.inputs, TARGETS
    ),
    "ALDSplitter": lambda model, g: ALDSplitter(model).attribute(g.inputs, TARGETS, stage=1, min_size=2),
    "PathAttribution": lambda model, g: PathAttribution(g.model).attribute(g.inputs, logits=True)[1],
}  # fmt: skip


def as_it_is(gated):
    return gated


def bfloat16(gated):
    for module in (gated.model, gated.plain):
        module.bfloat16()
    return gated._replace(inputs=gated.inputs.bfloat16())


def channels_last(gated):
    for module in (gated.model, gated.plain):
        module.to(memory_format=torch.channels_last)
    return gated._replace(inputs=gated.inputs.to(memory_format=torch.channels_last))


FORMS = {  # the change, whether under autocast, the relative error
    "autocast": (as_it_is, True, 0.08),
    "bf16": (bfloat16, False, 0.08),
    "channels_last": (channels_last, False, 1e-4),
}


def close_in_size(found, expected, share):
    size = float(expected.abs().max())
    assert size > 0
    torch.testing.assert_close(found.detach().to(expected.dtype), expected, rtol=0, atol=share * size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ATTRIBUTIONS)
def test_attributions_in_half_precision_and_with_channels_last(real_device, name, form):
    change, autocast, share = FORMS[form]
    gated = KINDS["decoupler"]().to(real_device)
    expected = ATTRIBUTIONS[name](gated.plain, gated).detach()
    gated = change(gated)
    with torch.autocast(real_device, torch.bfloat16, enabled=autocast):
        found = ATTRIBUTIONS[name](gated.plain, gated)
    close_in_size(found, expected, share)
    low = torch.bfloat16 if form != "channels_last" else torch.float32
    # tables are sums in float64, logits of gates are computed in float32
    dtype = {"loader": torch.float64, "PathAttribution": torch.float32}.get(name)
    if dtype or form != "autocast":
        assert found.dtype == (dtype or low)
    else:
        # under autocast the head's weights stay float32
        assert found.dtype in (low, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gated_models_in_half_precision_and_with_channels_last(real_device, kind, form):
    change, autocast, share = FORMS[form]
    gated: Gated = KINDS[kind]().to(real_device)
    with gated.frozen():  # a gate near its threshold may fall otherwise
        expected = gated(gated.inputs).detach()
        heat = LayerGradCam(gated.model, gated.conv).attribute(gated.inputs, **gated.told).detach()
        gated = change(gated)
        with torch.autocast(real_device, torch.bfloat16, enabled=autocast):
            found = gated(gated.inputs)
            again = LayerGradCam(gated.model, gated.conv).attribute(gated.inputs, **gated.told)
    assert found.dtype == (torch.float32 if form == "channels_last" else torch.bfloat16)
    close_in_size(found, expected, share)
    close_in_size(again, heat, 2 * share)


# -- compilation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """Compiles for nothing: what torch traces runs as it was traced; how often it traced is counted."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    yield lambda model: torch.compile(model, backend=backend), graphs
    torch.compiler.reset()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ATTRIBUTIONS)
def test_attributions_of_a_compiled_model(compiler, name, when):
    compiled, graphs = compiler
    gated = KINDS["decoupler"]()
    expected = ATTRIBUTIONS[name](gated.plain, gated)
    model = compiled(gated.plain)
    if when == "before":
        model(gated.inputs)  # code without hooks is there already
        assert graphs
    found = ATTRIBUTIONS[name](model, gated._replace(model=compiled(gated.model)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    model(gated.inputs)
    assert graphs


# a graph that breaks at a check of labels goes on with tensors that are no leaves: torch's own word
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("kind", KINDS)
def test_gated_models_compile(compiler, kind):
    if kind == "decoupler" and not hasattr(torch.compiler, "set_stance"):  # before 2.6
        pytest.skip("older torch cannot compile an autograd function within a hook")
    compiled, graphs = compiler
    gated = KINDS[kind]()
    expected = gated(gated.inputs)
    (slope,) = torch.autograd.grad(expected.sum(), [gated.conv.weight])
    model = compiled(gated.model)
    found = gated._replace(model=model)(gated.inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    (again,) = torch.autograd.grad(found.sum(), [gated.conv.weight])
    torch.testing.assert_close(again, slope, rtol=1e-4, atol=1e-5)
    assert graphs


# -- several devices ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", KINDS)
def test_data_parallel_on_two_devices_gives_what_one_gives(kind):
    gated = KINDS[kind]().to("cuda:0")
    expected = gated(gated.inputs)
    found = gated._replace(model=nn.DataParallel(gated.model, device_ids=[0, 1]))(gated.inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ATTRIBUTIONS)
def test_attributions_of_a_model_on_two_devices(name):
    gated = KINDS["decoupler"]().to("cuda:0")
    expected = ATTRIBUTIONS[name](gated.plain, gated)
    twice = nn.DataParallel(gated.plain, device_ids=[0, 1])
    found = ATTRIBUTIONS[name](twice, gated._replace(model=nn.DataParallel(gated.model, device_ids=[0, 1])))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
