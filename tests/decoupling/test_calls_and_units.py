"""What is found in a forward, by tracing and by running: which convolutions can be gated, and where."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from captum_classfilters import PathDecoupler
from captum_classfilters.core.calls import calls_of
from captum_classfilters.core.errors import LayerError, UngatedLayerWarning
from captum_classfilters.decoupling.units import find_units


class Net(nn.Module):
    """Four convolutions and what ``middle`` makes of the two between the first and the last."""

    def __init__(self, middle, dims=2, groups=1):
        super().__init__()
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
        self.middle = middle
        self.first = conv(3, 4, 3, padding=1)
        self.conv1, self.norm1 = conv(4, 4, 3, padding=1, groups=groups), norm(4)
        self.conv2, self.norm2 = conv(4, 4, 1), norm(4)
        self.up = getattr(nn, f"ConvTranspose{dims}d")(4, 4, 3, padding=1)
        self.norm3 = nn.GroupNorm(2, 4)
        self.unused = conv(4, 4, 3)
        self.last = conv(4, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        x = self.middle(self, self.first(x).relu())
        return self.fc(self.last(x).relu().flatten(2).mean(2))


def normed(m, x):
    return m.conv2(m.norm1(m.conv1(x)).relu()).relu()


def image(dims=2, count=2):
    return torch.randn(count, 3, *(6,) * dims, generator=torch.Generator().manual_seed(0))


def both_ways(model, layers=None):
    """Units found by tracing, which must be those found by running."""
    traced = find_units(model, layers)
    assert find_units(model, layers, calls_of(model, image())) == traced
    return [tuple(unit) for unit in traced]


PLAIN = [("conv1", "norm1"), ("conv2", "conv2")]

# -- the place of the mask ---------------------------------------------------------------------------------------------


def sized(m, x):
    y = m.conv1(x)
    n, (c, h) = y.size(0), y.shape[1:3]
    y = m.norm1(y).relu()
    return m.conv2(y.reshape(n, c * h, y.shape[3]).view(n, c, h, -1)).relu()


class Frozen(nn.Module):
    """A norm by its name alone, with buffers and plain arithmetic."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.full((4, 1, 1), 2.0))

    def forward(self, x):
        return x * self.weight + 1


class FrozenBatchNorm2d(Frozen):
    pass


@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        pytest.param(normed, PLAIN, id="a norm right behind, or none"),
        pytest.param(
            lambda m, x: m.norm3(m.conv2(m.norm1(m.conv1(x).relu()))),
            [("conv1", "conv1"), ("conv2", "norm3")],
            id="group norm; an activation before the norm",
        ),
        pytest.param(
            lambda m, x: (y := m.conv1(x)).relu() + m.norm1(y) * m.conv2(x).sigmoid(),
            [("conv1", "conv1"), ("conv2", "conv2")],
            id="a norm and something else",
        ),
        pytest.param(
            lambda m, x: m.norm1(y := m.conv1(x)) * m.norm2(y) + m.conv2(x),
            [("conv1", "conv1")],
            id="two norms; a 1x1 shortcut",
        ),
        pytest.param(
            lambda m, x: x + m.norm2(m.conv2(m.norm1(m.conv1(x)).relu())),
            [("conv1", "norm1"), ("conv2", "norm2")],
            id="a 1x1 convolution in the main branch",
        ),
        pytest.param(
            lambda m, x: m.norm1(m.conv1(x)) + m.norm2(m.conv2(F.avg_pool2d(x, 1))),
            [("conv1", "norm1")],
            id="a shortcut behind a pooling",
        ),
        pytest.param(
            lambda m, x: m.conv1(x) * m.conv2(x.mean((2, 3), keepdim=True)).sigmoid(),
            [("conv1", "conv1")],
            id="squeeze and excitation",
        ),
        pytest.param(
            lambda m, x: m.conv1(x) * m.conv2(x.mean((2, 3)).view(x.shape[0], x.size(1) // 1, 1, 1)).sigmoid(),
            [("conv1", "conv1")],
            id="squeeze and excitation of a size that is reckoned with",
        ),
        pytest.param(sized, PLAIN, id="its size is asked for"),
        pytest.param(
            lambda m, x: m.norm2(m.conv2(m.norm1(m.conv1(x)).relu_()).relu_()) + x.new_zeros(x.shape),
            PLAIN,
            id="in place",
        ),
        pytest.param(
            lambda m, x: x.reshape(x.shape[0], -1, x.size(2), x.size(3)) + m.conv2(m.norm1(m.conv1(x)).relu()),
            PLAIN,
            id="to be asked for its size is not to be a shortcut's beginning",
        ),
    ],
)
def test_the_mask_stands_on_the_norm_if_that_alone_takes_the_output(middle, expected):
    assert both_ways(Net(middle).train()) == expected


