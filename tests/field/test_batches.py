"""Batches as other people's loaders give them: what is unambiguous is read, the rest is refused."""

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import Batches, HeadMoments, InfluentialFeatures, PathDecoupler, compare, metrics, recover
from captum_classfilters.comparison import aggregate
from captum_classfilters.core.errors import (
    EmptyLoaderError,
    FileFormatError,
    LabelError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from captum_classfilters.core.stream import samples

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(12, 3, 8, 8, generator=GENERATOR)
LABELS = torch.arange(12) % 4
META = torch.arange(12) % 3  # cameras: integers that could be labels
Named = namedtuple("Named", ["meta", "label", "image"])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def read(loader, **options):
    with samples(loader, **options) as stream:
        return [(batch.inputs, batch.labels, batch.extras) for batch in stream]


def labels_read(loader, **options):
    parts = [labels for _, labels, _ in read(loader, **options)]
    return None if parts[0] is None else torch.cat(parts).tolist()


TAKEN = {
    "a column": [(IMAGES, LABELS[:, None])],
    "two axes of one": [(IMAGES, LABELS[:, None, None])],
    "whole floats": [(IMAGES, LABELS.float())],
    "floats of a column": [(IMAGES, LABELS.double()[:, None])],
    "one-hot": [(IMAGES, torch.eye(4)[LABELS])],
    "tensors of no axis": [(IMAGES, tuple(LABELS))],
    "named, in another order": [Named(META, LABELS, IMAGES)],
    "images not put together": [(list(IMAGES), LABELS)],
    "zipped by the collate function": [tuple(zip(*TensorDataset(IMAGES, LABELS), strict=True))],
    "PIL beside tensors": [{"image": ["a picture"] * 12, "pixel_values": IMAGES, "labels": LABELS}],
    "the same labels twice": [{"x": IMAGES, "label": LABELS, "target": LABELS.clone()}],
    "a mask and weights behind": [(IMAGES, LABELS, torch.rand(12, 8, 8) > 0.5, torch.rand(12), torch.rand(12) > 0.5)],
    "keys": Batches([{"foto": IMAGES, "cls": LABELS, "id": META}], input_key="foto", label_key="cls"),
    "a position": Batches([(IMAGES, META, LABELS)], label_key=2),
    "positions": Batches([(META, LABELS, IMAGES)], input_key=2, label_key=1),
    "the last": Batches([(IMAGES, ["a.png"] * 12, LABELS)], label_key=-1),
    "a function": Batches([(IMAGES, META, LABELS)], lambda batch: (batch[0], batch[2])),
    "attributes": Batches([SimpleNamespace(foto=IMAGES, cls=LABELS)], input_key="foto", label_key="cls"),
    "inside": Batches([(IMAGES, {"class": LABELS})], unpack=lambda batch: (batch[0], batch[1]["class"])),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_can_mean_one_thing_is_read(kind):
    ((inputs, labels, _),) = read(TAKEN[kind])
    assert torch.equal(inputs[0], IMAGES)
    assert torch.equal(labels, LABELS)
    assert labels.dtype == torch.int64


REFUSED = {
    "two that could be": ((IMAGES, META, LABELS), LabelError, r"\[1, 2\].* could all.*label_key=1 or label_key=2"),
    "metadata first": ((IMAGES, {"camera": 1}, LABELS), LabelError, "part 1, dict with .*label_key=2"),
    "paths first": ((IMAGES, ["a.png"] * 12, LABELS), LabelError, "part 1, list of 12 .str.,.*label_key=2"),
    "boxes first": ((IMAGES, torch.rand(12, 4), LABELS), LabelError, "part 1, a tensor torch.float32.*label_key=2"),
    "two keys": ({"x": IMAGES, "label": META, "target": LABELS}, LabelError, "several keys for the labels.*label_key="),
    "two inputs": ({"image": IMAGES, "x": IMAGES + 1, "y": LABELS}, ShapeError, "for the inputs.*input_key="),
    "targets of a detector": ((IMAGES, [{"labels": 1}] * 12), LabelError, "of mappings with the keys.*unpack=lambda"),
    "unequal images": (
        ([torch.rand(3, 8, 8), torch.rand(3, 9, 7), torch.rand(3, 8, 8), torch.rand(3, 8, 8)], LABELS[:4]),
        ShapeError, "a list of 4 images of unequal sizes.*resize them"),
    "three unequal images": (
        ([torch.rand(3, 8, 8), torch.rand(3, 9, 7), torch.rand(3, 8, 8)], LABELS[:3]),
        ShapeError, "a list of 3 images of unequal sizes"),
    "unequal images alone": (
        [[torch.rand(3, 8, 8), torch.rand(3, 9, 7)]], ShapeError, "a list of 2 images of unequal sizes"),
    "three images or three inputs": (
        (list(IMAGES[:3]), LABELS[:3]), ShapeError, r"could be 3 images or 3 inputs; .*torch\.stack"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_mean_two_things_is_refused(kind):
    raw, error, message = REFUSED[kind]
    with pytest.raises(error, match=message):
        read([raw], need_labels=kind != "unequal images alone")


def test_the_remedies_work():
    assert labels_read(Batches([REFUSED["two that could be"][0]], label_key=2)) == LABELS.tolist()
    assert labels_read(Batches([REFUSED["metadata first"][0]], label_key=2)) == LABELS.tolist()
    assert labels_read(Batches([REFUSED["two keys"][0]], label_key="target")) == LABELS.tolist()
    ((inputs, _, _),) = read(Batches([REFUSED["two inputs"][0]], input_key="image"))
    assert torch.equal(inputs[0], IMAGES)
    stacked = Batches([REFUSED["three images or three inputs"][0]], lambda b: (torch.stack(list(b[0])), b[1]))
    assert torch.equal(read(stacked)[0][0][0], IMAGES[:3])


def test_several_inputs_and_what_stands_behind_stay():
    other = torch.rand(12, 5)
    ((inputs, labels, extras),) = read([((IMAGES, other), LABELS, "mask")])
    assert inputs[1] is other
    assert extras == ("mask",)
    both = Batches([{"a": IMAGES, "b": other, "y": LABELS}], input_key=["a", "b"])
    ((inputs, labels, extras),) = read(both)
    assert torch.equal(inputs[1], other)
    assert torch.equal(labels, LABELS)
    assert set(extras) == {"a", "b", "y"}
    ((_, _, extras),) = read(Batches([(IMAGES, META, LABELS, "mask")], label_key=2))
    assert torch.equal(extras[0], META)
    assert extras[1] == "mask"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Batches(3), "a DataLoader or an iterable"),
        (lambda: Batches([], "label"), "unpack must be a function"),
        (lambda: Batches([], lambda b: b, label_key=2), "leave input_key= and label_key= out"),
        (lambda: read(Batches([(IMAGES, LABELS)], label_key=2)), "label_key=2 is not in batch 0, which is tuple of 2"),
        (lambda: read(Batches([{"x": IMAGES}], label_key="cls")), "label_key='cls' is not in batch 0"),
        (lambda: read(Batches([(IMAGES, LABELS)], lambda b: {"x": b})), "unpack must return"),
    ],
)
def test_wrong_batches_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ({"x": IMAGES, "y": LABELS}, OptionError, r"got dict; if it is one batch, pass \[batch\]"),
        (TensorDataset(IMAGES, LABELS), OptionError, r"got TensorDataset; .*DataLoader\(dataset, batch_size=64\)"),
        (list(TensorDataset(IMAGES, LABELS)), ShapeError, r"batch 0 is a single sample, .*\(3, 8, 8\) with one label"),
        ([(image, int(label)) for image, label in TensorDataset(IMAGES, LABELS)], ShapeError, "is a single sample"),
        ([{"pixel_values": IMAGES[0], "labels": 3}], ShapeError, "is a single sample"),
        ([(IMAGES[0], np.int64(3))], ShapeError, "is a single sample"),
    ],
)
def test_what_is_no_loader_is_refused(loader, error, message):
    for call in (InfluentialFeatures(network()).attribute, lambda x: HeadMoments.collect(network(), x), read):
        with pytest.raises(error, match=message):
            call(loader)


