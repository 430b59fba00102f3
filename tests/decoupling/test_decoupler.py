"""`PathDecoupler`: its numbers against the network written out by hand, and what it leaves as it found it."""

import copy
import math
import threading
from collections import OrderedDict

import pytest
import torch
from contract import Snapshot
from torch import nn
from torch.nn import functional as F

from captum_classfilters import PathDecoupler
from captum_classfilters.core.errors import FileFormatError, ShapeError
from captum_classfilters.decoupling import DecouplingOptions


def network(seed=0, device="cpu"):
    """Units: 5 to 6 channels with a norm, 6 to 4 without; C = 3."""
    with torch.device(device):
        model = nn.Sequential(layers())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                spread = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.3
                drawn = torch.randn(value.shape, generator=generator) * spread
                value.copy_(drawn.abs() + 0.5 if name.endswith(("running_var", "bn1.weight")) else drawn)
    return model.eval()


def layers():
    return OrderedDict(
        conv0=nn.Conv2d(3, 5, 3), bn0=nn.BatchNorm2d(5), relu0=nn.ReLU(inplace=True),
        conv1=nn.Conv2d(5, 6, 3), bn1=nn.BatchNorm2d(6), relu1=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(6, 4, 3), relu2=nn.ReLU(),
        conv3=nn.Conv2d(4, 8, 3), bn3=nn.BatchNorm2d(8), relu3=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(8, 3),
    )  # fmt: skip


def decoupled(model, seed=0, reduction=1, **options):
    """With controllers that open half of the channels, others for each image."""
    generator = torch.Generator().manual_seed(seed)
    decoupler = PathDecoupler(model, generator=generator, reduction=reduction, **options)
    with torch.no_grad():
        for controller in decoupler.controllers:
            for layer, size in ((controller.squeeze, 2.0), (controller.excite, 4.0)):
                layer.weight.mul_(size)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return decoupler


def images(count=6, seed=1, size=12):
    """Each of another mean colour: gates see means."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator) + torch.randn(count, 3, 1, 1, generator=generator)


LABELS = torch.tensor([0, 1, 2, 0, 2, 1])


def by_hand(decoupler, x, gates=None):
    """Output, gates and responses before masking, written out in eval mode; gates are reckoned from plain matrices."""
    found, responses, m = [], [], decoupler.model

    def gate(index, maps):
        if gates is None:
            squeeze, excite = decoupler.controllers[index].squeeze, decoupler.controllers[index].excite
            hidden = (maps.sum((2, 3)) / maps[0, 0].numel()) @ squeeze.weight.T + squeeze.bias
            found.append((((hidden * (hidden > 0)) @ excite.weight.T + excite.bias) > 0).to(maps.dtype))
        else:
            found.append(gates[index])
        return found[-1][:, :, None, None]

    def masked(index, maps, response):
        responses.append(F.relu(response).sum((2, 3)) / response[0, 0].numel())
        return F.relu(response * gate(index, maps))

    maps = F.relu(m.bn0(m.conv0(x)))
    maps = masked(0, maps, m.bn1(m.conv1(maps)))
    maps = masked(1, maps, m.conv2(maps))
    return m.fc(F.relu(m.bn3(m.conv3(maps))).mean((2, 3))), tuple(found), responses


def moved(module, device, dtype):
    """``module.to``, where torch refuses to move parameters: on a fake device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(parameter.detach().to(device, dtype)))
    return module


# -- what it gives -----------------------------------------------------------------------------------------------------


def test_output_and_gates_are_those_of_the_network_by_hand(device, assert_close, monkeypatch):
    if device.name == "cuda" and not torch.cuda.is_available():
        monkeypatch.setattr(nn.Module, "to", moved)
    with device.mode:
        decoupler, x = decoupled(network(device=device.name)), images().to(device.name)
        output, gates = decoupler.gates(x)
        expected, by_name, _ = by_hand(decoupler, x)
        assert_close(output, expected)
        assert_close(decoupler(x), expected)
        for gate, other, value in zip(gates, by_name, decoupler.gate_logits(x)[1], strict=True):
            assert_close(gate, other, rtol=0, atol=0)
            assert_close((value > 0).float(), other, rtol=0, atol=0)
        if device.name == "cpu":
            assert set(torch.cat(gates, 1).unique().tolist()) == {0.0, 1.0}
            assert all(len(gate.unique(dim=0)) > 1 for gate in gates)
            assert not torch.allclose(output, decoupler.model(x))


