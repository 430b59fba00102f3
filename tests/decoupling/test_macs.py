"""MACs of a path: torch's counter on networks really built of the open channels alone, and what flows as zeros."""

import copy
import json

import pytest
import torch
from shared import seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from captum_classfilters.assets.networks import SmallInception, SmallResNet
from captum_classfilters.core.calls import calls_of
from captum_classfilters.core.errors import OptionError
from captum_classfilters.decoupling import Costs, PathDecoupler
from captum_classfilters.decoupling.costs import evaluate, open_inputs
from captum_classfilters.decoupling.path_measures import l1_gates


class Separable(nn.Module):
    """Pointwise, depthwise and grouped convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.wide = nn.Sequential(nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.grouped = nn.Sequential(nn.Conv2d(12, 8, 3, groups=2), nn.SiLU())
        self.last = nn.Conv2d(8, 9, (1, 3))
        self.fc = nn.Linear(9, 4)

    def forward(self, images):
        return self.fc(self.last(self.grouped(self.deep(self.wide(self.stem(images))))).mean((2, 3)))


class Branching(nn.Module):
    """Cannot be traced: which way it goes depends on values."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 4), (4, 6), (6, 5), (5, 4)))
        self.fc = nn.Linear(4, 3)

    def forward(self, images):
        maps = self.convs[1](self.convs[0](images).relu()).relu_()
        if maps.sum() > -1e9:
            maps = self.convs[2](maps)
        return self.fc(self.convs[3](maps).mean((2, 3)))


NETWORKS = {
    "residual sums": lambda: SmallResNet(8, 5, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), widths=(5, 6, 7)),
    "longer residual sums": lambda: SmallResNet(14, 5, (0.0,) * 3, (1.0,) * 3, widths=(4, 5, 6)),
    "concatenation": lambda: SmallInception(
        5, (0.0,) * 3, (1.0,) * 3, widths=[[(2, 3, 4, 2, 3, 2), (3, 2, 3, 2, 2, 3)], [(3, 3, 2, 2, 3, 2)]], stem=6
    ),
    "depthwise": Separable,
    "not traceable": Branching,
}


@pytest.fixture(params=NETWORKS)
def decoupler(request):
    """Random weights and controllers, so that about half of the channels are open.

    Leaky in the place of ReLU, so that a channel is zero over a whole image for no other reason than its gate.
    """
    model = NETWORKS[request.param]()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.ReLU6):
                setattr(module, name, nn.LeakyReLU(0.3))
    example = torch.zeros(1, 3, 12, 12) if isinstance(model, Branching) else None
    decoupler = PathDecoupler(seeded(model, 0), reduction=1, example_input=example).eval()
    seeded(decoupler.controllers, 1)
    return decoupler.requires_grad_(False)


def pictures(count=4, size=12):
    generator = torch.Generator().manual_seed(3)
    tints = 2 * torch.randn(count, 3, 1, 1, generator=generator)
    return torch.randn(count, 3, size, size, generator=generator) + tints


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def watched(decoupler, image):
    """A run of the masked network: logits, gates, and for each convolution which inputs are not zero all over."""
    found, handles = {}, []

    def hook(name):
        return lambda _, args, output: found.update({name: (args[0].abs().amax((0, 2, 3)) > 0, output.shape)})

    for name, module in decoupler.model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(hook(name)))
    output, gates = decoupler.gates(image)
    for handle in handles:
        handle.remove()
    return output, [gate[0] > 0 for gate in gates], found


class Rebuilt(nn.Module):
    """A convolution really built of the open channels alone, in parts where it has groups; closed outputs become 0."""

    def __init__(self, conv, inputs, outputs, shape):
        super().__init__()
        self.shape, self.bias = shape, conv.bias
        self.parts, self.takes, self.gives = nn.ModuleList(), [], []
        for group in range(conv.groups):
            into, out = (
                torch.arange(count).chunk(conv.groups)[group] for count in (conv.in_channels, conv.out_channels)
            )
            weight = conv.weight[out][outputs[out]][:, inputs[into]]
            if weight.numel():
                part = nn.Conv2d(weight.shape[1], len(weight), conv.kernel_size, conv.stride, conv.padding, bias=False)
                part.weight = nn.Parameter(weight)
                self.parts.append(part)
                self.takes.append(into[inputs[into]])
                self.gives.append(out[outputs[out]])

    def forward(self, maps):
        result = torch.zeros(self.shape)
        for part, takes, gives in zip(self.parts, self.takes, self.gives, strict=True):
            result[:, gives] = part(maps[:, takes])
        return result if self.bias is None else result + self.bias[:, None, None]


