"""`Paths`: packed bits, what is counted from them, files; and the pass over a loader that collects them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from shared import SmallCNN, seeded
from sklearn.metrics import silhouette_score
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters.core import errors
from captum_classfilters.decoupling import Costs, PathDecoupler, Paths
from captum_classfilters.decoupling.costs import ConvCost

CHANNELS = (5, 6)  # 11: not whole bytes
LAYERS = ("conv1", "conv2")
COSTS = Costs((ConvCost("conv1", 0, ["all", 3], 3, 5, 1, 9), ConvCost("conv2", 1, ["gate", 0], 5, 6, 1, 4)), 24, 7)


def bits_of(count=20, seed=0, channels=11):
    return torch.rand(count, channels, generator=torch.Generator().manual_seed(seed)) < 0.5


def paths_of(bits, labels=None, num_classes=4, channels=CHANNELS, layers=LAYERS, **others):
    """Packed by hand: eight to a byte, the first in its lowest bit."""
    rows = []
    for row in bits.tolist():
        row = row + [False] * (-len(row) % 8)
        rows.append([sum(bit << i for i, bit in enumerate(row[b : b + 8])) for b in range(0, len(row), 8)])
    codes = torch.tensor(rows, dtype=torch.uint8).reshape(len(bits), -1)
    labels = None if labels is None else torch.as_tensor(labels)
    return Paths(codes, torch.arange(len(bits)) % 4, labels, layers, channels, num_classes, "f" * 16, COSTS, **others)


@pytest.fixture
def decoupler():
    """K = 5 + 6; about half of the gates are open, and not the same for all images."""
    decoupler = PathDecoupler(seeded(SmallCNN(), 0), LAYERS, reduction=1).eval()
    seeded(decoupler.controllers, 1)
    return decoupler


@pytest.fixture
def data(images):
    tints = 2 * torch.randn(10, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    return images(10) + tints, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])


def reference(decoupler, inputs):
    """Gates of eq. 5 and predictions, layer by layer with the model's own parts."""
    model, (first, second) = decoupler.model, decoupler.controllers
    with torch.no_grad():
        z1 = (first.logits(inputs) > 0).float()
        maps = (model.bn1(model.conv1(inputs)) * z1[..., None, None]).relu()
        z2 = (second.logits(maps) > 0).float()
        maps = (model.bn2(model.conv2(maps)) * z2[..., None, None]).relu()
        logits = model.fc(maps.mean((2, 3)))
    return torch.cat([z1, z2], 1).bool(), logits.argmax(1)