def test_a_norm_of_another_package_counts_by_its_name():
    model = Net(normed)
    model.norm1 = FrozenBatchNorm2d()
    assert both_ways(model) == PLAIN
    model.norm1 = Frozen()
    assert both_ways(model) == [("conv1", "conv1"), ("conv2", "conv2")]


class ReturnsBoth(Net):
    def forward(self, x):
        return self.norm1(y := self.conv1(self.first(x))), y


def test_what_is_returned_itself_is_masked_on_the_convolution():
    model = ReturnsBoth(normed)
    for calls in (calls_of(model), calls_of(model, image())):
        assert find_units(model, ["conv1"], calls)[0].site == "conv1"


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
def test_a_closed_channel_is_zero_before_the_next_convolution(dims, groups):
    torch.manual_seed(0)
    model = Net(normed, dims, groups).eval()
    decoupler, x = PathDecoupler(model, example_input=image(dims) if dims == 1 else None), image(dims)
    assert [tuple(unit) for unit in decoupler.units] == PLAIN
    gates = (torch.tensor([[1.0, 0.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    with torch.no_grad(), decoupler.frozen(gates):
        found = decoupler(x)
    with torch.no_grad():
        hidden = model.norm1(model.conv1(model.first(x).relu()))
        hidden = model.conv2((hidden * gates[0].reshape(1, 4, *(1,) * dims)).relu()) * gates[1].reshape(
            1, 4, *(1,) * dims
        )
        expected = model.fc(model.last(hidden.relu()).relu().flatten(2).mean(2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert decoupler.controllers[0].squeeze.in_features == 4


# -- what cannot be followed -------------------------------------------------------------------------------------------

TROUBLES = {
    "shared": (
        lambda m, x: m.conv2(m.norm1(m.conv1(m.conv1(x)))),
        "conv1",
        "it runs 2 times in one forward, and a gate is for one",
    ),
    "shared norm": (
        lambda m, x: m.conv2(m.norm1(m.norm1(m.conv1(x)).relu())),
        "conv1",
        "the norm that follows, norm1, runs 2 times",
    ),
    "functional": (
        lambda m, x: m.conv2(F.batch_norm(m.conv1(x), torch.zeros(4), torch.ones(4))),
        "conv1",
        "its output goes into the function batchnorm, which would give a closed channel a constant",
    ),
}


@pytest.mark.parametrize("how", ["traced", "run"])
@pytest.mark.parametrize("case", list(TROUBLES))
def test_what_cannot_be_followed_is_warned_of_or_refused_if_named(case, how):
    middle, name, message = TROUBLES[case]
    model = Net(middle)
    calls = calls_of(model, image() if how == "run" else None)
    with pytest.warns(UngatedLayerWarning, match=f"{name} is not gated: {message}"):
        units = find_units(model, calls=calls)
    assert [tuple(unit) for unit in units] == [("conv2", "conv2")]
    with pytest.raises(LayerError, match=f"{name} cannot be gated: {message}.*; leave it out of layers="):
        find_units(model, [name], calls)


# -- models that cannot be traced --------------------------------------------------------------------------------------


def depends(m, x):
    if x.sum() > 0:
        x = x * 2
    return normed(m, x)


def test_a_model_that_depends_on_values_asks_for_an_example():
    with pytest.raises(LayerError, match=re.escape('(at "if x.sum() > 0:"); pass example_input= with one batch')):
        PathDecoupler(Net(depends))
    decoupler = PathDecoupler(Net(depends), example_input=image())
    assert [tuple(unit) for unit in decoupler.units] == PLAIN
    # C is known from the run as from the trace
    assert [reader.out_features for reader in decoupler.readers] == [4, 4]
    assert decoupler(image(count=3)).shape == (3, 4)


class Flagged(Net):
    def forward(self, x, bare=False, *, scale=None, times=1.0):
        x = self.first(x if scale is None else x * scale)
        x = self.conv1(x) if bare else self.norm1(self.conv1(x))
        return self.fc(self.last(self.conv2(x)).mean((2, 3))) * times


def test_flags_of_the_forward_keep_their_defaults():
    model = Flagged(normed).eval()
    decoupler = PathDecoupler(model)
    assert [tuple(unit) for unit in decoupler.units] == PLAIN
    closed = (torch.ones(1, 4), torch.zeros(1, 4))
    with decoupler.frozen(closed):
        found = decoupler(image(), scale=torch.tensor(2.0), times=3.0)
    expected = model.fc(model.last(torch.zeros(2, 4, 6, 6)).mean((2, 3))) * 3.0
    torch.testing.assert_close(found, expected)
    assert both_ways(model) == PLAIN


def test_another_path_through_the_code_than_the_known_one_is_noticed():
    model = Net(lambda m, x: normed(m, x) if not m.training else m.conv2(x))
    decoupler = PathDecoupler(model.eval())
    with pytest.raises(
        LayerError, match=r"conv1 did not run in this forward.*make a PathDecoupler with layers= without"
    ):
        decoupler.train()(image())


def test_the_model_s_mode_does_not_matter():
    branch = Net(lambda m, x: normed(m, x) if not m.training else m.conv2(x)).train()
    assert both_ways(branch) == PLAIN
    assert all(module.training for module in branch.modules())


# -- layers= -----------------------------------------------------------------------------------------------------------


def test_layers_are_names_or_modules_and_come_in_the_order_in_which_they_run():
    model = Net(normed)
    expected = [("first", "first"), ("conv2", "conv2"), ("last", "last")]
    assert both_ways(model, ["last", "first", "conv2"]) == expected
    assert both_ways(model, [model.conv2, "model.last", model.first, "last"]) == expected
    assert find_units(model, (layer for layer in ("conv1",))) == (("conv1", "norm1"),)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("conv1", r"layers must be a list of names or modules, got str; put it in a list"),
        (3, r"layers must be a list of names or modules, got int"),
        ([3], r"layers must be names or modules, got 3"),
        ([], r"layers= is empty; name at least one convolution, or leave layers= away"),
        (["conv9"], r"there is no layer 'conv9'; the convolutions that run are first, conv1, conv2, last"),
        (["norm1"], r"norm1 is a BatchNorm2d, not a convolution; name a Conv1d, Conv2d or Conv3d"),
        (["up"], r"up is a ConvTranspose2d; only Conv1d, Conv2d and Conv3d can be gated"),
        (["unused"], r"unused does not run as a module in the forward of Net \(in eval mode\); leave it out"),
        ([nn.Conv2d(1, 1, 1)], r"the Conv2d in layers= is not a part of Net"),
        (["conv1", "unused"], r"unused does not run"),
    ],
)
def test_layers_that_are_none_are_refused(layers, message):
    with pytest.raises(LayerError, match=message):
        find_units(Net(normed), layers)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), 0),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)), 2),
    ],
    ids=["no convolution", "a first and a last one"],
)
def test_a_model_with_nothing_between_the_first_and_the_last_is_refused(model, count):
    message = (
        rf"Sequential has {count} convolutions .* none to gate after the first and the last; name some with layers="
    )
    with pytest.raises(LayerError, match=message):
        PathDecoupler(model)