def test_batches_stand_for_their_loader():
    data = TensorDataset(IMAGES, META, LABELS)
    data.classes = ["ant", "bee", "cat", "dog"]
    loader = Batches(DataLoader(data, batch_size=5), label_key=2)
    assert len(loader) == 3
    assert loader.batch_size == 5
    table = InfluentialFeatures(network()).attribute(loader)
    assert table.class_names == ("ant", "bee", "cat", "dog")
    assert table.counts.tolist() == [3, 3, 3, 3]
    frame = compare(network(), loader, loader, ks=[2])
    assert set(frame.samples) == {12}
    with pytest.raises(EmptyLoaderError, match="loader is an iterator"):
        compare(network(), Batches(iter([]), label_key=2), loader, ks=[2])


NO_LABELS = {
    "paths": [f"{n}.png" for n in range(12)],
    "minus one": torch.full((12,), -1),
    "many": torch.ones(12, 4),
    "soft": torch.full((12, 4), 0.25),
    "mappings": [{"label": 3}] * 12,
    "none": None,
}


@pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.UnseenClassWarning")
@pytest.mark.parametrize("kind", NO_LABELS)
def test_labels_that_are_not_needed_are_not_refused(kind):
    model, loader = network(), [(IMAGES, NO_LABELS[kind])]
    predicted = InfluentialFeatures(model).attribute([(IMAGES, model(IMAGES).argmax(1))])
    if kind != "many":  # there more than one class is predicted
        by_model = InfluentialFeatures(model).attribute(loader, label_source="prediction")
        assert torch.equal(by_model.scores, predicted.scores)
    moments = HeadMoments.collect(model, loader)
    assert torch.equal(moments.total, HeadMoments.collect(model, [IMAGES]).total)
    from captum.attr import LayerGradientXActivation

    table = aggregate(LayerGradientXActivation(model, model[0]), loader, label_source="prediction")
    assert torch.equal(table.counts, predicted.counts)
    assert PathDecoupler(network(), ["0"]).paths(loader).labels is None


