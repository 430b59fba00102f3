"""`PathDecoupler.straight_through`: the same hard gates, with the gradient of soft ones."""

import copy
import threading

import pytest
import torch
from shared import Passing
from test_decoupler import LABELS, by_hand, decoupled, images, network
from test_decoupler_frozen import rows

from captum_classfilters.core.errors import HardGatesWarning, OptionError

WEIGHTS = torch.tensor([1.0, -2.0, 0.5])


def straight_by_hand(decoupler, x):
    """Output and gates of the network written out, with the gates of `Passing`."""
    gates, m = [], decoupler.model

    def gated(index, maps, response):
        squeeze, excite = decoupler.controllers[index].squeeze, decoupler.controllers[index].excite
        hidden = torch.relu(maps.mean((2, 3)) @ squeeze.weight.T + squeeze.bias)
        gates.append(Passing.apply(hidden @ excite.weight.T + excite.bias))
        return torch.relu(response * gates[-1][:, :, None, None])

    maps = torch.relu(m.bn0(m.conv0(x)))
    maps = gated(0, maps, m.bn1(m.conv1(maps)))
    maps = gated(1, maps, m.conv2(maps))
    return m.fc(torch.relu(m.bn3(m.conv3(maps))).mean((2, 3))), gates


def gradient(output, x):
    return torch.autograd.grad((output * WEIGHTS.to(output)).sum(), x)[0]


def setting(dtype=torch.float64):
    """Some of the gates are so sure that clamping ends their gradient, and some are not."""
    decoupler, x = decoupled(network().to(dtype)), images().to(dtype).requires_grad_()
    g = torch.cat(decoupler.gate_logits(x)[1], 1)
    ends = torch.tensor(11.0).log()  # where 1.2 sigmoid(g) - 0.1 is 1
    assert 0 < (g.abs() < ends).double().mean() < 1
    return decoupler, x


def same(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_outputs_and_gates_are_bit_for_bit_the_same():
    decoupler, x = setting(torch.float32)
    output, gates = decoupler.gates(x)
    _, logits = decoupler.gate_logits(x)
    with decoupler.straight_through():
        found, others = decoupler.gates(x)
        same((found, decoupler(x), *others), (output, output, *gates))
        same(decoupler.gate_logits(x)[1], logits)
        assert set(torch.cat(others, 1).unique().tolist()) == {0.0, 1.0}
        assert all(gate.dtype == other.dtype for gate, other in zip(gates, others, strict=True))
        with torch.no_grad():
            same(decoupler.gates(x)[1], gates)
        assert torch.equal(decoupler.paths(x.detach()).bits(), torch.cat(gates, 1).bool())


def test_gradients_are_those_of_soft_gates():
    decoupler, x = setting()
    expected, by_name = straight_by_hand(decoupler, x)
    with decoupler.straight_through():
        output, gates = decoupler.gates(x)
    same(gates, by_name)
    torch.testing.assert_close(output, expected)
    found = gradient(output, x)
    torch.testing.assert_close(found, gradient(expected, x))
    # outside, gates are constants: another gradient, that of the frozen path
    outside = gradient(decoupler(x), x)
    assert (found - outside).abs().max() > 1e-3 * outside.abs().max()
    torch.testing.assert_close(outside, gradient(by_hand(decoupler, x, [gate.detach() for gate in gates])[0], x))


def test_gates_themselves_have_a_gradient_to_images_and_to_controllers():
    decoupler, x = setting()
    last = decoupler.controllers[1].excite.weight
    with decoupler.straight_through():
        open_ones = sum(gate.sum() for gate in decoupler.gates(x)[1])
    expected = sum(gate.sum() for gate in straight_by_hand(decoupler, x)[1])
    for found, other in zip(
        torch.autograd.grad(open_ones, (x, last)), torch.autograd.grad(expected, (x, last)), strict=True
    ):
        torch.testing.assert_close(found, other)
        assert found.abs().sum() > 0


def test_gates_and_logits_are_of_one_forward_and_belong_together():
    decoupler, x = setting()
    expected = decoupler.gates(x), decoupler.gate_logits(x)
    for straight in (False, True):
        calls = []
        handle = decoupler.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if straight:
            with decoupler.straight_through():
                output, gates, logits = decoupler.gates_and_logits(x)
        else:
            output, gates, logits = decoupler.gates_and_logits(x)
        handle.remove()
        assert calls == [1]
        assert torch.equal(output, expected[0][0])
        same(gates, expected[0][1])
        same(logits, expected[1][1])
        same(gates, [(value > 0).double() for value in logits])
    with decoupler.frozen(gates), pytest.raises(OptionError, match="have no logits"):
        decoupler.gates_and_logits(x)


def test_it_is_of_one_decoupler_and_a_copy_is_another():
    decoupler, x = setting()
    other = decoupled(decoupler.model, 0)
    twin = copy.deepcopy(decoupler)
    outside = gradient(decoupler(x), x)
    with decoupler.straight_through():
        inside = gradient(decoupler(x), x)
        torch.testing.assert_close(gradient(other(x), x), outside)
        torch.testing.assert_close(gradient(twin(x), x), outside)
        torch.testing.assert_close(gradient(copy.deepcopy(decoupler)(x), x), outside)
        with other.straight_through():
            torch.testing.assert_close(gradient(other(x), x), inside)
            torch.testing.assert_close(gradient(decoupler(x), x), inside)
        torch.testing.assert_close(gradient(other(x), x), outside)
        with decoupler.straight_through():
            pass
        # the outer one still holds
        torch.testing.assert_close(gradient(decoupler(x), x), inside)
    torch.testing.assert_close(gradient(decoupler(x), x), outside)


@pytest.mark.parametrize("outer", ["frozen", "straight through"])
def test_frozen_gates_win(outer):
    decoupler, x = setting()
    frozen = tuple(gate.double() for gate in rows(6))
    expected = by_hand(decoupler, x, frozen)[0]
    first, second = decoupler.frozen(frozen), decoupler.straight_through()
    if outer == "straight through":
        first, second = second, first
    with first, second:
        output, gates = decoupler.gates(x)
    same(gates, frozen)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradient(output, x), gradient(expected, x))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_it_ends_with_an_error(error):
    decoupler, x = setting()
    outside = gradient(decoupler(x), x)
    with pytest.raises(error), decoupler.straight_through():
        raise error
    assert torch.equal(gradient(decoupler(x), x), outside)