def same(first, second):
    for name in ("codes", "predictions", "labels", "logits"):
        mine, other = getattr(first, name), getattr(second, name)
        assert (mine is None) == (other is None)
        assert mine is None or (torch.equal(mine, other) and mine.dtype == other.dtype), name
    rest = ("layers", "channels", "num_classes", "fingerprint", "costs")
    assert all(getattr(first, name) == getattr(second, name) for name in rest)


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [(1,), (7,), (8,), (3, 5, 1), (5, 6), (16, 1)], ids=str)
def test_bits_come_out_as_they_went_in(channels):
    bits = bits_of(9, seed=1, channels=sum(channels))
    paths = paths_of(bits, channels=channels, layers=tuple(map(str, range(len(channels)))))
    assert paths.codes.shape == (9, -(-sum(channels) // 8))
    assert torch.equal(paths.bits(), bits)
    assert [gate.shape for gate in paths.gates()] == [(9, count) for count in channels]
    assert torch.equal(torch.cat(paths.gates(), 1), bits)
    start = 0
    for index, count in enumerate(channels):
        for name in (index, str(index), index - len(channels)):
            assert torch.equal(paths.bits(name), bits[:, start : start + count])
        start += count


@pytest.mark.parametrize("rows", [
    slice(2, 9), slice(None, None, 3), torch.tensor([3, 3, 0, -1]), torch.arange(20) % 3 == 0, [4, 1], slice(5, 5),
], ids=str)  # fmt: skip
def test_some_of_the_images_keep_what_is_theirs(rows):
    bits, labels = bits_of(), torch.arange(20) % 3
    paths = paths_of(bits, labels, logits=torch.randn(20, 11))
    some = paths[rows]
    assert torch.equal(some.bits(), bits[rows])
    assert torch.equal(some.labels, labels[rows])
    assert torch.equal(some.predictions, paths.predictions[rows])
    assert torch.equal(some.logits, paths.logits[rows])
    assert len(some) == len(bits[rows])
    assert paths_of(bits)[rows].labels is None


@pytest.mark.parametrize("index", [0, 7, 19, -1, -20, np.int64(3)])
def test_one_image_is_still_paths(index):
    bits = bits_of()
    one = paths_of(bits, torch.arange(20))[index]
    assert len(one) == 1
    assert torch.equal(one.bits()[0], bits[index])
    assert one.labels.tolist() == [index % 20]


def test_a_loop_over_images_ends():
    paths = paths_of(bits_of(3))
    assert [one.bits().tolist() for one in paths] == [[row] for row in bits_of(3).tolist()]
    with pytest.raises(IndexError):
        paths[-4]


# -- what is counted, class filters ------------------------------------------------------------------------------------


def test_states_and_rates_are_those_counted_by_hand():
    bits = bits_of(12, seed=3)
    bits[:, [0, 4, 5]] = True
    bits[:, [2, 6, 7]] = False
    bits[0, 1], bits[1:, 1] = True, False
    paths = paths_of(bits)
    table = paths.states()
    assert table.index.tolist() == list(LAYERS)
    for name, part in zip(LAYERS, (bits[:, :5], bits[:, 5:]), strict=True):
        columns = [set(column) for column in zip(*part.tolist(), strict=True)]
        row = table.loc[name]
        found = [int(row[state]) for state in ("energetic", "silent", "dynamic", "channels")]
        assert found == [columns.count({True}), columns.count({False}), columns.count({True, False}), len(columns)]
        assert row["open"] == pytest.approx(sum(map(sum, part.tolist())) / part.numel())
        rates = paths.rates()[LAYERS.index(name)]
        assert rates.dtype == torch.float64
        assert rates.tolist() == pytest.approx([sum(column) / 12 for column in zip(*part.tolist(), strict=True)])
    assert table[["energetic", "silent", "dynamic"]].values.tolist() == [[2, 1, 2], [1, 2, 3]]


def test_distances_are_scipy_s():
    one, other = bits_of(6, 0), bits_of(9, 1)
    expected = cdist(one.numpy(), other.numpy(), "hamming") * 11
    found = paths_of(one).distances(paths_of(other))
    assert found.dtype == torch.int32
    np.testing.assert_allclose(found.numpy(), expected)
    np.testing.assert_allclose(paths_of(one).distances().numpy(), cdist(one.numpy(), one.numpy(), "hamming") * 11)


def test_profiles_are_shares_within_each_class_and_nan_without_images():
    bits, labels = bits_of(15, seed=4), torch.tensor([0, 1, 3] * 5)
    found, counts = paths_of(bits, labels, num_classes=5).profiles()
    assert counts.tolist() == [5, 5, 0, 5, 0]
    assert (found.shape, found.dtype, counts.dtype) == ((5, 11), torch.float64, torch.int64)
    for c in range(5):
        rows = [row for row, label in zip(bits.tolist(), labels.tolist(), strict=True) if label == c]
        expected = [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [np.nan] * 11
        assert found[c].tolist() == pytest.approx(expected, nan_ok=True)


def test_macs_of_a_path_are_open_inputs_times_open_outputs():
    bits = bits_of(8, seed=5)
    expected = [9 * 3 * sum(row[:5]) + 4 * sum(row[:5]) * sum(row[5:]) + 24 for row in bits.tolist()]
    assert paths_of(bits).macs(controllers=False).tolist() == expected
    assert paths_of(bits).macs().tolist() == [count + 7 for count in expected]


@pytest.mark.parametrize("layer", ["conv2", 1, -1])
def test_class_filters_score_a_class_against_the_mean_of_the_others(layer):
    bits, labels = bits_of(30, seed=6), torch.tensor([0, 1, 3] * 10)
    filters = paths_of(bits, labels).class_filters(layer, tuple("abcd"))
    for c in range(4):
        for k in range(6):
            share = {label: sum(bits[labels == label, 5 + k].tolist()) / 10 for label in (0, 1, 3)}
            others = [value for label, value in share.items() if label != c]
            expected = (share[c] - sum(others) / 2, share[c]) if c in share else (0, 0)
            assert (filters.scores[c, k].item(), filters.mass[c, k].item()) == pytest.approx(expected)
    assert filters.counts.tolist() == [10, 10, 0, 10]
    assert (filters.layer, filters.method, filters.class_names) == ("conv2", "paths", tuple("abcd"))
    assert filters.top(2)[2].tolist() == [-1, -1]
    assert bool((filters.top(6)[[0, 1, 3]].sort(1).values == torch.arange(6)).all())


def test_a_planted_filter_is_found_and_such_tables_do_not_merge():
    bits, labels = bits_of(400, seed=7), torch.arange(400) % 4
    for c in range(4):
        bits[:, 5 + c] = labels == c
    bits[:, 10] = True  # open for all: says nothing of a class
    filters = paths_of(bits, labels).class_filters("conv2")
    assert filters.top(1).flatten().tolist() == [0, 1, 2, 3]
    assert filters.scores.diagonal().tolist() == [1.0] * 4
    assert filters.scores[:, 5].tolist() == [0.0] * 4
    assert filters.class_names == ("0", "1", "2", "3")
    with pytest.raises(errors.MergeError, match="cannot be merged: their scores do not add up"):
        type(filters).merge(filters, filters)


# -- merging, embedding ------------------------------------------------------------------------------------------------


def test_merged_paths_are_those_of_one_pass(decoupler, data):
    inputs, labels = data
    whole = decoupler.paths([(inputs, labels)], logits=True)
    parts = [decoupler.paths([(inputs[a:b], labels[a:b])], logits=True) for a, b in ((0, 3), (3, 9), (9, 10))]
    same(Paths.merge(*parts), whole)
    same(Paths.merge(whole[:4], whole[4:]), whole)


@pytest.mark.parametrize(("change", "message"), [
    ({"fingerprint": "0" * 16}, r"another network or other controllers \(fingerprints f{16} and 0{16}\)"),
    ({"layers": ("conv1", "other")}, "of other layers"),
    ({"channels": (6, 5)}, "of other layers"),
    ({"labels": None}, "1 of 2 parts have no labels; collect all with or all without"),
    ({"logits": torch.zeros(20, 11)}, "1 of 2 parts have no logits"),
])  # fmt: skip
def test_paths_that_do_not_belong_together_are_refused(change, message):
    paths = paths_of(bits_of(), torch.arange(20) % 4)
    other = replace(paths, **change)
    with pytest.raises(errors.MergeError, match=message):
        Paths.merge(paths, other)
    if change.keys() & {"fingerprint", "layers", "channels"}:
        with pytest.raises(errors.MergeError, match=message):
            paths.distances(other)


def test_a_fingerprint_is_of_network_and_controllers_and_not_of_what_only_reads(decoupler, data):
    first = decoupler.paths([data])
    assert decoupler.paths([data]).fingerprint == first.fingerprint
    with torch.no_grad():
        decoupler.readers[0].weight.add_(1.0)
    assert decoupler.paths([data]).fingerprint == first.fingerprint
    other = copy.deepcopy(decoupler)
    with torch.no_grad():
        other.model.conv1.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(errors.MergeError, match="another network or other controllers"):
        Paths.merge(first, other.paths([data]))
    with torch.no_grad():
        decoupler.controllers[1].excite.bias[2] += 1e-3
    with pytest.raises(errors.MergeError, match="another network or other controllers"):
        Paths.merge(first, decoupler.paths([data]))


def test_embedded_clusters_that_were_planted_are_apart():
    labels = torch.arange(60) % 3
    centres = bits_of(3, seed=8, channels=60)
    flips = torch.rand(60, 60, generator=torch.Generator().manual_seed(9)) < 0.05
    paths = paths_of(centres[labels] ^ flips, labels, channels=(40, 20))
    points = paths.embed(perplexity=10.0, seed=1)
    assert (points.shape, points.dtype) == ((60, 2), torch.float32)
    assert silhouette_score(points.numpy(), labels.numpy()) > 0.5
    assert torch.equal(points, paths.embed(perplexity=10.0, seed=1))
    with pytest.raises(errors.OptionError, match=r"perplexity must be less than the number of images, 60, got 60\.0"):
        paths.embed(perplexity=60.0)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, torch.arange(20) % 4], ids=["no labels", "labels"])
@pytest.mark.parametrize("logits", [None, torch.linspace(-3, 3, 220).reshape(20, 11)], ids=["bits", "logits"])
def test_saved_and_loaded(tmp_path, labels, logits):
    paths = paths_of(bits_of(), labels, logits=logits)
    paths.save(tmp_path / "paths.safetensors")
    again = Paths.load(tmp_path / "paths.safetensors")
    same(again, paths)
    assert torch.equal(again.macs(), paths.macs())
    same(Paths.merge(paths, again)[20:], paths)


def test_other_files_are_refused(tmp_path, decoupler):
    decoupler.save(tmp_path / "controllers.safetensors")
    with pytest.raises(errors.FileFormatError, match="holds a PathDecoupler; expected a Paths"):
        Paths.load(tmp_path / "controllers.safetensors")
    paths_of(bits_of()).save(tmp_path / "paths.safetensors")
    whole = (tmp_path / "paths.safetensors").read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(errors.FileFormatError, match="not a whole safetensors file"):
            Paths.load(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError):
        Paths.load(tmp_path / "nothing")


# -- the pass over a loader --------------------------------------------------------------------------------------------


def test_bits_are_the_gates_of_each_image_and_nothing_of_the_model_changes(decoupler, data):
    decoupler.train()
    decoupler.model.bn1.eval()
    state = {name: value.clone() for name, value in decoupler.state_dict().items()}
    modes = [module.training for module in decoupler.modules()]
    paths = decoupler.paths([data])
    assert [module.training for module in decoupler.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in decoupler.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoupler.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in decoupler.parameters())
    bits, predictions = reference(decoupler.eval(), data[0])
    assert torch.equal(paths.bits(), bits)
    assert len(bits.unique(dim=0)) > 3
    assert torch.equal(paths.predictions, predictions)
    assert torch.equal(paths.labels, data[1])
    assert (paths.layers, paths.channels, paths.num_classes, len(paths)) == (LAYERS, CHANNELS, 4, 10)
    assert torch.equal(torch.cat(decoupler.gates(data[0])[1], 1).bool(), bits)
    assert "10 images, 2 layers, 11 channels" in repr(paths)


@pytest.mark.parametrize("how", ["loader", "one-shot", "dicts", "lists", "with empty ones", "by one", "other dtype"])
def test_however_the_batches_come_it_is_the_same(decoupler, data, how):
    inputs, labels = data
    whole = decoupler.paths([data])
    cut = [(inputs[a : a + 4], labels[a : a + 4]) for a in (0, 4, 8)]  # the last is ragged
    loader = {
        "loader": DataLoader(TensorDataset(inputs, labels), batch_size=3),
        "one-shot": iter(cut),
        "dicts": [{"pixel_values": x, "label": y} for x, y in cut],
        "lists": [[(x,), y.tolist()] for x, y in cut],
        "with empty ones": [(inputs[:0], labels[:0]), cut[0], (inputs[:0], labels[:0]), *cut[1:]],
        "by one": [(inputs[n : n + 1], labels[n : n + 1]) for n in range(10)],
        "other dtype": [(x.double(), y.to(torch.uint8)) for x, y in cut],
    }[how]
    same(decoupler.paths(loader), whole)


def test_without_labels(decoupler, data):
    for loader in ([data[0]], [(data[0],)], [{"image": data[0]}]):
        paths = decoupler.paths(loader)
        assert paths.labels is None
        assert torch.equal(paths.bits(), decoupler.paths([data]).bits())
        for read in (paths.profiles, lambda paths=paths: paths.class_filters(0)):
            with pytest.raises(errors.LabelError, match="need labels, and the loader gave none"):
                read()


def test_logits_are_g_and_their_sign_is_the_gate(decoupler, data):
    paths = decoupler.paths([(x[None], y[None]) for x, y in zip(*data, strict=True)], logits=True)
    assert (paths.logits.dtype, paths.logits.shape) == (torch.float32, (10, 11))
    assert torch.equal(paths.logits > 0, paths.bits())
    _, logits = decoupler.gate_logits(data[0])
    torch.testing.assert_close(paths.logits.float(), torch.cat(logits, 1).detach(), rtol=1e-3, atol=1e-3)
    assert torch.equal(paths.bits(), decoupler.paths([data]).bits())
    assert decoupler.paths([data]).logits is None


def test_costs_are_those_of_one_image(decoupler, data):
    paths = decoupler.paths([data])
    first, second = (gate.sum(1) for gate in paths.gates())
    expected = 9 * 36 * 3 * first + 9 * 16 * first * second + 6 * 4  # 6x6 and 4x4 positions, the head
    assert torch.equal(paths.macs(controllers=False), expected)
    assert paths.costs.controllers == 3 * 3 + 3 * 5 + 5 * 5 + 5 * 6


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gates_that_are_not_finite_name_layer_and_batch(decoupler, data, logits, bad):
    inputs = data[0].clone()
    inputs[5, 0, 0, 0] = bad
    with pytest.raises(
        errors.NonFiniteError, match=r"the gates of conv1 are not finite: its input overflowed .*; look at batch 2"
    ):
        decoupler.paths(list(zip(inputs.split(2), data[1].split(2), strict=True)), logits=logits)
    for module, message in (("fc", "the logits of batch 0 hold NaN"), ("bn1", "the gates of conv2 .* at batch 0")):
        with torch.no_grad():
            decoupler.model.get_submodule(module).bias[0] = torch.nan
        with pytest.raises(errors.NonFiniteError, match=message):
            decoupler.paths([data], logits=logits)


@pytest.mark.parametrize(("loader", "error", "message"), [
    (lambda x, y: [], errors.EmptyLoaderError, "the loader gave no sample"),
    (lambda x, y: [(x[:0], y[:0])], errors.EmptyLoaderError, "the loader gave no sample"),
    (lambda x, y: [(x, y), x], errors.LabelError, "1 of 2 batches have labels; give them for all or for none"),
    (lambda x, y: 3, errors.OptionError, "expected a DataLoader or an iterable of batches, got int"),
    (lambda x, y: [(x, y), (x, y[:3])], errors.LabelError, r"must have shape \(10,\), got \(3,\) in batch 1"),
    (lambda x, y: [(x, y), (x, y + 1)], errors.LabelError, r"must lie in \[0, 4\), got 4 in batch 1"),
    (lambda x, y: [(x, y - 1)], errors.LabelError, r"must lie in \[0, 4\), got -1 in batch 0"),
    (lambda x, y: [x, x[..., :6]], errors.ShapeError, r"batch 1 has inputs of size \(3, 8, 6\), those before it"),
    (lambda x, y: [{"weight": x}], errors.ShapeError, "batch 0 is a mapping with keys"),
])  # fmt: skip
def test_bad_loaders_are_refused(decoupler, data, loader, error, message):
    with pytest.raises(error, match=message):
        decoupler.paths(loader(*data))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoupler.modules())


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda p: p.bits("conv9"), errors.OptionError, "must be one of 'conv1', 'conv2', or its index, got 'conv9'"),
    (lambda p: p.bits(2), errors.OptionError, "or its index, got 2"),
    (lambda p: p.bits(-3), errors.OptionError, "or its index, got -3"),
    (lambda p: p.class_filters(True), errors.OptionError, "or its index, got True"),
    (lambda p: p[::4].class_filters(0), errors.OptionError, "at least two classes, got 1"),
    (lambda p: p.embed(perplexity=5, components=0), errors.OptionError, "components must be at least 1, got 0"),
    (lambda p: Paths.merge(), errors.MergeError, "at least one part"),
    (lambda p: Paths.merge(p, []), errors.MergeError, "expected Paths, got list"),
])  # fmt: skip
def test_bad_questions_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(paths_of(bits_of(), torch.arange(20) % 4))


def test_a_model_that_gives_no_logits_is_refused(data):
    model = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 1) for _ in range(3)))
    with pytest.raises(errors.ShapeError, match=r"expected logits \(N, C\) from the model, got \(10, 3, 8, 8\)"):
        PathDecoupler(model).paths([data])
