"""`SkipConv` against the convolution times its gates: in every shape, way and state; and which way it takes."""

import copy
import sys
import threading

import pytest
import torch
from shared import seeded
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from captum_classfilters.decoupling.controller import Controller
from captum_classfilters.skipping import skip_conv
from captum_classfilters.skipping.pieces import Piece, full
from captum_classfilters.skipping.skip_conv import CostModel, SkipConv

NEVER = CostModel(0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
ALWAYS = CostModel(1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
SHAPES = {
    "3x3": (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    "1x1": (nn.Conv2d, {"kernel_size": 1}),
    "1x1 by steps": (nn.Conv2d, {"kernel_size": 1, "stride": 2, "bias": False}),
    "oblong": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 3)}),
    "same": (nn.Conv2d, {"kernel_size": 3, "padding": "same"}),
    "one dimension": (nn.Conv1d, {"kernel_size": 3, "stride": 2}),
    "three dimensions": (nn.Conv3d, {"kernel_size": (1, 3, 2), "padding": 1}),
}


def built(shape="3x3", inputs=10, outputs=21, seed=0, closed=None, depthwise=False):
    """A convolution, a controller that opens about half of it, others for each image, and what skips by it."""
    kind, options = SHAPES[shape]
    conv = seeded(kind(inputs, outputs, groups=inputs if depthwise else 1, **options), seed).requires_grad_(False)
    controller = seeded(Controller(inputs, outputs, 1), seed + 1).requires_grad_(False).eval()
    controller.excite.weight.mul_(20)
    if closed is not None:
        controller.excite.weight[closed] = -controller.excite.weight[closed].abs()
        controller.excite.bias[closed] = -controller.excite.bias[closed].abs()
    return conv, controller, SkipConv(conv, controller, closed)


def drawn(shape="3x3", images=5, inputs=10, seed=2, patterns=0):
    """Maps; with ``patterns``, as many sets of open channels among the images: and the same maps as pieces."""
    generator = torch.Generator().manual_seed(seed)
    size = {nn.Conv1d: (8,), nn.Conv2d: (6, 5), nn.Conv3d: (4, 3, 5)}[SHAPES[shape][0]]
    maps = torch.randn(images, inputs, *size, generator=generator)
    maps += 2 * torch.randn(images, inputs, *[1] * len(size), generator=generator)
    if not patterns:
        return maps, maps
    opened = torch.rand(patterns, inputs, generator=generator) < 0.6
    value = []
    for number in range(patterns):
        rows = tuple(range(number, images, patterns))
        index = opened[number].nonzero().flatten()
        where = None if patterns == 1 else rows
        value.append(Piece(where, maps[list(rows)][:, index], index, inputs, bytes(opened[number].tolist())))
    return full(value), value


def masked(conv, controller, maps):
    out = conv(maps)
    return out * controller(maps).reshape(*out.shape[:2], *[1] * (out.dim() - 2))


def close(found, expected):
    torch.testing.assert_close(full(found), expected, rtol=1e-5, atol=1e-5)


