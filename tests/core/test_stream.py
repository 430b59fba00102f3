"""One pass over a loader: every batch read once, whatever the loader; bad input refused with the way out."""

import weakref

import pytest
import torch
from reading import batches
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from captum_classfilters import InfluentialFeatures
from captum_classfilters.core.errors import (
    DeviceError,
    EmptyLoaderError,
    HeadError,
    LabelError,
    NonFiniteError,
    OptionError,
    ShapeError,
)

SIZES = (4, 4, 3)  # ragged


@pytest.fixture
def data(images):
    """The batches, as pairs."""
    return [(images(size, seed=seed), torch.arange(size) % 4) for seed, size in enumerate(SIZES, start=1)]


def consume(model, loader, **options):
    """All batches, their tensors joined: features, logits, labels."""
    with batches(model, loader, **options) as stream:
        found = list(stream)
    labels = [batch.labels for batch in found if batch.labels is not None]
    return (
        torch.cat([batch.features for batch in found]),
        torch.cat([batch.logits for batch in found]),
        torch.cat(labels) if labels else None,
    )


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, pairs):
        self.samples = [sample for images, labels in pairs for sample in zip(images, labels, strict=True)]

    def __iter__(self):
        return iter(self.samples)


class NoLength:
    """An iterable that does not know how long it is."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        return iter(self.pairs)


def joined(pairs):
    return TensorDataset(*(torch.cat(parts) for parts in zip(*pairs, strict=True)))


LOADERS = {
    "tuples": lambda pairs: pairs,
    "lists": lambda pairs: [list(pair) for pair in pairs],
    "a tuple of batches": tuple,
    "image, label": lambda pairs: [{"image": x, "label": y} for x, y in pairs],
    "pixel_values, labels": lambda pairs: [{"labels": y, "pixel_values": x, "other": 1} for x, y in pairs],
    "more than two": lambda pairs: [(x, y, "where it came from") for x, y in pairs],
    "one-shot generator": lambda pairs: (pair for pair in pairs),
    "no length": NoLength,
    "labels in a list": lambda pairs: [(x, y.tolist()) for x, y in pairs],
    "labels of int32": lambda pairs: [(x, y.int()) for x, y in pairs],
    "labels of uint8": lambda pairs: [(x, y.byte()) for x, y in pairs],
    "inputs in a list": lambda pairs: [([x], y) for x, y in pairs],
    "inputs of float64": lambda pairs: [(x.double(), y) for x, y in pairs],
    "DataLoader": lambda pairs: DataLoader(joined(pairs), batch_size=4),
    "IterableDataset": lambda pairs: DataLoader(Stream(pairs), batch_size=4),
    "with an empty batch": lambda pairs: [pairs[0], (pairs[0][0][:0], pairs[0][1][:0]), *pairs[1:]],
    "an empty batch first": lambda pairs: [(pairs[0][0][:0], pairs[0][1][:0]), *pairs],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_every_batch_is_read_once(kind, small_cnn, data):
    """Against the network's own penultimate activations, and by count of forward passes and samples."""
    model, sizes = small_cnn(), []
    model.conv1.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    features, logits, labels = consume(model, LOADERS[kind](data))
    assert sizes == list(SIZES)
    with torch.no_grad():
        images = torch.cat([images for images, _ in data])
        torch.testing.assert_close(features, model.penultimate(images))
        torch.testing.assert_close(logits, model(images))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [label for _, labels in data for label in labels.tolist()]


def test_the_loader_is_not_read_ahead(small_cnn, data):
    given = []

    def loader():
        for index, pair in enumerate(data):
            given.append(index)
            yield pair

    with batches(small_cnn(), loader()) as stream:
        for index, _ in enumerate(stream):
            assert given == list(range(index + 1))


@pytest.mark.parametrize("kind", ["tensors", "in lists", "mappings"])
def test_without_labels(kind, small_cnn, data):
    loaders = {
        "tensors": [x for x, _ in data],
        "in lists": [[x] for x, _ in data],
        "mappings": [{"pixel_values": x} for x, _ in data],
    }
    features, _, labels = consume(small_cnn(), loaders[kind], need_labels=False)
    assert len(features) == sum(SIZES)
    assert labels is None
    with pytest.raises(LabelError, match=r'batch 0 has no labels.*label_source="prediction"'):
        consume(small_cnn(), loaders[kind])


