"""`pieces`: every operation against the same one on whole maps whose closed channels are zeros; then what becomes of
them in graphs of every kind, against the masked network.
"""

import pytest
import torch
from test_skipping import assert_same, images, lively, split
from torch import nn
from torch.nn import functional as F

from captum_classfilters import PathDecoupler
from captum_classfilters.core.errors import LayerError, OptionError
from captum_classfilters.skipping import pieces, skip_conv
from captum_classfilters.skipping.pieces import Piece

CASES = ("tensor", "everything", "one piece", "one image", "several", "rows with all channels")
PAIRS = [(a, b) for a in CASES for b in CASES if (a == "one image") == (b == "one image")]
SEEDS = range(3)


def cut(maps, opened):
    """Whole maps, with zeros where ``opened`` is not, as pieces: images with the same channels in one."""
    rows = {}
    for row, gates in enumerate(opened.tolist()):
        rows.setdefault(tuple(gates), []).append(row)
    found = []
    for gates, members in rows.items():
        index = torch.tensor(gates).nonzero().flatten()
        values = torch.stack([maps[row][index] for row in members])
        where = None if len(rows) == 1 else tuple(members)
        found.append(Piece(where, values, index, maps.shape[1], bytes(gates)))
    return found


def drawn(case, seed, channels=7, size=(3, 2)):
    """Maps with zeros for closed channels, and the same as pieces."""
    generator = torch.Generator().manual_seed(seed)
    images = 1 if case == "one image" else 6
    maps = torch.randn(images, channels, *size, generator=generator)
    if case == "tensor":
        return maps, maps
    if case == "everything":
        return maps, [Piece(None, maps, None, channels)]
    if case == "rows with all channels":
        parts = torch.randperm(images, generator=generator).split([3, 1, 2])
        return maps, [Piece(tuple(part.tolist()), maps[part], None, channels) for part in parts]
    # some of the patterns come twice, in an order that is not that of the images
    few = torch.rand(1 if case == "one piece" else 3, channels, generator=generator) < 0.5
    opened = few[torch.randint(len(few), (images,), generator=generator)]
    maps = maps * opened[:, :, None, None]
    return maps, cut(maps, opened)


def copies(value):
    return value.clone() if isinstance(value, torch.Tensor) else [part.values.clone() for part in value]