def multiplications(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


# -- the same as masked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patterns", [0, 1, 3])
@pytest.mark.parametrize("images", [1, 6])
@pytest.mark.parametrize("costs", [None, ALWAYS, NEVER], ids=["skips", "is worth it", "is not"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_convolution_times_its_gates(shape, costs, images, patterns):
    if patterns > images:
        patterns = 1
    conv, controller, layer = built(shape)
    maps, value = drawn(shape, images, patterns=patterns)
    layer.costs = costs
    expected = masked(conv, controller, maps)
    for _ in range(3):  # the third time with slices that were kept
        found = layer(value)
        close(found, expected)
        assert isinstance(found, torch.Tensor) == (costs is NEVER)
    if layer.can_be_product:
        layer.by_product = {"dense", "sliced"}
        close(layer(value), expected)
    assert layer.can_be_product == (SHAPES[shape][0] is nn.Conv2d and shape != "same")


@pytest.mark.parametrize("patterns", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gate_it_is_the_convolution(shape, patterns):
    conv, _, _ = built(shape)
    maps, value = drawn(shape, 6, patterns=patterns)
    layer = SkipConv(conv, None)
    for costs in (None, ALWAYS, NEVER):
        layer.costs = costs
        found = layer(value)
        assert isinstance(found, torch.Tensor)
        close(found, conv(maps))


def test_without_a_gate_closed_inputs_are_skipped_unless_that_is_dearer():
    conv, _, _ = built()
    layer = SkipConv(conv, None)
    maps, value = drawn(images=1, patterns=1)
    dense, share = multiplications(lambda: conv(maps)), len(value[0].open) / 10
    assert 0 < share < 1
    for costs, expected in ((None, share), (CostModel(1.0, 1.0, 0.0, 0.0, 0.0, 1e-9), share), (NEVER, 1.0)):
        layer.costs = costs
        assert multiplications(lambda: layer(value)) == round(dense * expected)


@pytest.mark.parametrize("patterns", [0, 1, 3])
@pytest.mark.parametrize("closed", [None, torch.arange(10) % 3 == 0], ids=["", "pruned"])
def test_depthwise(closed, patterns):
    conv, controller, layer = built(outputs=10, closed=closed, depthwise=True)
    maps, value = drawn(images=6, patterns=patterns)
    for costs in (None, ALWAYS, NEVER):
        layer.costs = costs
        close(layer(value), masked(conv, controller, maps))


def test_some_images_close_everything():
    conv, controller, _ = built()
    controller.excite.weight.fill_(1e-9)
    controller.excite.bias.fill_(-1)
    controller.squeeze.weight.fill_(1e12)
    maps = drawn(images=4)[0].abs() * torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None, None, None]
    expected = masked(conv, controller, maps)
    assert expected.flatten(1).any(1).tolist() == [True, False, False, True]
    found = SkipConv(conv, controller)(maps)
    assert [piece.rows for piece in found] == [(0, 3), (1, 2)]
    close(found, expected)


@pytest.mark.parametrize(("outputs", "opened", "computed"), [
    (21, 1, 8), (21, 8, 8), (21, 9, 16), (21, 17, 21), (63, 9, 16), (64, 1, 16), (64, 17, 32), (64, 64, 64),
    (70, 66, 70), (5, 2, 5), (64, 0, 16),
])  # fmt: skip
def test_channels_are_filled_up_with_zeros_to_what_a_vector_takes(outputs, opened, computed):
    conv, controller, _ = built(outputs=outputs)
    controller.excite.weight.zero_()
    controller.excite.bias.copy_(torch.where(torch.arange(outputs) % outputs < opened, 1.0, -1.0).flip(0))
    maps, value = drawn(images=2)
    (found,) = SkipConv(conv, controller)(value)
    assert found.values.shape[1] == computed
    assert not found.values[:, opened:].any()
    assert sorted(found.open[:opened].tolist()) == list(range(outputs - opened, outputs))
    assert len(set(found.open.tolist())) == computed
    close([found], masked(conv, controller, maps))


def test_what_never_opens_is_pruned_and_the_rest_is_the_same():
    closed = torch.arange(21) % 4 == 1
    conv, controller, layer = built(closed=closed)
    assert len(layer.weight) == len(layer.dense_weight) == len(layer.bias) == int((~closed).sum())
    maps, value = drawn(images=6, patterns=3)
    for costs in (None, ALWAYS, NEVER):
        layer.costs = costs
        for given in (maps, value):
            close(layer(given), masked(conv, controller, maps))
    conv, controller, layer = built(closed=torch.ones(21, dtype=torch.bool))
    assert len(layer.weight) == 1
    assert not full(layer(maps)).any()


def test_a_copy_or_another_dtype_is_the_same():
    conv, controller, layer = built()
    maps, value = drawn(images=1)
    expected = masked(conv, controller, maps)
    for _ in range(3):
        layer(value)
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).double()):
        close(other(value.to(other.weight.dtype)), expected.to(other.weight.dtype))
    layer.set_format(torch.channels_last)
    assert layer.dense_weight.is_contiguous(memory_format=torch.channels_last)
    for costs in (None, NEVER):
        layer.costs = costs
        close(layer(value.contiguous(memory_format=torch.channels_last)), expected)


# -- recurring paths ---------------------------------------------------------------------------------------------------


def slices(layer, value):
    gates = layer._gates(value)
    piece = value[0] if isinstance(value, list) else Piece(None, value, None, layer.inputs)
    return layer._slice(piece, gates[0], gates.numpy()[:1].tobytes())


def test_slices_are_kept_when_a_path_recurs():
    _, _, layer = built()
    _, value = drawn(images=1, patterns=1)
    first, second, third, fourth = (slices(layer, value) for _ in range(4))
    assert first[1] is not second[1]
    assert second[1] is third[1] is fourth[1]
    assert layer._kept_bytes == second[1].numel() * 4
    assert torch.equal(first[1], second[1])
    layer.forget()
    assert (len(layer._kept), len(layer._seen), layer._kept_bytes) == (0, 0, 0)
    assert slices(layer, value)[1] is not third[1]


def test_what_is_kept_knows_its_inputs():
    conv, controller, _ = built()
    controller.excite.weight.zero_()  # the same gates whatever comes in
    gated, ungated = SkipConv(conv, controller), SkipConv(conv, None)
    given = [drawn(images=1, patterns=1, seed=seed) for seed in (2, 3)] + [drawn(images=1, seed=4)]
    for _ in range(3):
        for maps, value in given:
            close(gated(value), masked(conv, controller, maps))
            close(ungated(value), conv(maps))
    assert len(gated._kept) == 3
    assert len(ungated._kept) == 2


@pytest.mark.parametrize("room", [0, 1, 3])
def test_what_is_kept_is_bounded_and_the_oldest_goes(room, monkeypatch):
    conv, controller, layer = built()
    given = [drawn(images=1, seed=seed)[0] for seed in range(6)]
    largest = 21 * 10 * 9 * 4
    monkeypatch.setattr(skip_conv, "_KEPT_BYTES", room * largest)
    for _ in range(3):
        for maps in given:
            close(layer(maps), masked(conv, controller, maps))
            sizes = [weight.numel() * 4 for _, weight, _ in layer._kept.values()]
            assert sum(sizes) == layer._kept_bytes <= room * largest
    assert bool(layer._kept) == bool(room)
    for _ in range(2):
        layer(given[0])
    (*_, newest) = layer._kept or [None]
    assert newest == ((b"", layer._gates(given[0]).numpy().tobytes()) if room else None)


def test_a_path_in_use_is_not_the_oldest(monkeypatch):
    _, _, layer = built(outputs=8)  # each path has the same size
    given = [drawn(images=1, seed=seed)[0] for seed in range(4)]
    monkeypatch.setattr(skip_conv, "_KEPT_BYTES", 2 * layer.weight.numel() * 4)
    for maps in (0, 0, 1, 1, 0, 2, 2):
        layer(given[maps])
    left = {key for _, key in layer._kept}
    assert left == {layer._gates(given[number]).numpy().tobytes() for number in (0, 2)}


def test_only_so_many_are_remembered_to_have_come_once(monkeypatch):
    _, _, layer = built()
    monkeypatch.setattr(skip_conv, "_SEEN", 2)
    for seed in (0, 1, 2, 0):
        layer(drawn(images=1, seed=seed)[0])
    assert (len(layer._seen), len(layer._kept)) == (2, 0)


def test_threads_may_share_it(monkeypatch):
    conv, controller, layer = built("1x1", outputs=64)
    given = [drawn("1x1", images=1, seed=seed)[0] for seed in range(5)]
    expected = [masked(conv, controller, maps) for maps in given]
    monkeypatch.setattr(skip_conv, "_KEPT_BYTES", 2 * layer.weight.numel() * 4)
    errors = []

    def work():
        try:
            for step in range(150):
                close(layer(given[step % 5]), expected[step % 5])
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert layer._kept_bytes == sum(weight.numel() * 4 for _, weight, _ in layer._kept.values())


# -- which way ---------------------------------------------------------------------------------------------------------


def test_seconds_by_hand():
    costs = CostModel(dense_fixed=10, dense_each=20, fixed=3, selecting_rows=4, selecting=5, each=6)
    assert costs.dense(3) == pytest.approx(70 * 0.95)
    assert costs.sliced(2, 0.5, 0.25, False) == pytest.approx(3 + 0.5 * 0.25 * (6 * 2 + 5))
    assert costs.sliced(2, 0.5, 0.25, True) == pytest.approx(3 + 0.5 * 0.25 * 6 * 2)
    assert costs.sliced(2, 1.0, 0.25, False) == pytest.approx(3 + 0.25 * (6 * 2 + 4))
    # half of the outputs, from all inputs or from a quarter of them
    assert costs.gain(2, 0.25) == pytest.approx((3 + 0.5 * 16) - (3 + 0.125 * 17))
    # never more than what all channels cost
    assert CostModel(1, 1, 3, 4, 5, 6).gain(2, 0.25) == 0
    assert CostModel(4, 1, 3, 4, 5, 6).gain(2, 0.25) == pytest.approx(6 * 0.95 - (3 + 0.125 * 17))


@pytest.mark.parametrize("closed", [None, torch.arange(21) % 4 == 1], ids=["", "pruned"])
def test_the_way_is_what_costs_say(closed):
    _, _, layer = built(closed=closed)
    _, value = drawn(images=6, patterns=2)
    layer.costs = ALWAYS
    assert all(piece.open is not None and piece.rows is not None for piece in layer(value))
    layer.costs = NEVER
    found = layer(value)
    if closed is None:
        assert isinstance(found, torch.Tensor)
    else:
        assert found[0].rows is None
        assert found[0].open.tolist() == (~closed).nonzero().flatten().tolist()
        layer.costs = ALWAYS
        assert {piece.key for piece in layer(value)}.isdisjoint({found[0].key})


def test_it_pays_for_each_group_of_images_and_for_rounded_shares():
    _, _, layer = built()
    maps, _ = drawn(images=4)
    groups = len(set(map(bytes, layer._gates(maps).numpy())))
    assert groups == 4
    for fixed, sliced in ((0.9, True), (1.1, False)):  # one dense call costs as much as four groups
        layer.costs = CostModel(4 / 0.95, 0, fixed, 0, 0, 0)
        assert isinstance(layer(maps), list) == sliced
    opened = layer._gates(maps).sum(1).tolist()
    assert any(count % 8 for count in opened)
    share = sum(min(-(-count // 8) * 8, 21) / 21 for count in opened)
    for each, sliced in ((0.99, True), (1.01, False)):
        layer.costs = CostModel(share / 0.95, 0, 0, 0, 0, each)
        assert isinstance(layer(maps), list) == sliced


def test_a_path_that_is_kept_costs_no_selection():
    _, _, layer = built()
    maps, _ = drawn(images=1)
    layer(maps)
    layer.costs = CostModel(0.5, 0, 0, 10, 10, 0)
    assert isinstance(layer(maps), torch.Tensor)
    layer.costs = None
    layer(maps)
    layer.costs = CostModel(0.5, 0, 0, 10, 10, 0)
    assert isinstance(layer(maps), list)


def test_what_the_next_gain_counts():
    _, _, layer = built()
    _, _, follower = built(inputs=21)
    maps, _ = drawn(images=1)
    layer.costs = CostModel(1, 0, 1.5, 0, 0, 0)
    assert isinstance(layer(maps), torch.Tensor)
    layer.next.append(follower)
    assert isinstance(layer(maps), torch.Tensor)  # what it gains is not known
    follower.costs = CostModel(100, 0, 0, 0, 0, 10)
    assert isinstance(layer(maps), list)


def test_batches_like_one_that_is_better_computed_whole_are_not_looked_at(monkeypatch):
    conv, controller, layer = built()
    maps, _ = drawn(images=4)
    layer.look_at(maps)
    assert not layer.prefers_dense  # no costs are known
    layer.costs = NEVER
    layer.look_at(maps)
    assert layer.prefers_dense
    with monkeypatch.context() as patch:
        patch.setattr(layer, "_groups", None)
        close(layer(maps), masked(conv, controller, maps))
    layer.costs = ALWAYS
    layer.look_at(maps)
    assert not layer.prefers_dense


@pytest.mark.parametrize("case", ["3x3", "one dimension", "depthwise", "pruned", "one channel", "ungated"])
def test_measuring_leaves_no_trace_in_what_it_gives(case, monkeypatch):
    monkeypatch.setattr(skip_conv, "_REPEATS", 1)
    monkeypatch.setattr(skip_conv, "_BETWEEN", 1)
    shape = case if case in SHAPES else "3x3"
    closed = torch.ones(21, dtype=torch.bool) if case == "pruned" else None
    size = {"depthwise": (10, 10), "one channel": (1, 1)}.get(case, (10, 21))
    conv, controller, layer = built(shape, *size, closed=closed, depthwise=case == "depthwise")
    if case == "ungated":
        layer, controller = SkipConv(conv, None), None
    maps, _ = drawn(shape, images=3, inputs=size[0])
    layer.costs = skip_conv.measure(layer, maps[:1])
    assert not layer._kept
    assert layer.by_product <= ({"dense", "sliced"} if layer.can_be_product else set())
    numbers = [getattr(layer.costs, name) for name in CostModel.__dataclass_fields__]
    assert all(0 <= number < 10 for number in numbers)
    assert layer.costs.dense(1) > 0
    close(layer(maps), conv(maps) if controller is None else masked(conv, controller, maps))