def test_in_train_mode_gates_are_noisy_and_the_model_s_modes_are_its_own():
    model = network().train()
    model.bn0.eval()
    decoupler = decoupled(model)
    assert [module.training for module in (decoupler, decoupler.controllers, decoupler.controllers[0])] == [True] * 3
    assert (model.bn0.training, model.bn1.training) == (False, True)
    before = model.bn0.running_mean.clone(), model.bn1.running_mean.clone()
    torch.manual_seed(0)
    first, second = decoupler.gates(images())[1], decoupler.gates(images())[1]
    assert not torch.equal(first[0], second[0])
    assert ((first[0] > 0) & (first[0] < 1)).any()
    assert torch.equal(model.bn0.running_mean, before[0])
    assert not torch.equal(model.bn1.running_mean, before[1])
    assert not PathDecoupler(network()).training


def test_all_is_named_and_drawn_from_the_generator():
    decoupler, again = decoupled(network(), 7, reduction=3), decoupled(network(), 7, reduction=3)
    assert (decoupler.layers, decoupler.channels) == (("conv1", "conv2"), (6, 4))
    assert [controller.squeeze.out_features for controller in decoupler.controllers] == [1, 2]
    assert [(reader.in_features, reader.out_features) for reader in decoupler.readers] == [(6, 3), (4, 3)]
    for name, value in decoupler.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert PathDecoupler(nn.Sequential(*list(network())[:-1]), num_classes=5).readers[0].out_features == 5


def test_a_channel_whose_g_is_zero_is_closed():
    decoupler = decoupled(network())
    nn.init.zeros_(decoupler.controllers[1].excite.weight)
    with torch.no_grad():
        decoupler.controllers[1].excite.bias.copy_(torch.tensor([0.0, 1e-9, -1e-9, 1.0]))
    assert decoupler.gates(images(2))[1][1].tolist() == [[0.0, 1.0, 0.0, 1.0]] * 2


# -- the loss ----------------------------------------------------------------------------------------------------------


def eq_12(logits, gates, responses, weights, labels, *, rate, direction):
    """The parts of eq. 12, sample by sample and in float64."""
    rows = [[0.0, 0.0, 0.0, 0.0] for _ in gates]
    logits, count = logits.double().tolist(), len(labels)

    def minus_log(values, index):
        return math.log(sum(math.exp(value) for value in values)) - values[index]

    cross_entropy = sum(minus_log(row, label) for row, label in zip(logits, labels.tolist(), strict=True)) / count
    for row, z, y, weight in zip(rows, gates, responses, weights, strict=True):
        for n, label in enumerate(labels.tolist()):
            zn, yn = z[n].double().tolist(), y[n].double().tolist()
            read = [sum(w * v for w, v in zip(line, zn, strict=True)) for line in weight.double().tolist()]
            first, second = (zn, yn) if direction == "z_y" else (yn, zn)
            row[0] += minus_log(read, label) / count
            for k in range(len(zn)):
                divergence = minus_log(second, k) - minus_log(first, k)
                row[1] += math.exp(-minus_log(first, k)) * divergence / count
            row[2] += abs(sum(zn) - rate * len(zn)) / count
            row[3] += sum(value > 0.5 for value in zn) / len(zn) / count
    return cross_entropy, rows


