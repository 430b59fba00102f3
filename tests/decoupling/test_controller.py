"""Controllers: gates by the paper's formulas in plain loops, their noise and gradient, and half precision."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch._subclasses import FakeTensor
from torch.autograd import gradcheck, gradgradcheck

from captum_classfilters.decoupling.controller import (
    MIXES,
    Controller,
    hard_gates,
    pooled,
    random_hard,
    saturating_sigmoid,
    semantic_hash,
)

SHAPES = [(3, 5, 4), (3, 5, 4, 2), (3, 5, 2, 3, 2)]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def controller_of(inputs=5, outputs=7, seed=0, **options):
    controller = Controller(inputs, outputs, **options)
    controller.reset(torch.Generator().manual_seed(seed))
    return controller


def soft_value(x):
    """Eq. 4, of one number."""
    sigmoid = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    return min(1.0, max(0.0, 1.2 * sigmoid - 0.1))


def logits_by_loop(controller, features):
    """Eq. 2 for each image, in float64."""
    rows = []
    for image in features.double():
        s = [sum(channel.flatten().tolist()) / channel.numel() for channel in image]
        for layer, activate in ((controller.squeeze, True), (controller.excite, False)):
            weight, bias = layer.weight.double().tolist(), layer.bias.double().tolist()
            s = [sum(w * v for w, v in zip(row, s, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
            s = [max(0.0, v) for v in s] if activate else s
        rows.append(s)
    return torch.tensor(rows, dtype=torch.float64)


# -- eqs. 3 to 5 -------------------------------------------------------------------------------------------------------


def test_the_saturating_sigmoid_is_eq_4_and_reaches_both_ends():
    values = torch.cat([drawn(200, seed=1, dtype=torch.float64) * 3, torch.tensor([-800.0, -2.5, 0.0, 2.5, 800.0])])
    expected = torch.tensor([soft_value(x) for x in values.tolist()], dtype=torch.float64)
    torch.testing.assert_close(saturating_sigmoid(values), expected)
    assert saturating_sigmoid(torch.tensor([-2.5, 2.5])).tolist() == [0.0, 1.0]
    assert saturating_sigmoid(torch.tensor([-2.3, 2.3])).tolist() not in ([0.0, 1.0], [0.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize("shape", [(6, 4), (6, 1), (1, 4)], ids=["element", "sample", "channel"])
def test_hashed_gates_are_those_of_a_plain_loop(shape):
    logits, noise = drawn(6, 4, seed=2, dtype=torch.float64) * 2, drawn(6, 4, seed=3, dtype=torch.float64)
    binary = drawn(*shape, seed=4) > 0
    assert 0 < int(binary.sum()) < binary.numel()
    found = semantic_hash(logits, noise, binary)
    for n in range(6):
        for k in range(4):
            x = float(logits[n, k]) + float(noise[n, k])
            expected = float(x > 0) if binary.expand(6, 4)[n, k] else soft_value(x)
            assert found[n, k].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_hard_gates_are_eq_5_and_zero_is_closed():
    logits = torch.tensor([[-2.0, -1e-30, -0.0, 0.0, 1e-30, 3.0]])
    assert hard_gates(logits).tolist() == [[0.0, 0.0, 0.0, 0.0, 1.0, 1.0]]
    assert semantic_hash(logits, torch.zeros_like(logits), torch.tensor(True)).tolist() == hard_gates(logits).tolist()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert hard_gates(logits.to(dtype)).dtype == dtype


@pytest.mark.parametrize("seed", range(3))
def test_hard_values_are_exactly_zero_or_one(seed):
    # their value is put together from the soft one and a difference: rounding must not show
    logits = drawn(64, 50, seed=seed)
    gates = semantic_hash(logits, drawn(64, 50, seed=seed + 10) * 0.1, torch.tensor(True))
    assert set(gates.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_make_gates_that_are_not(bad):
    logits = torch.tensor([[1.0, bad, -1.0]])
    for gates in (hard_gates(logits), controller_of(outputs=3).eval().gates(logits)):
        assert gates[0, [0, 2]].tolist() == [1.0, 0.0]
        assert math.isnan(gates[0, 1])
    if math.isnan(bad):
        trained = semantic_hash(logits, torch.zeros_like(logits), torch.tensor([[True], [False]]).expand(2, 3))
        assert trained.isnan().tolist() == [[False, True, False]] * 2


# -- the gradient ------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_soft_value_at_hard_positions_too():
    # all inside of [-2.3, 2.3], where eq. 4 is smooth, but for one on either side that is saturated
    logits = (torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 3
    logits[0, 0], logits[1, 1] = 4.0, -4.0
    noise = drawn(5, 4, seed=1, dtype=torch.float64) * 0.1
    upstream = drawn(5, 4, seed=2, dtype=torch.float64)
    binary = torch.tensor([[True], [True], [False], [False], [True]])
    logits.requires_grad_(True)
    semantic_hash(logits, noise, binary).backward(upstream)
    step = 1e-6
    for n in range(5):
        for k in range(4):
            x = logits[n, k].item() + noise[n, k].item()
            slope = (soft_value(x + step) - soft_value(x - step)) / (2 * step)
            assert logits.grad[n, k].item() == pytest.approx(slope * upstream[n, k].item(), rel=1e-6, abs=1e-9)
    assert logits.grad[0, 0] == 0
    assert logits.grad[1, 1] == 0
    assert int((logits.grad != 0).sum()) == 18


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_pooling_and_of_logits_are_those_of_finite_differences(shape):
    features = drawn(*shape, seed=3, dtype=torch.float64).requires_grad_(True)
    assert gradcheck(lambda f: pooled(f, torch.float64), (features,))
    assert gradgradcheck(lambda f: pooled(f, torch.float64) ** 2, (features,))
    controller = controller_of(reduction=1).double()
    # finite differences change parameters where they stand
    assert gradcheck(lambda *_: controller.logits(features), (features, *controller.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gradient_of_pooling_has_the_features_dtype_and_layout_does_not_matter(dtype):
    features = drawn(2, 3, 4, 4, seed=1).to(dtype)
    expected = (torch.tensor([[1.0, 2.0, 4.0]] * 2) / 16)[..., None, None].expand(2, 3, 4, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = features.clone(memory_format=layout).requires_grad_(True)
        (pooled(leaf, torch.float32) * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.float(), expected)


# -- which are hard ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_exactly_half_of_the_samples_or_channels_is_hard(count):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(5):
            samples, channels = (
                random_hard(torch.zeros(count, 5), "sample"),
                random_hard(torch.zeros(5, count), "channel"),
            )
            assert (samples.shape, channels.shape) == ((count, 1), (1, count))
            assert (int(samples.sum()), int(channels.sum())) == (math.ceil(count / 2), math.ceil(count / 2))


def test_every_sample_channel_and_gate_is_hard_half_of_the_time():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for mix in MIXES:
            share = torch.stack([random_hard(torch.zeros(8, 6), mix).expand(8, 6) for _ in range(600)]).float().mean(0)
            # 600 throws of a coin deviate by .02; five times as much for 48 of them
            assert float((share - 0.5).abs().max()) < 0.1
        elements = random_hard(torch.zeros(100, 100), "element")
        assert elements.shape == (100, 100)
        assert abs(float(elements.float().mean()) - 0.5) < 0.025
        assert len(elements.sum(0).unique()) > 10


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 2), (0.3, 3), (1.0, 7)])
def test_another_share_is_hard(share, expected):
    assert int(random_hard(torch.zeros(7, 5), "sample", share).sum()) == expected
    assert int(random_hard(torch.zeros(5, 7), "channel", share).sum()) == expected
    elements = random_hard(torch.zeros(200, 200), "element", share)
    assert float(elements.float().mean()) == pytest.approx(share, abs=0.02)


def test_a_controller_without_noise_whose_gates_are_all_hard_trains_with_those_of_eval_mode():
    controller = Controller(3, 5)
    controller.reset(torch.Generator().manual_seed(0))
    features = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 3
    expected = controller.eval()(features)
    controller.train()
    assert not torch.equal(controller(features), expected)
    controller.noise, controller.hard = 0.0, 1.0
    found = controller(features)
    assert torch.equal(found, expected)
    assert found.requires_grad


# -- noise -------------------------------------------------------------------------------------------------------------


def test_in_training_gates_come_from_fresh_noise_and_from_the_seed_alone():
    controller, logits = controller_of(outputs=40).train(), drawn(30, 40, seed=5)

    def gates(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return controller.gates(logits), controller.gates(logits)

    first, second = gates(0)
    assert not torch.equal(first, second)
    torch.testing.assert_close(torch.stack(gates(0)), torch.stack((first, second)), rtol=0, atol=0)
    assert not torch.equal(gates(1)[0], first)
    hard = ((first == 0) | (first == 1)).all(1)
    assert int(hard.sum()) == 15
    assert bool(((first >= 0) & (first <= 1)).all())


@pytest.mark.parametrize("logit", [-1.5, 0.0, 0.7])
def test_noise_is_standard_normal(logit):
    controller = controller_of(outputs=100, mix="channel").train()
    logits = torch.full((400, 100), logit)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        gates = controller.gates(logits)
    hard = ((gates == 0) | (gates == 1)).all(0)
    assert int(hard.sum()) == 50
    # P(g + alpha > 0) = Phi(g), and the expectation of eq. 4; 20,000 draws each
    assert float(gates[:, hard].mean()) == pytest.approx(norm.cdf(logit), abs=0.015)
    mean, _ = quad(lambda a: soft_value(logit + a) * norm.pdf(a), -9, 9)
    square, _ = quad(lambda a: soft_value(logit + a) ** 2 * norm.pdf(a), -9, 9)
    assert float(gates[:, ~hard].mean()) == pytest.approx(mean, abs=0.012)
    assert float(gates[:, ~hard].square().mean()) == pytest.approx(square, abs=0.012)


# -- the module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", [1, 2, 4, 99])
def test_logits_are_eq_2_for_maps_of_any_dimension(shape, reduction):
    controller = controller_of(reduction=reduction)
    assert controller.squeeze.out_features == {1: 5, 2: 2, 4: 1, 99: 1}[reduction]
    features = drawn(*shape, seed=6)
    found = controller.logits(features)
    torch.testing.assert_close(found.double(), logits_by_loop(controller, features), rtol=1e-5, atol=1e-5)
    doubled = controller.logits(features.double())
    assert doubled.dtype == torch.float64
    torch.testing.assert_close(doubled, logits_by_loop(controller, features), rtol=1e-12, atol=1e-12)


def test_in_eval_mode_gates_are_the_signs_of_logits_and_draw_nothing():
    controller, features = controller_of(8, 30).eval(), drawn(20, 8, 3, 3, seed=7)
    before = torch.get_rng_state()
    gates = controller(features).detach()
    assert torch.equal(torch.get_rng_state(), before)
    expected = (logits_by_loop(controller, features) > 0).float()
    assert torch.equal(gates, expected)
    assert 0.2 < float(gates.mean()) < 1
    assert not torch.equal(controller.train()(features), expected)


def test_it_begins_with_he_s_weights_and_mostly_open():
    controller = controller_of(400, 300, seed=3, reduction=2)
    assert controller.squeeze.bias.unique().tolist() == [0.0]
    assert controller.excite.bias.unique().tolist() == [1.0]
    for layer, inputs in ((controller.squeeze, 400), (controller.excite, 200)):
        assert float(layer.weight.detach().mean()) == pytest.approx(0, abs=0.003)
        assert float(layer.weight.detach().var()) == pytest.approx(2 / inputs, rel=0.05)
    again = controller_of(400, 300, seed=3, reduction=2)
    assert all(torch.equal(a, b) for a, b in zip(controller.parameters(), again.parameters(), strict=True))
    assert not torch.equal(controller_of(400, 300, seed=4, reduction=2).squeeze.weight, again.squeeze.weight)
    assert float(controller.eval()(drawn(10, 400, 2, 2).relu() * 0.5).detach().mean()) > 0.7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_summed_in_float32(dtype):
    controller = controller_of().eval()
    # the sum, 409,600, is more than float16 holds
    features = torch.full((2, 5, 64, 64), 100.0, dtype=dtype)
    features[1] = -100.0
    found = controller.logits(features)
    assert found.dtype == torch.float32
    expected = logits_by_loop(controller, features.float()[:, :, :1, :1])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    # features on a fine grid around 1, which a half-precision mean would round away
    fine = (1 + drawn(2, 5, 8, 8).abs()).to(dtype)
    torch.testing.assert_close(controller.logits(fine).double(), logits_by_loop(controller, fine), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(controller(features)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_controllers_in_half_precision_compute_in_float32_as_well(dtype):
    controller, features = controller_of().to(dtype), drawn(4, 5, 3, 3, seed=8).to(dtype)
    found = controller.logits(features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), logits_by_loop(controller, features), rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing():
    controller, features = controller_of(), drawn(4, 5, 3, 3, seed=9)
    expected = controller.logits(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.linear(features, torch.ones(2, 3)).dtype == torch.bfloat16
        found = controller.logits(features)
        gates = controller.eval()(features)
    assert torch.equal(found, expected)
    assert torch.equal(gates, hard_gates(expected))


def test_it_works_where_its_features_are(device, assert_close):
    with device.mode:
        with torch.device(device.name):
            controller = Controller(5, 7)
        source = controller_of()
        with torch.no_grad():
            for mine, other in zip(controller.parameters(), source.parameters(), strict=True):
                mine.copy_(other)
        features = drawn(4, 5, 3, 3, seed=9).to(device.name).requires_grad_(True)
        for mix in MIXES:
            controller.mix = mix
            gates = controller.train()(features)
            assert (gates.shape, gates.device.type) == ((4, 7), device.name)
        if not isinstance(gates, FakeTensor):  # backward asks for a real device
            gates.sum().backward()
            assert features.grad.device.type == device.name
        expected = hard_gates(source.logits(drawn(4, 5, 3, 3, seed=9))).to(device.name)
        assert_close(controller.eval()(features).detach(), expected.detach())