@pytest.mark.filterwarnings("ignore::captum_classfilters.core.errors.UnseenClassWarning")
def test_labels_out_of_range_are_no_reason_either():
    model = network()
    assert HeadMoments.collect(model, [(IMAGES, LABELS + 7)]).count == 12
    table = InfluentialFeatures(model).attribute([(IMAGES, LABELS - 1)], label_source="prediction", num_classes=4)
    assert int(table.counts.sum()) == 12


def test_where_labels_count_if_there_are_some_wrong_ones_are_refused():
    with pytest.raises(LabelError, match=r"in \[0, 4\), got 4 in batch 0"):
        PathDecoupler(network(), ["0"]).paths([(IMAGES, LABELS + 1)])


def test_text_says_what_it_is():
    with pytest.raises(LabelError, match=r"got list in batch 0 of text such as '0\.png'; pass class indices"):
        InfluentialFeatures(network()).attribute([(IMAGES, NO_LABELS["paths"])])


# -- recover -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [(IMAGES[:0], LABELS[:0]), (IMAGES[:0], [])])
def test_empty_batches_are_passed_over_in_training(empty):
    plain = recover(network(), [(IMAGES, LABELS)], 2, lr=0.01, validation=[(IMAGES, LABELS)])
    between = recover(network(), [empty, (IMAGES, LABELS), empty], 2, lr=0.01, validation=[empty, (IMAGES, LABELS)])
    for one, other in zip(plain.parameters(), between.parameters(), strict=True):
        assert bool(torch.isfinite(other).all())
        torch.testing.assert_close(one, other)
    with pytest.raises(EmptyLoaderError):
        recover(network(), [empty])


WHOLE = [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]


@pytest.mark.parametrize(
    "other",
    [
        [(x + 1, y) for x, y in WHOLE],
        [(x, y.flip(0)) for x, y in WHOLE],
        [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])],
    ],
    ids=["images", "labels", "cut elsewhere"],
)
def test_training_does_not_go_on_with_a_list_of_other_batches(other, tmp_path):
    recover(network(), WHOLE, 1, checkpoint=tmp_path / "c.pt")
    with pytest.raises(FileFormatError, match="was made with another loader: batches of the list are others"):
        recover(network(), other, 2, checkpoint=tmp_path / "c.pt")
    again = [(x.clone(), y.clone()) for x, y in WHOLE]
    resumed = recover(network(), again, 2, checkpoint=tmp_path / "c.pt")
    through = recover(network(), WHOLE, 2)
    for one, other in zip(resumed.parameters(), through.parameters(), strict=True):
        assert torch.equal(one, other)
    recover(network(), WHOLE[:1], 3, checkpoint=tmp_path / "c.pt")  # it may lose samples


def test_what_an_unfinished_epoch_has_read_stays(tmp_path):
    bad = (IMAGES[:6] * torch.nan, LABELS[:6])
    with pytest.raises(NonFiniteError):
        recover(network(), [*WHOLE, bad], 1, checkpoint=tmp_path / "c.pt")
    with pytest.raises(FileFormatError, match="batches before step 2 of the list are not the same"):
        recover(network(), [WHOLE[1], WHOLE[0], WHOLE[1]], 1, checkpoint=tmp_path / "c.pt")
    recover(network(), WHOLE, 1, checkpoint=tmp_path / "c.pt")


def test_a_metric_reads_odd_batches():
    model, odd = network(), Batches([(IMAGES, META, LABELS)], label_key=2)
    table = InfluentialFeatures(model).attribute(odd)
    one, other = (metrics.accuracy_curve(model, table, loader, [2]) for loader in (odd, [(IMAGES, LABELS)]))
    assert one.equals(other)