@pytest.mark.parametrize("mode", ["eval", "train sample", "train channel", "train element"])
@pytest.mark.parametrize(("direction", "rate"), [("z_y", 0.0), ("y_z", 0.6)])
def test_the_loss_is_eq_12_of_what_ran(mode, direction, rate):
    decoupler = decoupled(network().double(), mix=mode.rpartition(" ")[2] if mode != "eval" else "sample")
    decoupler.train(mode != "eval")
    x, seen, handles = images().double(), {}, []
    noted = {"0": decoupler.controllers[0], "1": decoupler.controllers[1], "bn1": decoupler.model.bn1}
    for name, module in {**noted, "conv2": decoupler.model.conv2, "logits": decoupler.model}.items():
        note = lambda module, args, output, name=name: seen.update({name: output.detach().clone()})  # noqa: E731
        handles.append(module.register_forward_hook(note))
    torch.manual_seed(3)
    found = decoupler.loss(
        x, LABELS,
        DecouplingOptions.paper(
            information=0.5, divergence=2.0, sparsity=0.1, target_rate=rate, direction=direction,
        ),
    )  # fmt: skip
    for handle in handles:
        handle.remove()
    gates, responses = (seen["0"], seen["1"]), [F.relu(seen[name]).mean((2, 3)) for name in ("bn1", "conv2")]
    if mode == "eval":
        logits, gates, responses = by_hand(decoupler, x)
        torch.testing.assert_close(logits, seen["logits"])
    weights = [reader.weight.detach() for reader in decoupler.readers]
    cross_entropy, rows = eq_12(seen["logits"], gates, responses, weights, LABELS, rate=rate, direction=direction)
    sums = [sum(column) for column in zip(*rows, strict=True)]
    table = torch.tensor(rows, dtype=torch.float64)
    close = pytest.approx
    assert found.total.dtype == torch.float64
    assert found.cross_entropy.item() == close(cross_entropy, rel=1e-9)
    assert (found.mutual_information.item(), found.divergence.item()) == (close(sums[0]), close(sums[1]))
    assert found.sparsity.item() == close(sums[2], rel=1e-9)
    torch.testing.assert_close(found.per_layer, table, rtol=1e-9, atol=1e-9)
    assert found.mean_mutual_information.item() == close(sums[0] / 2)
    assert found.total.item() == close(cross_entropy + 0.5 * sums[0] + 2.0 * sums[1] + 0.1 * sums[2], rel=1e-9)
    assert found.total.requires_grad
    assert not found.per_layer.requires_grad


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("budget", ["network", "layer"])
@pytest.mark.parametrize("taught", [True, False])
def test_the_loss_is_that_of_its_options(taught, budget):
    options = DecouplingOptions(0.5, 2.0, 0.1, 0.4, depth=2.0, budget=budget, distillation=0.7, temperature=3.0)
    decoupler, x, teacher = decoupled(network().double()).eval(), images().double(), noise(len(LABELS), 3).double()
    found = decoupler.loss(x, LABELS, options, teacher=teacher if taught else None)
    with torch.no_grad():
        logits, gates, responses = by_hand(decoupler, x)
    weights = [reader.weight.detach() for reader in decoupler.readers]
    entropy, rows = eq_12(logits, gates, responses, weights, LABELS, rate=0.4, direction="z_y")
    # layers 1 and 2 of 2: 1/4 and 1 of 5/4
    information, divergence = 0.2 * rows[0][0] + 0.8 * rows[1][0], (rows[0][1] + rows[1][1]) / 2
    counts = torch.cat(list(gates), 1).sum(1) - 0.4 * sum(gate.shape[1] for gate in gates)
    sparsity = float(counts.abs().mean()) if budget == "network" else rows[0][2] + rows[1][2]
    p, q = (teacher / 3).softmax(1), (logits / 3).softmax(1)
    distillation = float((p * (p.log() - q.log())).sum(1).mean()) * 9 if taught else 0.0
    fit = 0.3 * entropy + 0.7 * distillation if taught else entropy
    close = pytest.approx
    assert found.sparsity.item() == close(sparsity, rel=1e-9)
    assert found.distillation.item() == close(distillation, rel=1e-9)
    assert found.total.item() == close(fit + 0.5 * information + 2.0 * divergence + 0.1 * sparsity, rel=1e-9)


def test_a_teacher_is_learnt_from_and_gets_no_gradient():
    decoupler = decoupled(network()).train()
    teacher = noise(len(LABELS), 3).requires_grad_(True)
    decoupler.loss(images(), LABELS, teacher=teacher).total.backward()
    assert teacher.grad is None
    assert decoupler.model.fc.weight.grad.any()