def unchanged(value, before):
    parts = [value] if isinstance(value, torch.Tensor) else [part.values for part in value]
    befores = [before] if isinstance(before, torch.Tensor) else before
    return all(torch.equal(part, was) for part, was in zip(parts, befores, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_whole_maps_have_zeros_for_closed_channels(case, seed):
    maps, value = drawn(case, seed)
    before = copies(value)
    assert torch.equal(pieces.full(value), maps)
    assert pieces.images_in(value) == len(maps)
    assert unchanged(value, before)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_sum_is_that_of_whole_maps_and_changes_no_summand(first, second, seed):
    left, one = drawn(first, seed)
    right, other = drawn(second, seed + 100)
    before = copies(one), copies(other)
    torch.testing.assert_close(pieces.plus(one, other), left + right, rtol=0, atol=1e-6)
    assert unchanged(one, before[0])
    assert unchanged(other, before[1])


def test_something_twice_is_a_sum_too():
    maps, value = drawn("several", 0)
    assert torch.equal(pieces.plus(value, value), maps + maps)


@pytest.mark.parametrize("shape", [(1, 7, 1, 1), (7, 1, 1), (6, 1, 3, 2), (6, 7, 1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("case", ["one piece", "several"])
def test_a_summand_of_another_shape_is_broadcast(case, shape):
    maps, value = drawn(case, 0)
    other = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pieces.plus(value, other), maps + other)
    assert torch.equal(pieces.plus(other, value), maps + other)


@pytest.mark.parametrize("case", ["one piece", "several"])
def test_pieces_of_one_channel_are_broadcast(case):
    maps, value = drawn(case, 0)
    single, one = drawn("one piece", 3, channels=1)
    assert torch.equal(pieces.plus(value, one), maps + single)
    assert torch.equal(pieces.plus(one, value), maps + single)


def test_summands_of_two_dtypes_give_the_wider():
    maps, value = drawn("several", 0)
    narrow = [part._replace(values=part.values.bfloat16()) for part in value]
    found = pieces.plus(narrow, torch.ones_like(maps))
    assert found.dtype == torch.float32
    assert torch.equal(found, maps.bfloat16() + torch.ones_like(maps))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_concatenation_is_that_of_whole_maps(first, second, seed):
    left, one = drawn(first, seed, channels=7)
    right, other = drawn(second, seed + 100, channels=4)
    both = pieces.concatenated([one, other, one])
    assert torch.equal(pieces.full(both), torch.cat([left, right, left], 1))


def test_a_concatenation_of_single_pieces_keeps_only_what_is_open():
    one, whole = drawn("one piece", 0)[1], drawn("tensor", 1, channels=4)[1]
    (both,) = pieces.concatenated([one, whole, one])
    assert both.channels == 18
    assert both.values.shape[1] == 2 * one[0].values.shape[1] + 4
    expected = [*one[0].open.tolist(), 7, 8, 9, 10, *(11 + one[0].open).tolist()]
    assert both.open.tolist() == expected


def test_keys_tell_concatenations_apart():
    maps, _ = drawn("tensor", 0)
    opened = torch.zeros(6, 7, dtype=torch.bool)
    opened[:, :3] = True
    other = opened.flip(1)
    first, second = cut(maps, opened), cut(maps, other)
    keys = {
        pieces.concatenated(pair)[0].key for pair in ([first, second], [second, first], [first, maps], [maps, first])
    }
    assert len(keys) == 4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (F.relu, (), {}),
        (F.max_pool2d, (2,), {"stride": 1}),
        (F.adaptive_avg_pool2d, ((1, 1),), {}),
        (lambda values, slope, scale: F.leaky_relu(values, slope) * scale, (0.2,), {"scale": 3.0}),
    ],
    ids=["relu", "max", "average", "arguments"],
)
def test_what_works_on_each_channel_alone(case, function, args, kwargs):
    maps, value = drawn(case, 1)
    found = pieces.each(function, value, *args, **kwargs)
    assert torch.equal(pieces.full(found), function(maps, *args, **kwargs))
    if not isinstance(value, torch.Tensor):
        assert [part[2:] for part in found] == [part[2:] for part in value]
        assert [part.rows for part in found] == [part.rows for part in value]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(5,), (3, 2), (2, 3, 2)], ids=["1d", "2d", "3d"])
def test_means_over_positions(case, size, seed):
    if case in ("one piece", "one image", "several") and len(size) != 2:
        maps, value = drawn(case, seed, size=(6, 2))
        maps = maps.reshape(*maps.shape[:2], *((12,) if len(size) == 1 else (3, 2, 2)))
        value = [part._replace(values=part.values.reshape(*part.values.shape[:2], *maps.shape[2:])) for part in value]
    else:
        maps, value = drawn(case, seed, size=size)
    expected = maps.flatten(2).sum(2) / maps[0, 0].numel()
    torch.testing.assert_close(pieces.pooled(value, torch.float32), expected)


@pytest.mark.parametrize("case", CASES)
def test_means_are_reckoned_in_the_dtype_that_is_asked_for(case):
    maps, value = drawn(case, 2)
    narrow = maps.bfloat16()
    if not isinstance(value, torch.Tensor):
        value = [part._replace(values=part.values.bfloat16()) for part in value]
    found = pieces.pooled(narrow if isinstance(value, torch.Tensor) else value, torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, narrow.float().mean((2, 3)))