class Fusion(nn.Module):
    """Two inputs, and an option of its forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.options = []

    def forward(self, images, offsets, *options):
        self.options.append(options)
        return self.model(images + offsets[:, None, None, None])


def test_several_inputs(small_cnn, data):
    inner = small_cnn()
    model = Fusion(inner)
    pairs = [((x, torch.full((len(x),), 0.5)), y) for x, y in data]
    features, _, _ = consume(model, pairs, additional_forward_args="as they come")
    torch.testing.assert_close(features, inner.penultimate(torch.cat([x for x, _ in data]) + 0.5).detach())
    assert model.options == [("as they come",)] * 3
    consume(model, pairs, additional_forward_args=(1, 2))
    assert model.options[-1] == (1, 2)


def test_integer_inputs_are_left_as_they_are():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(12, 4))
    features, _, _ = consume(model.bfloat16(), [torch.tensor([[0, 1], [2, 4]])], need_labels=False)
    assert torch.equal(features, model[0].weight[[0, 1, 2, 4]].reshape(2, 12))


def test_maps_of_every_batch(small_cnn, data):
    model, maps = small_cnn(), []
    with batches(model, data, need_maps=True) as stream:
        for batch in stream:
            torch.testing.assert_close(batch.maps.mean((2, 3)), batch.features)
            maps.append(batch.maps)
    assert [tuple(m.shape) for m in maps] == [(size, 6, 4, 4) for size in SIZES]


def test_maps_are_those_of_the_forward_pass(data):
    """Whatever the network does in place with them afterwards."""

    class Wipes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, images):
            maps = self.conv(images)
            features = maps.mean((2, 3))
            maps.zero_()
            return self.fc(features)

    with batches(Wipes(), data, need_maps=True) as stream:
        for batch in stream:
            torch.testing.assert_close(batch.maps.mean((2, 3)), batch.features)


def test_largest_is_of_the_features(small_cnn, data):
    with batches(small_cnn(), data) as stream:
        for batch in stream:
            assert batch.largest == float(batch.features.abs().max())


# -- labels ------------------------------------------------------------------------------------------------------------

LABELS = {
    "too high": (torch.tensor([0, 1, 2, 4]), r"in \[0, 4\), got 4 in batch 1; the head has 4 outputs"),
    "negative": (torch.tensor([0, 1, 2, -1]), r"in \[0, 4\), got -1 in batch 1"),
    "fractions": (torch.tensor([0.0, 1.5, 2.0, 3.0]), "integers, got torch.float32 with fractions in batch 1"),
    "many": (
        torch.eye(4) + torch.eye(4).flip(0),
        r"one class for each sample.*\(4, 4\) in batch 1 with 2 to 2 classes",
    ),
    "soft": (torch.full((4, 4), 0.25), r"\(4,\), got \(4, 4\) in batch 1 with other numbers.*look like soft labels"),
    "two kinds": (
        torch.tensor([[0, 3]] * 4),
        r"\(4,\), got \(4, 2\) in batch 1.*several kinds.*Batches\(loader, unpack=",
    ),
    "a row": (torch.zeros(1, 4, dtype=torch.int64), r"\(4,\), got \(1, 4\) in batch 1; pass one class index"),
    "too few": (torch.tensor([0, 1, 2]), r"\(4,\), got \(3,\) in batch 1"),
    "one number": (torch.tensor(2), r"\(4,\), got \(\) in batch 1"),
    "names": (("cat", "dog", "cat", "dog"), "integers, got tuple in batch 1 of text such as 'cat'"),
    "nothing": ([None] * 4, "integers, got list in batch 1"),
    "missing": (None, "batch 1 has no labels"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_bad_labels_are_refused(kind, small_cnn, data):
    labels, message = LABELS[kind]
    with pytest.raises(LabelError, match=message):
        consume(small_cnn(), [data[0], (data[1][0], labels)])


@pytest.mark.parametrize("kind", ["fractions", "many", "too few", "names"])
def test_what_is_wrong_with_labels_alone_is_known_before_the_model_runs(kind, small_cnn, data):
    model, calls = small_cnn(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(LabelError):
        consume(model, [(data[0][0], LABELS[kind][0])])
    assert not calls


# -- loaders that give nothing, or something else ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "loader",
    [[], iter(()), [(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))] * 2],
    ids=["no batch", "used up", "empty batches"],
)
def test_nothing_to_read_is_refused(loader, small_cnn):
    with pytest.raises(EmptyLoaderError, match=r"gave no sample; expected at least one batch.*pass the loader itself"):
        consume(small_cnn(), loader)


BATCHES = {
    "a string": ("cat.png", "batch 0 is str; expected"),
    "an empty list": ([], "batch 0 is list; expected"),
    "unknown keys": ({"foto": torch.zeros(1), "label": 1}, r"keys \['foto', 'label'\]; expected one of \['image'"),
    "paths": ((["a.png", "b.png"], torch.tensor([0, 1])), "expected a tensor of inputs, got str"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_other_batches_are_refused(kind, small_cnn):
    raw, message = BATCHES[kind]
    with pytest.raises(ShapeError, match=message):
        consume(small_cnn(), [raw])


def test_what_is_no_loader_or_no_model_is_refused(small_cnn):
    with pytest.raises(OptionError, match="a DataLoader or an iterable of batches, got int"):
        consume(small_cnn(), 3)
    with pytest.raises(OptionError, match=r"an nn\.Module or a function, got str"):
        consume("resnet18", [])


# -- numbers and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_is_refused_with_layer_and_batch(value, where, small_cnn, data):
    pairs = [(x.clone(), y) for x, y in data]
    pairs[where][0][2, 1] = value
    with pytest.raises(NonFiniteError, match=f"at the input of layer fc in batch {where}"):
        consume(small_cnn(), pairs)


def test_a_number_of_classes_that_is_not_the_heads_is_refused(small_cnn, data):
    assert len(consume(small_cnn(), data, num_classes=4)[0]) == 11
    with pytest.raises(OptionError, match="num_classes=10, but the head fc has 4 outputs; leave it out, or pass 4"):
        consume(small_cnn(), data, num_classes=10)


def test_a_head_that_skips_a_batch_is_refused(small_cnn, data):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_cnn()

        def forward(self, x):
            return self.model(x) if len(x) == 4 else x.mean((2, 3))

    with pytest.raises(HeadError, match=r"layer model\.fc did not run in batch 2"):
        consume(Moody(), data)


# -- devices and precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["cuda", "cuda:1", "meta", torch.device("cuda:0")], ids=str)
def test_another_device_is_refused(asked, small_cnn, data):
    with pytest.raises(DeviceError, match=f"the model is on cpu, but device='{asked}' was asked for; move it yourself"):
        consume(small_cnn(), data, device=asked)


@pytest.mark.parametrize("asked", [None, "cpu", torch.device("cpu")], ids=str)
def test_the_models_own_device_is_fine(asked, small_cnn, data):
    assert len(consume(small_cnn(), data, device=asked)[0]) == 11


def test_batches_follow_the_model(device, small_cnn, data, assert_close):
    with device.mode:
        model = small_cnn(device=device.name)
        with batches(model, data, need_maps=True) as stream:
            for (images, _), batch in zip(data, stream, strict=True):
                tensors = (*batch.inputs, batch.features, batch.logits, batch.labels, batch.maps)
                assert {tensor.device.type for tensor in tensors} == {device.name}
                with torch.no_grad():
                    assert_close(batch.features, model.penultimate(images.to(device.name)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_batches_take_the_models_precision(dtype, small_cnn, data):
    model = small_cnn().to(dtype)
    features, _, _ = consume(model, data)
    assert features.dtype == dtype
    torch.testing.assert_close(features, torch.cat([model.penultimate(x.to(dtype)).detach() for x, _ in data]))


# -- memory and progress -----------------------------------------------------------------------------------------------


def test_earlier_batches_are_let_go(small_cnn, images):
    """Of all that was read, what is alive at a time does not grow."""
    alive, most = weakref.WeakSet(), 0

    def loader():
        nonlocal most
        for seed in range(8):
            most = max(most, len(alive))
            batch = images(4, seed=seed)
            alive.add(batch)
            yield batch, torch.arange(4)

    kept = weakref.WeakSet()
    with batches(small_cnn(), loader()) as stream:
        for batch in stream:
            kept.add(batch.features)
            assert len(kept) <= 2
    # the one just worked on may still be there while the next is made
    assert most == 1


def test_a_table_keeps_no_batch(small_cnn, images):
    alive = weakref.WeakSet()

    def loader():
        for seed in range(3):
            batch = images(4, seed=seed)
            alive.add(batch)
            yield batch, torch.arange(4)

    method = InfluentialFeatures(small_cnn())
    filters = method.attribute(loader())
    assert not alive
    assert filters.counts.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("shown", [False, True])
def test_progress_is_shown_only_when_asked_for(shown, small_cnn, data, capsys):
    consume(small_cnn(), data, show_progress=shown, description="reading")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("reading" in printed.err) == shown
    assert ("3/3" in printed.err) == shown


def test_progress_without_a_length(small_cnn, data, capsys):
    consume(small_cnn(), NoLength(data), show_progress=True)
    assert "3it" in capsys.readouterr().err


def test_tables_do_not_depend_on_progress(small_cnn, data, capsys):
    method = InfluentialFeatures(small_cnn())
    quiet, shown = (method.attribute(data, show_progress=show) for show in (False, True))
    assert torch.equal(quiet.scores, shown.scores)
    assert "InfluentialFeatures" in capsys.readouterr().err