def test_annealing_ends_with_the_gates_of_eval_mode():
    decoupler = decoupled(network())
    seen = []
    for progress in (0.0, 0.35, 0.6, 0.7, 1.0):
        decoupler.anneal_(progress)
        seen.append([(round(c.noise, 3), round(c.hard, 3)) for c in decoupler.controllers])
    expected = [(1.0, 0.5), (0.5, 0.5), (round(1 - 6 / 7, 3), 0.75), (0.0, 0.875), (0.0, 1.0)]
    assert seen == [[pair] * len(decoupler.controllers) for pair in expected]
    decoupler.controllers.train()
    _, trained = decoupler.gates(images())
    _, used = decoupler.eval().gates(images())
    # batch norm is in train mode in one of them: the first layer's controller reads the same input
    assert torch.equal(trained[0], used[0])


def test_the_gradient_reaches_controllers_readers_and_model():
    decoupler = decoupled(network()).train()
    torch.manual_seed(0)
    decoupler.loss(images(), LABELS).total.backward()
    for name, parameter in decoupler.named_parameters():
        without_effect = name.startswith("model.conv") and name.endswith("bias")  # before a batch norm
        assert parameter.grad is not None and (parameter.grad.any() or without_effect), name  # noqa: PT018


def test_training_lowers_the_loss():
    decoupler, x = decoupled(network()).train(), images(24)
    labels = torch.arange(24) % 3
    x = x + labels[:, None, None, None]
    optimizer = torch.optim.Adam(decoupler.parameters(), 0.02)
    torch.manual_seed(0)
    before = decoupler.eval().loss(x, labels)
    for _ in range(25):
        optimizer.zero_grad()
        decoupler.train().loss(x, labels).total.backward()
        optimizer.step()
    after = decoupler.eval().loss(x, labels)
    assert after.total < 0.8 * before.total
    assert after.mutual_information < before.mutual_information


# -- borrowed and given back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_the_model_stays_what_it_was(train, grad):
    model = network().train(train)
    model.bn0.eval()
    model.conv2.requires_grad_(False)
    model.fc.register_forward_hook(lambda *_: None)
    x = images()
    with torch.set_grad_enabled(grad), torch.random.fork_rng():
        before, buffers = Snapshot.of(model), copy.deepcopy(dict(model.named_buffers()))
        decoupler = decoupled(model)
        calls = [decoupler, decoupler.gates, decoupler.gate_logits, lambda x: decoupler.loss(x, LABELS)]
        for call in calls:
            call(x)
        with decoupler.frozen(decoupler.gates(x)[1]):
            decoupler(x)
        decoupler.paths([x, x])
        decoupler.costs(x[:1])
        assert decoupler.model is model
        if train:  # batch norms count, as they would without gates
            model.load_state_dict(buffers, strict=False)
        torch.set_rng_state(torch.tensor(before.torch["random state"], dtype=torch.uint8))
        Snapshot.of(model).assert_same(before)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["forward", "gates", "gate_logits", "loss", "frozen"])
def test_an_error_in_the_model_leaves_no_hook(call, error):
    decoupler, x = decoupled(network()), images()
    expected = decoupler(x)

    def broken(module, args):
        raise error

    handle = decoupler.model.conv3.register_forward_pre_hook(broken)
    before = Snapshot.of(decoupler.model)
    with pytest.raises(error):  # noqa: PT012
        if call == "frozen":
            with decoupler.frozen((torch.zeros(1, 6), torch.zeros(1, 4))):
                decoupler(x)
        getattr(decoupler, call)(*(x, LABELS) if call == "loss" else (x,))
    Snapshot.of(decoupler.model).assert_same(before)
    handle.remove()
    assert torch.equal(decoupler(x), expected)


def test_nothing_of_a_call_stays():
    decoupler, x = decoupled(network()).train(), images()

    def everything():
        return {name: {key: id(value) for key, value in vars(module).items()}
                for name, module in decoupler.named_modules()}  # fmt: skip

    before = everything()
    decoupler.loss(x, LABELS)
    decoupler.gates(x)
    decoupler(x)
    assert everything() == before