def rebuilt(decoupler, gates, seen):
    """The network with those convolutions; behind each gated one, the norm's constant is closed by hand."""
    model = copy.deepcopy(decoupler.model)
    gate_of = {unit.conv: gate for unit, gate in zip(decoupler.units, gates, strict=True)}
    for unit, gate in zip(decoupler.units, gates, strict=True):
        site = model.get_submodule(unit.site)
        closing = Closing(site, gate)
        put(model, unit.site, closing)
    for name, (inputs, shape) in seen.items():
        conv = decoupler.model.get_submodule(name)
        outputs = gate_of.get(name, torch.ones(conv.out_channels, dtype=torch.bool))
        place = model.get_submodule(name)
        new = Rebuilt(conv, inputs, outputs, shape)
        if isinstance(place, Closing):
            place.inner = new
        else:
            put(model, name, new)
    return model


def put(model, name, module):
    """``model.set_submodule``, which torch 2.4 has not."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class Closing(nn.Module):
    def __init__(self, inner, gate):
        super().__init__()
        self.inner, self.gate = inner, gate

    def forward(self, maps):
        return self.inner(maps) * self.gate[:, None, None]


# -- against networks that are really built ----------------------------------------------------------------------------


def test_the_macs_of_a_path_are_those_of_a_network_built_of_it(decoupler):
    images = pictures()
    costs = decoupler.costs(images[:1])
    gates = tuple(gate > 0 for gate in decoupler.gates(images)[1])
    share = torch.cat(gates, 1).float().mean()
    assert 0.2 < share < 0.9
    counted = costs.of(gates, controllers=False)
    assert (counted.shape, counted.dtype) == ((4,), torch.int64)
    assert len(counted.unique()) > 1
    for image, count in zip(images, counted.tolist(), strict=True):
        logits, own, seen = watched(decoupler, image[None])
        small = rebuilt(decoupler, own, seen)
        torch.testing.assert_close(small(image[None]), logits, rtol=1e-4, atol=1e-4)
        assert flops(lambda small=small, image=image: small(image[None])) == 2 * count
    assert torch.equal(costs.of(gates), counted + costs.controllers)


def test_closed_inputs_are_those_that_are_zero(decoupler):
    images = pictures()
    costs = decoupler.costs(images[:1])
    assert [conv.name for conv in costs.convs] == [
        name for name, module in decoupler.model.named_modules() if isinstance(module, nn.Conv2d)
    ]
    closed = 0
    for image in images:
        _, gates, seen = watched(decoupler, image[None])
        for conv in costs.convs:
            claimed = evaluate(conv.inputs, [gate[None] for gate in gates])[0]
            assert torch.equal(claimed, seen[conv.name][0]), conv.name
            closed += int((~claimed).sum())
    assert closed > 0


def test_all_open_is_the_plain_network_and_controllers_are_extra(decoupler):
    image = pictures(1)
    costs = decoupler.costs(image)
    everything = tuple(torch.ones(1, channels, dtype=torch.bool) for channels in decoupler.channels)
    plain = flops(lambda: decoupler.model(image))
    assert costs.dense * 2 == plain
    convs = [module for module in decoupler.model.modules() if isinstance(module, nn.Conv2d)]
    linears = [module for module in decoupler.model.modules() if isinstance(module, nn.Linear)]
    assert len(costs.convs) == len(convs)
    assert costs.other == sum(layer.in_features * layer.out_features for layer in linears)
    assert costs.of(everything, controllers=False).item() == costs.dense
    # the decoupler computes all channels, and its controllers
    assert flops(lambda: decoupler(image)) == plain + 2 * costs.controllers
    assert costs.of(everything).item() == costs.dense + costs.controllers
    nothing = tuple(~gate for gate in everything)
    # what is left: convolutions that are not gated and see inputs that are not
    first = costs.convs[0]
    left = sum(conv.each * conv.in_channels * conv.out_channels for conv in costs.convs if conv.inputs[0] == "all"
               and conv.gate is None)  # fmt: skip
    assert first.gate is None
    assert costs.of(nothing, controllers=False).item() == left + costs.other


def test_costs_survive_json_and_batches_do_not_matter(decoupler):
    images = pictures()
    costs = decoupler.costs(images[:1])
    again = Costs.from_json(json.loads(json.dumps(costs.as_json())))
    assert again == costs
    paths = decoupler.paths([images[:3], images[3:]])
    assert paths.costs == costs
    gates = tuple(gate > 0 for gate in decoupler.gates(images)[1])
    assert torch.equal(paths.macs(), costs.of(gates))
    assert torch.equal(again.of(gates), costs.of(gates))
    assert costs.of(tuple(gate[:0] for gate in gates)).shape == (0,)
    one = [costs.of(tuple(gate[n : n + 1] for gate in gates)).item() for n in range(4)]
    assert one == costs.of(gates).tolist()


# -- what stays zero ---------------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """Two gated convolutions, what is done with their maps, and a convolution that reads it."""

    def __init__(self, join, width=4):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(width)
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.register_buffer("constant", torch.tensor([0.7, -0.4, 0.3, 1.1])[:, None, None])
        self.last = nn.Conv2d(width, 4, 1)
        self.fc = nn.Linear(4, 3)
        self.join = join

    def forward(self, images):
        maps = self.stem(images)
        maps = self.join(self, self.first(maps), self.second(maps))
        return self.fc(self.last(maps).mean((2, 3)))


def statement(maps, change):
    change(maps)
    return maps


A, B = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
ALL = torch.ones(4, dtype=torch.bool)
# what is done, and which channels come out open when those of A and B are; None: safe to call all open
JOINS = {
    "sum": (lambda m, a, b: a + b, A | B),
    "sum in place": (lambda m, a, b: statement(a, lambda a: a.add_(b)), A | B),
    "difference": (lambda m, a, b: a - b, A | B),
    "weighed sum": (lambda m, a, b: torch.add(a, b, alpha=0.5), A | B),
    "sum of three": (lambda m, a, b: F.leaky_relu(a + b) + a, A | B),
    "a number added": (lambda m, a, b: a + 1.0, ALL),
    "a number added in place": (lambda m, a, b: statement(a, lambda a: a.add_(1.0)), ALL),
    "a constant added": (lambda m, a, b: a + m.constant, ALL),
    "from a number": (lambda m, a, b: 1.0 - a, ALL),
    "times a number": (lambda m, a, b: a * 2.0, A),
    "times a constant": (lambda m, a, b: m.constant * a, A),
    "squeeze and excitation": (lambda m, a, b: a * m.squeeze(a.mean((2, 3), keepdim=True)).sigmoid(), A),
    "excitation first": (lambda m, a, b: m.squeeze(F.adaptive_avg_pool2d(a, 1)).sigmoid() * a, A),
    "gated by the other": (lambda m, a, b: a * b.sigmoid(), A),
    "concatenation": (lambda m, a, b: torch.cat((a, b), 1), torch.cat((A, B))),
    "concatenation, the other way": (lambda m, a, b: torch.cat([b, F.leaky_relu(a)], dim=1), torch.cat((B, A))),
    "concatenation of three": (lambda m, a, b: torch.cat([a, b, a + b], 1), torch.cat((A, B, A | B))),
    "twice the same": (lambda m, a, b: torch.cat((a, a), 1), torch.cat((A, A))),
    "counted from behind": (lambda m, a, b: torch.cat((a, b), -3), torch.cat((A, B))),
    "side by side": (lambda m, a, b: torch.cat((a, b), 2), A | B),
    "norm after a concatenation": (lambda m, a, b: F.leaky_relu(m.bn(torch.cat((a, b), 1))), ALL.repeat(2)),
    "norm after a sum": (lambda m, a, b: m.bn(a + b), ALL),
    "sigmoid": (lambda m, a, b: torch.sigmoid(a), ALL),
    "softplus": (lambda m, a, b: F.softplus(a), ALL),
    "clamped above zero": (lambda m, a, b: a.clamp(min=0.1), ALL),
    "hard tanh above zero": (lambda m, a, b: F.hardtanh(a, 0.1, 1.0), ALL),
    "activations": (lambda m, a, b: F.silu(F.gelu(F.hardswish(F.elu(F.leaky_relu(a))))).tanh() ** 1, A),
    "pooling": (lambda m, a, b: F.avg_pool2d(F.max_pool2d(a, 3, 1, 1), 2), A),
    "larger": (lambda m, a, b: F.interpolate(a, scale_factor=2.0, mode="bilinear"), A),
    "channels moved": (lambda m, a, b: a.flip(1), A.flip(0)),
    "channels picked": (lambda m, a, b: torch.cat((a[:, 2:], b[:, :2]), 1), torch.cat((A[2:], B[:2]))),
    "shuffled": (lambda m, a, b: a.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2), A[[0, 2, 1, 3]]),
    "the larger of both": (lambda m, a, b: torch.maximum(a.abs(), b.abs()), A | B),
    "padded": (lambda m, a, b: F.pad(a, (1, 1, 1, 1), value=1.0), ALL),
}  # fmt: skip
# there flow knows no more than that a channel may be open
CAUTIOUS = {
    "twice the same", "counted from behind", "side by side", "channels moved", "channels picked", "shuffled",
    "the larger of both", "activations",
}  # fmt: skip


@pytest.mark.parametrize("how", ["traced", "run"])
@pytest.mark.parametrize("case", JOINS)
def test_what_is_said_to_be_closed_is_zero_and_is_said_where_it_can_be(case, how):
    join, expected = JOINS[case]
    model = seeded(Joined(join, len(expected)), 0).eval().requires_grad_(False)
    image = pictures(1, 8)
    example = image if how == "run" else None
    decoupler = PathDecoupler(model, ["first", "second"], example_input=example).eval()
    calls = calls_of(model, example)
    claimed = evaluate(open_inputs(model, calls, decoupler.units)["last"], [A[None], B[None]])[0]
    with decoupler.frozen((A[None].float(), B[None].float())):
        _, _, seen = watched(decoupler, image)
    really = seen["last"][0]
    assert torch.equal(really, expected)
    # never closed where it is not
    assert not (really & ~claimed).any()
    if case not in CAUTIOUS:
        assert torch.equal(claimed, expected)


def test_a_convolution_that_runs_twice_counts_twice_and_as_open():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.gated, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(4, 3)

        def forward(self, images):
            return self.fc(self.shared(self.shared(self.gated(self.stem(images)))).mean((2, 3)))

    decoupler = PathDecoupler(seeded(Twice(), 0), ["gated"]).eval()
    costs = decoupler.costs(pictures(1, 8))
    assert costs.dense * 2 == flops(lambda: decoupler.model(pictures(1, 8)))
    none, every = torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    assert costs.of((every,)).item() - costs.of((none,)).item() == 64 * 4 * 4


# -- gates by the norm of their filters --------------------------------------------------------------------------------


@pytest.mark.parametrize("macs", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("network", ["residual sums", "concatenation", "depthwise"])
def test_static_gates_keep_the_largest_norms_and_reach_the_target_from_below(network, macs):
    decoupler = PathDecoupler(seeded(NETWORKS[network](), 4)).eval().requires_grad_(False)
    image = pictures(1)
    costs, kept = decoupler.costs(image), []
    sizes = [decoupler.model.get_submodule(name).weight.abs().sum((1, 2, 3)) for name in decoupler.layers]
    floor = costs.of([(size == size.max())[None] for size in sizes], controllers=False).item() / costs.dense
    if floor > macs:
        with pytest.raises(OptionError, match=rf"one filter in each and what is not gated take {floor:.3f}"):
            l1_gates(decoupler, image, macs)
        return
    gates = l1_gates(decoupler, image, macs)
    for name, gate in zip(decoupler.layers, gates, strict=True):
        norms = [sum(abs(w) for w in row.flatten().tolist()) for row in decoupler.model.get_submodule(name).weight]
        open_ones = gate[0].nonzero().flatten().tolist()
        closed = sorted(set(range(len(norms))) - set(open_ones))
        assert len(open_ones) >= 1
        assert not closed or min(norms[k] for k in open_ones) >= max(norms[k] for k in closed)
        assert (gate.shape, gate.dtype) == ((1, len(norms)), torch.float32)
        kept.append(len(open_ones))
    spent = costs.of([gate > 0 for gate in gates], controllers=False).item() / costs.dense
    assert spent <= macs
    if macs == 1.0:
        assert kept == list(decoupler.channels)
        return
    # one filter more in each layer would be too much
    more = [
        (size >= size.sort(descending=True).values[min(count, len(size) - 1)])[None]
        for size, count in zip(sizes, kept, strict=True)
    ]
    assert costs.of(more, controllers=False).item() / costs.dense > macs
    with decoupler.frozen(gates):
        assert torch.isfinite(decoupler(pictures(3))).all()


@pytest.mark.parametrize(("macs", "message"), [
    (0.0, r"share in \(0, 1\], got 0.0"),
    (1.01, "got 1.01"),
    (float("nan"), "got nan"),
    (0.02, r"macs=0.02 cannot be reached by pruning 5 layers: .* ask for more"),
])  # fmt: skip
def test_static_gates_refuse_what_cannot_be(macs, message):
    decoupler = PathDecoupler(seeded(NETWORKS["residual sums"](), 0))
    with pytest.raises(OptionError, match=message):
        l1_gates(decoupler, pictures(1), macs)