def test_two_convolutions_are_gated_if_they_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    assert both_ways(model, ["0", "2"]) == [("0", "0"), ("2", "2")]
    assert PathDecoupler(model, ["0"]).readers is None


class _Pooled(nn.Module):
    """Three convolutions behind a pooling to ``size`` positions, two of them gated if these are several."""

    def __init__(self, pool):
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.pool = pool

    def forward(self, images):
        return self.last(self.third(self.second(self.pool(self.first(images)))))


@pytest.mark.parametrize("by", ["tracing", "running"])
@pytest.mark.parametrize(
    ("pool", "gated"),
    [
        (nn.AdaptiveAvgPool2d(1), []),
        (nn.AdaptiveAvgPool2d((1, 1)), []),
        (nn.AdaptiveAvgPool2d(2), ["second", "third"]),
        (nn.AdaptiveMaxPool2d((1, 2)), ["second", "third"]),
    ],
)
def test_only_what_sees_a_single_position_counts_as_squeezed(pool, gated, by):
    model = _Pooled(pool).eval()
    calls = calls_of(model, torch.rand(1, 3, 4, 4) if by == "running" else None)
    if gated:
        assert [unit.conv for unit in find_units(model, calls=calls)] == gated
    else:
        with pytest.raises(LayerError, match="none to gate"):
            find_units(model, calls=calls)