def test_they_follow_the_device(device, assert_close):
    maps, value = drawn("several", 0)
    other, rows = drawn("rows with all channels", 1)
    with device.mode:
        moved = [part._replace(values=part.values.to(device.name), open=part.open.to(device.name)) for part in value]
        rows = [part._replace(values=part.values.to(device.name)) for part in rows]
        maps, other = maps.to(device.name), other.to(device.name)
        assert_close(pieces.full(moved), maps)
        assert_close(pieces.plus(moved, rows), maps + other)
        assert_close(pieces.concatenated([moved, rows]), torch.cat([maps, other], 1))
        assert_close(pieces.pooled(moved, torch.float32), maps.mean((2, 3)))
        single = [moved[0]._replace(rows=None)]
        both = pieces.concatenated([single, moved[0].values])
        assert both[0].open.device.type == device.name


# -- in graphs ---------------------------------------------------------------------------------------------------------


class Standardised(nn.Conv2d):
    """A subclass that does more with its weights than multiply."""

    def forward(self, maps):
        return self._conv_forward(maps, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Graph(nn.Module):
    """Layers for 8 channels, and a function that says how they follow each other: from a stem to a last convolution."""

    def __init__(self, between, dims=2):
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
        self.stem, self.a, self.b = conv(3, 8, 3), conv(8, 8, 3, padding=1), conv(8, 8, 3, padding=1, bias=False)
        self.norm, self.other, self.group = norm(8), norm(8), nn.GroupNorm(2, 8)
        self.wide, self.one, self.last = conv(16, 8, 1), conv(8, 1, 1), conv(8, 12, 3)
        self.deep, self.halves = conv(8, 8, 3, padding=1, groups=8), conv(8, 8, 3, padding=1, groups=2)
        if dims == 2:
            self.mirror = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
            self.standard = Standardised(8, 8, 3, padding=1)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.prelu, self.relu, self.pool = nn.PReLU(8), nn.ReLU(inplace=True), nn.MaxPool2d(2, return_indices=True)
        self.shift, self.fc = nn.Parameter(torch.ones(1, 8, *[1] * dims)), nn.Linear(12, 5)
        self.between = between

    def forward(self, maps):
        maps = self.last(self.between(self, self.stem(maps)))
        return self.fc(maps.flatten(2).mean(2))


def many_users(m, x):
    y = m.a(x)
    return m.b(y) * y.mean((2, 3), keepdim=True) + y.relu() + m.norm(y)


def in_place(m, x):
    y = m.a(x)
    y += x
    return m.b(m.relu(y)).add_(x)


# what lies between, and the gated layers
GRAPHS = {
    "norms folded": (lambda m, x: m.other(m.b(m.norm(m.a(x)).relu())), "a b"),
    "a gated last convolution": (lambda m, x: m.a(x), "a last"),
    "two gated branches summed": (lambda m, x: F.relu(m.norm(m.a(x)) + m.b(x)), "a b"),
    "summed with itself": (lambda m, x: (lambda y: y + y)(m.a(x)), "a"),
    "concatenated": (lambda m, x: m.wide(torch.cat([m.a(x).relu(), m.b(x)], 1)), "a b wide"),
    "concatenated with maps": (lambda m, x: m.wide(torch.concat(tensors=(x, m.a(x)), dim=1)), "a"),
    "concatenated over positions": (lambda m, x: torch.cat([m.a(x), m.b(x)], 2), "a b"),
    "many users": (many_users, "a b"),
    "in place": (in_place, "a b"),
    "with a number": (lambda m, x: m.b(m.a(x) + 1) * 2, "a b"),
    "scaled sum": (lambda m, x: torch.add(m.a(x), x, alpha=3), "a"),
    "shifted by channel": (lambda m, x: m.a(x) + m.shift, "a"),
    "one channel to all": (lambda m, x: m.a(x) + m.one(x) + m.b(x), "a b"),
    "one gated channel to all": (lambda m, x: (lambda y: (m.a(x) + y) + (y + m.b(x)))(m.one(x)), "a b one"),
    "another norm": (lambda m, x: m.b(m.group(m.a(x))).relu(), "a b"),
    "depthwise": (lambda m, x: m.other(m.deep(m.norm(m.a(x)))), "a deep"),
    "in groups": (lambda m, x: m.halves(m.a(x)), "a"),
    "gated in groups": (lambda m, x: m.norm(m.halves(m.a(x))), "a halves"),
    "gated in groups alone": (lambda m, x: m.norm(m.halves(x)), "halves"),
    "mirrored borders": (lambda m, x: m.norm(m.mirror(m.a(x))), "a mirror"),
    "a subclass": (lambda m, x: m.standard(m.a(x)), "a"),
    "a subclass without a norm": (lambda m, x: m.b(m.standard(x).relu()), "standard b"),
    "a gated subclass": (lambda m, x: m.other(m.b(m.norm(m.standard(x)))), "standard b"),
    "parametrised": (lambda m, x: m.norm(m.normed(m.a(x))), "a normed"),
    "slopes by channel": (lambda m, x: m.prelu(m.a(x)), "a"),
    "indices of a pooling": (lambda m, x: m.pool(m.a(x))[0], "a"),
    "pooled by a function": (lambda m, x: F.max_pool2d(input=m.a(x), kernel_size=2), "a"),
    "called twice": (lambda m, x: m.b(m.b(m.a(x))), "a"),
}  # fmt: skip
DIMS = [("norms folded", 1), ("depthwise", 1), ("two gated branches summed", 3), ("concatenated", 3)]


def graph(name, dims=2, **options):
    between, gated = GRAPHS[name]
    model = lively(lambda: Graph(between, dims))
    x = images(5, 9, dims=dims)
    return split(model, x, layers=gated.split(), reduction=1, **options), x


@pytest.mark.parametrize(("name", "dims"), [(name, 2) for name in GRAPHS] + DIMS)
def test_graphs_of_every_kind(name, dims, monkeypatch):
    monkeypatch.setattr(skip_conv, "_REPEATS", 1)
    monkeypatch.setattr(skip_conv, "_BETWEEN", 1)
    decoupler, x = graph(name, dims)
    expected = decoupler(x)
    assert (expected - decoupler.model(x)).abs().max() > 1e-3 * expected.abs().max()
    for skipping in (decoupler.skipping(measured=False), decoupler.skipping(x, measured=True)):
        for rows in ([0], [2, 4], range(5)):
            assert_same(skipping(x[list(rows)]), expected[list(rows)])
        assert skipping(x[:0]).shape == (0, 5)


def test_a_convolution_without_gates_skips_what_is_closed_before_it():
    decoupler, x = graph("norms folded")
    skipping = decoupler.skipping(measured=False)
    assert set(skipping.layers()) == {"a", "b", "last"}
    opened = int(decoupler.gates(x[:1])[1][1].sum())
    assert 0 < opened < 8
    decoupler.controllers[1].excite.bias.fill_(-1e6)
    assert_same(decoupler.skipping(measured=False)(x), decoupler(x))


class Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Graph(GRAPHS["norms folded"][0])

    def forward(self, first, second, scale=2.0):
        return {"logits": self.net(first - second) * scale, "both": (first, second)}


def test_several_inputs_keywords_and_what_is_returned_stay():
    x, y = images(4, 9), images(4, 9, seed=2)
    decoupler = split(lively(Options), x, y, layers=["net.a", "net.b"], reduction=1)
    skipping = decoupler.skipping(x, y, measured=True)
    for found in (skipping(x, y), skipping(x, second=y)):
        assert_same(found["logits"], decoupler(x, y)["logits"])
        assert torch.equal(found["both"][1], y)
    assert set(skipping.layers()) == {"net.a", "net.b", "net.last"}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        self.fc = nn.Linear(4, 2)

    def forward(self, maps):
        if maps.sum() > 0:
            return self.fc(self.convs(maps).mean((2, 3)))
        return self.fc(self.convs(maps).mean((2, 3)))


def test_what_cannot_be_is_said():
    x = images(2, 8)
    decoupler = PathDecoupler(Branching().eval(), example_input=x)
    with pytest.raises(LayerError, match=r'Branching cannot be traced: .*\(at "if maps.sum\(\) > 0:"\)'):
        decoupler.skipping(x)
    with pytest.raises(OptionError, match=r"needs one batch to time the layers with, got none; pass it, or measured="):
        graph("norms folded")[0].skipping()