def test_a_deep_copy_gives_the_same_and_is_another():
    decoupler, x = decoupled(network()), images()
    again, expected = copy.deepcopy(decoupler), decoupler(x)
    assert torch.equal(again(x), expected)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert torch.equal(decoupler(x), expected)
    assert not again(x).any()


def test_threads_that_meet_in_the_middle_of_a_forward_do_not_mix_their_gates():
    model, meeting = network(), threading.Barrier(2, timeout=20)
    decoupler, found = decoupled(model), {}
    inputs = {seed: images(4, seed) for seed in (11, 12)}
    expected = {seed: decoupler(x) for seed, x in inputs.items()}
    handle = model.relu1.register_forward_pre_hook(lambda *_: (meeting.wait(), None)[1])

    def work(seed):
        found[seed] = []
        for turn in range(20):
            found[seed].append(decoupler(inputs[seed]) if turn % 2 else decoupler.gates(inputs[seed])[0])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for seed, outputs in found.items():
        assert len(outputs) == 20
        assert all(torch.equal(output, expected[seed]) for output in outputs)


def test_a_forward_of_another_decoupler_of_the_same_model_may_run_inside():
    model, x, others = network(), images(), images(seed=2)
    outer, inner = decoupled(model, 1), decoupled(model, 2)
    expected, other = outer(x), inner(others)
    assert not torch.allclose(expected, outer(others))
    seen = []

    def inside(*_):
        handle.remove()
        seen.append(inner(others))

    # between the reckoning of gates and their use
    handle = model.bn1.register_forward_pre_hook(inside)
    assert torch.equal(outer(x), expected)
    assert torch.equal(seen[0], other)


# -- controllers in states and files -----------------------------------------------------------------------------------


def test_controllers_go_into_a_state_and_back():
    decoupler, model, x = decoupled(network(), 1), network(), images()
    state, keys = decoupler.controllers_state_dict(), list(model.state_dict())
    assert [name for name in decoupler.state_dict() if not name.startswith("model.")] == list(state)
    assert {name.partition(".")[0] for name in state} == {"controllers", "readers"}
    again = decoupled(model, 2)
    assert not torch.equal(again(x), decoupler(x))
    again.load_controllers_state_dict(state)
    assert torch.equal(again.loss(x, LABELS).total, decoupler.loss(x, LABELS).total)
    assert list(model.state_dict()) == keys == list(decoupler.model.state_dict())


def test_saved_and_loaded(tmp_path):
    decoupler, x = decoupled(network(), 1), images()
    decoupler.save(tmp_path / "paths.safetensors")
    again = decoupled(network(), 2)
    assert again.load(tmp_path / "paths.safetensors") is again
    assert torch.equal(again.loss(x, LABELS).total, decoupler.loss(x, LABELS).total)
    message = "holds controllers of 2 layers from conv1 to conv2; this decoupler gates 1 layers.*with the same layers="
    with pytest.raises(FileFormatError, match=message):
        decoupled(network(), layers=["conv1"]).load(tmp_path / "paths.safetensors")
    with pytest.raises(ShapeError, match=r"controllers.0.squeeze.weight must have shape \(2, 5\), got \(5, 5\)"):
        decoupled(network(), reduction=2).load(tmp_path / "paths.safetensors")


LAST = "readers.1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(LAST), f"the state has no {LAST}; expected what controllers_state_dict"),
        (lambda s: s.update(more=s[LAST]), "the state holds more, which this decoupler has not; it is of other layers"),
        (lambda s: s.update({LAST: s[LAST].T}), rf"{LAST} must have shape \(3, 4\), got \(4, 3\); the state is of ano"),
        (lambda s: s.update({"model.fc.bias": s[LAST]}), "the state holds model.fc.bias"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    decoupler = decoupled(network(), 1)
    state = decoupled(network(), 2).controllers_state_dict()
    change(state)
    before = copy.deepcopy(decoupler.state_dict())
    with pytest.raises(ShapeError, match=message):
        decoupler.load_controllers_state_dict(state)
    for name, value in decoupler.state_dict().items():
        assert torch.equal(value, before[name]), name