def test_it_does_not_hold_in_another_thread():
    decoupler, x = setting()
    outside, found = gradient(decoupler(x), x), []
    with decoupler.straight_through():
        thread = threading.Thread(target=lambda: found.append(gradient(decoupler(x), x)))
        thread.start()
        thread.join()
        assert not torch.allclose(gradient(decoupler(x), x), outside)
    torch.testing.assert_close(found[0], outside)


def test_in_train_mode_it_changes_nothing():
    decoupler, x = setting()
    decoupler.train()
    torch.manual_seed(0)
    expected = decoupler.loss(x, LABELS).total
    torch.manual_seed(0)
    with decoupler.straight_through():
        found = decoupler.loss(x, LABELS).total
    torch.manual_seed(0)
    _, gates = decoupler.gates(x)
    assert torch.equal(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, x)[0] for each in (found, expected)), rtol=0, atol=0)
    # noisy and half of them soft
    assert ((gates[0] > 0) & (gates[0] < 1)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_gates_are_still_exactly_hard(dtype):
    decoupler, x = decoupled(network().to(dtype)), images().to(dtype)
    output, gates = decoupler.gates(x)
    with decoupler.straight_through():
        same((decoupler(x), *decoupler.gates(x)[1]), (output, *gates))


def test_what_is_not_finite_still_shows():
    decoupler, x = setting()
    broken = x.detach().clone()
    broken[2] = torch.inf
    with decoupler.straight_through():
        _, gates = decoupler.gates(broken)
    assert [bool(gate[2].isnan().all()) for gate in gates] == [True, True]
    assert torch.isfinite(gates[0][[0, 1, 3]]).all()


def test_a_hook_on_a_controller_sees_the_gates_there_too():
    decoupler, x = setting()
    seen = []
    hook = decoupler.controllers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with decoupler.straight_through():
        _, gates = decoupler.gates(x)
    hook.remove()
    same(seen, gates[:1])


def test_a_loss_has_gradients_there_and_does_not_warn_that_it_has_none(recwarn):
    decoupler, x = setting(torch.float32)
    labels = torch.zeros(len(x), dtype=torch.int64)
    with decoupler.straight_through():
        decoupler.loss(x, labels).total.backward()
    assert decoupler.controllers[0].excite.weight.grad.any()
    assert not [warning for warning in recwarn if warning.category is HardGatesWarning]


def test_paths_of_images_that_have_gradients_are_read():
    decoupler, x = setting()
    assert x.requires_grad
    same((decoupler.paths(x).bits(),), (decoupler.paths(x.detach()).bits(),))
