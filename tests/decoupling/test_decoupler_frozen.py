"""Frozen paths of a `PathDecoupler`, attributions on them, and number formats."""

import pytest
import torch
from captum.attr import IntegratedGradients
from test_decoupler import LABELS, by_hand, decoupled, images, network
from torch import nn

from captum_classfilters import PathDecoupler
from captum_classfilters.core.errors import ShapeError
from captum_classfilters.decoupling import DecouplingOptions


def rows(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 2, (count, channels), generator=generator).float() for channels in (6, 4))


# -- frozen gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_frozen_gates_are_taken_row_by_row_and_repeated_as_a_whole(count):
    decoupler, x, frozen = decoupled(network()), images(6), rows(count)
    live = decoupler(x)
    repeated = tuple(torch.cat([gate] * (6 // count)) for gate in frozen)
    expected = by_hand(decoupler, x, repeated)[0]
    with decoupler.frozen(frozen):
        output, gates = decoupler.gates(x)
        torch.testing.assert_close(output, expected)
        assert torch.equal(decoupler(x), output)
        assert all(torch.equal(gate, other) for gate, other in zip(gates, repeated, strict=True))
        loss = decoupler.loss(x, LABELS, DecouplingOptions.paper())
        torch.testing.assert_close(loss.sparsity, sum(gate.sum(1).mean() for gate in repeated))
    assert torch.equal(decoupler(x), live)
    assert not torch.allclose(live, expected)


def test_the_gates_of_an_image_frozen_are_its_own_path():
    decoupler, x = decoupled(network()), images()
    output, gates = decoupler.gates(x)
    with decoupler.frozen(gates):
        assert torch.equal(decoupler(x), output)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (rows(1)[:1], "expected gates for 2 layers, got 1; see decoupler.layers"),
        ((rows(1)[0], rows(1)[0]), r"gates of conv2 must have shape \(N, 4\), got \(1, 6\)"),
        ((rows(1)[0][0], rows(1)[1]), r"gates of conv1 must have shape \(N, 6\), got \(6,\)"),
        ((torch.ones(0, 6), rows(1)[1]), r"gates of conv1 must have shape \(N, 6\), got \(0, 6\)"),
        (rows(4), r"the frozen gates of conv1 are of 4 images, and 6 came; freeze their own"),
        ((rows(3)[0], rows(4)[1]), r"the frozen gates of conv2 are of 4 images, and 6 came; freeze their own"),
    ],
)
def test_frozen_gates_that_do_not_fit_are_refused(gates, message):
    decoupler, x = decoupled(network()), images()
    expected = decoupler(x)
    with pytest.raises(ShapeError, match=message), decoupler.frozen(gates):
        decoupler(x)
    assert torch.equal(decoupler(x), expected)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_frozen_gates_leave_on_an_error(error):
    decoupler, x = decoupled(network()), images()
    expected = decoupler(x)
    with pytest.raises(error), decoupler.frozen(rows(1)):
        raise error
    assert torch.equal(decoupler(x), expected)


def test_frozen_gates_are_of_one_decoupler_and_the_inner_ones_hold():
    model, x = network(), images()
    one, other = decoupled(model, 1), decoupled(model, 2)
    free = other(x)
    with one.frozen(rows(1)):
        assert torch.equal(other(x), free)
        outer = one(x)
        with one.frozen(rows(1, seed=6)):
            assert not torch.equal(one(x), outer)
        assert torch.equal(one(x), outer)


# -- attributions ------------------------------------------------------------------------------------------------------


def test_integrated_gradients_on_a_frozen_path_are_complete_and_those_of_the_masked_network():
    decoupler, x = decoupled(network().double()), images(1).double()
    _, gates = decoupler.gates(x)

    def masked(values):
        rows = tuple(gate.expand(len(values), -1) for gate in gates)
        return by_hand(decoupler, values, rows)[0]

    with decoupler.frozen(gates):
        found, delta = IntegratedGradients(decoupler).attribute(x, target=1, n_steps=200, return_convergence_delta=True)
        span = decoupler(x)[0, 1] - decoupler(torch.zeros_like(x))[0, 1]
    expected = IntegratedGradients(masked).attribute(x, target=1, n_steps=200)
    torch.testing.assert_close(found, expected)
    assert found.abs().sum() > 0
    assert delta.abs().item() < 0.01 * span.abs().item()


def test_integrated_gradients_of_several_images_take_each_its_path():
    decoupler, x, gates = decoupled(network().double()), images(3).double(), rows(3)
    with decoupler.frozen(gates):
        together = IntegratedGradients(decoupler).attribute(x, target=1, n_steps=10)
    for index in range(3):
        with decoupler.frozen(tuple(gate[index : index + 1] for gate in gates)):
            alone = IntegratedGradients(decoupler).attribute(x[index : index + 1], target=1, n_steps=10)
        torch.testing.assert_close(together[index : index + 1], alone)


def test_with_live_gates_a_delta_comes_out_too():
    # on the way from a black image gates close and open: completeness is not to be had, and nothing claims it
    decoupler, x = decoupled(network().double()), images(2).double()
    _, delta = IntegratedGradients(decoupler).attribute(x, target=1, n_steps=50, return_convergence_delta=True)
    assert delta.shape == (2,)
    assert torch.isfinite(delta).all()


# -- number formats and layouts ----------------------------------------------------------------------------------------


def gates_of_what_came(decoupler, x):
    """Output, gates, and g of eq. 2 from each convolution's input as it came, in float64."""
    came, handles = [], []
    for name in decoupler.layers:
        conv = decoupler.model.get_submodule(name)
        handles.append(conv.register_forward_pre_hook(lambda module, args: came.append(args[0].detach())))
    output, gates = decoupler.gates(x)
    for handle in handles:
        handle.remove()
    expected = []
    for maps, controller in zip(came, decoupler.controllers, strict=True):
        squeeze, excite = controller.squeeze, controller.excite
        hidden = (maps.double().mean((2, 3)) @ squeeze.weight.double().T + squeeze.bias.double()).relu()
        expected.append(hidden @ excite.weight.double().T + excite.bias.double())
    return output, gates, expected


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "half"])
def test_in_half_precision_gates_are_computed_in_float32(how):
    model, x = network(), images()
    if how != "autocast":
        model, x = model.to(getattr(torch, how)), x.to(getattr(torch, how))
    decoupler = decoupled(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output, gates, expected = gates_of_what_came(decoupler, x)
        _, logits = decoupler.gate_logits(x)
        loss = decoupler.loss(x, LABELS, DecouplingOptions.paper())
    assert output.dtype == (torch.float16 if how == "half" else torch.bfloat16)
    for gate, value, other in zip(gates, logits, expected, strict=True):
        assert gate.dtype == value.dtype == torch.float32
        torch.testing.assert_close(value.double(), other, rtol=1e-4, atol=1e-4)
        assert torch.equal(gate, (other > 0).float())
    assert torch.isfinite(output).all()
    assert loss.total.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in decoupler.controllers.parameters())
    torch.testing.assert_close(
        output.float(), by_hand(decoupled(network()), images(), gates)[0], rtol=0.1, atol=0.1
    )  # bfloat16 has eight bits


def test_channels_last_stays_channels_last():
    decoupler, x, seen = decoupled(network()), images(), []
    expected = decoupler(x)
    decoupler.model.to(memory_format=torch.channels_last)
    for name in ("relu1", "relu2"):
        module = decoupler.model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = decoupler(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)
    assert [maps.is_contiguous(memory_format=torch.channels_last) for maps in seen] == [True, True]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients_it_is_the_same(mode):
    decoupler, x = decoupled(network()), images()
    expected, gates = decoupler.gates(x)
    with mode():
        found, others = decoupler.gates(x)
        assert torch.equal(decoupler.loss(x, LABELS).total, decoupler.loss(x, LABELS).total)
    assert torch.equal(found, expected)
    assert all(torch.equal(gate, other) for gate, other in zip(gates, others, strict=True))
    assert not found.requires_grad
    assert expected.requires_grad


def test_no_images_are_no_error():
    assert decoupled(network())(images(0)).shape == (0, 3)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(nn.DataParallel(model)), nn.DataParallel])
def test_wrappers_are_taken_off(wrap):
    model, x = network(), images()
    decoupler = PathDecoupler(wrap(model), generator=torch.Generator().manual_seed(0))
    assert decoupler.model is model
    assert torch.equal(decoupler(x), PathDecoupler(model, generator=torch.Generator().manual_seed(0))(x))
