"""Every kind of loader gives the same table, to everything that reads one."""

import pytest
import torch
from captum.attr import LayerGradientXActivation
from gated_models import Net, decoupled, firing, tinted
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from captum_classfilters import HeadMoments, InfluentialFeatures, LayerGradCamPlusPlus, metrics
from captum_classfilters.comparison import aggregate

# without CUDA nothing is pinned, and torch says so
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")

IMAGES, LABELS = tinted(11, seed=5), torch.arange(11) % 4


class Unsized(IterableDataset):
    """Samples one after another; how many, nobody knows. Workers share them."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter([(IMAGES[i], int(LABELS[i])) for i in range(first, 11, step)])


class Opened:
    """Batches, from an object that has an ``__iter__`` and no more."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def by_name(samples):
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels), "idx": list(range(len(labels)))}


def pairs(size):
    return list(zip(IMAGES.split(size), LABELS.split(size), strict=True))


def samples(**options):
    return DataLoader(TensorDataset(IMAGES, LABELS), shuffle=False, **options)


LOADERS = {
    "DataLoader": lambda: samples(batch_size=11),
    "ragged last batch": lambda: samples(batch_size=4),
    "one sample batches": lambda: samples(batch_size=1),
    "two workers": lambda: samples(batch_size=4, num_workers=2),
    "pinned": lambda: samples(batch_size=4, pin_memory=True),
    "collated to dicts": lambda: samples(batch_size=4, collate_fn=by_name),
    "dicts from two workers": lambda: samples(batch_size=4, collate_fn=by_name, num_workers=2),
    "sampler of batches": lambda: samples(batch_sampler=[[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10]]),
    "IterableDataset": lambda: DataLoader(Unsized(), batch_size=4),
    "IterableDataset, two workers": lambda: DataLoader(Unsized(), batch_size=4, num_workers=2),
    "list of tuples": lambda: pairs(4),
    "list of lists": lambda: [list(pair) for pair in pairs(4)],
    "tuple of batches": lambda: tuple(pairs(4)),
    "generator": lambda: (pair for pair in pairs(4)),
    "iterator of a DataLoader": lambda: iter(samples(batch_size=4)),
    "map": lambda: map(tuple, pairs(3)),
    "no length": lambda: Opened(pairs(4)),
    "labels as numbers": lambda: [(x, y.tolist()) for x, y in pairs(4)],
    "labels of int32": lambda: [(x, y.int()) for x, y in pairs(4)],
    "images of float64": lambda: [(x.double(), y) for x, y in pairs(4)],
    "more than two things": lambda: [(x, y, "where from", 3) for x, y in pairs(4)],
    "an empty batch between": lambda: [pairs(4)[0], (IMAGES[:0], LABELS[:0]), *pairs(4)[1:]],
}


def of(table):
    return table.scores, table.mass, table.counts


def frame(found):
    return (torch.from_numpy(found.select_dtypes("number").to_numpy(dtype="float64", na_value=-1.0)),)


def moments(net, loader):
    found = HeadMoments.collect(net, loader)
    return found.total, found.second, torch.tensor(found.count)


def paths(net, loader):
    found = decoupled(net).paths(loader, logits=True)
    return found.bits(), found.logits, found.labels


READERS = {
    "InfluentialFeatures": lambda net, loader: of(InfluentialFeatures(net).attribute(loader)),
    "InfluentialFeatures, several": lambda net, loader: tuple(
        value
        for each in InfluentialFeatures(net).attribute(loader, selector=["contribution", "margin"]).values()
        for value in of(each)
    ),
    "InfluentialFeatures, predictions": lambda net, loader: of(
        InfluentialFeatures(net).attribute(loader, label_source="prediction")
    ),
    "HeadMoments": moments,
    "paths": paths,
    "aggregate": lambda net, loader: of(aggregate(LayerGradientXActivation(net, net.conv2), loader)),
    "aggregate, Grad-CAM++": lambda net, loader: of(
        aggregate(LayerGradCamPlusPlus(net, net.conv2), loader, attr_dim_summation=False)
    ),
    "accuracy_curve": lambda net, loader: frame(
        metrics.accuracy_curve(net, InfluentialFeatures(net).attribute(pairs(4)), loader, [1, 3])
    ),
}


@pytest.mark.filterwarnings(
    "ignore::captum_classfilters.core.errors.UnseenClassWarning"
)  # not every class is predicted
@pytest.mark.parametrize("reader", READERS)
def test_every_kind_of_loader_gives_the_same_table(reader):
    net = firing(Net())
    expected = READERS[reader](net, [(IMAGES, LABELS)])
    assert all(float(value.double().abs().max()) > 0 for value in expected)
    # the one order that is another: by turns a batch from either worker
    by_turns = torch.cat([torch.arange(worker, 11, 2)[at : at + 4] for at in (0, 4) for worker in (0, 1)])
    for name, make in LOADERS.items():
        turned = (reader, name) == ("paths", "IterableDataset, two workers")
        for one, other in zip(READERS[reader](net, make()), expected, strict=True):
            # float32 features of other batches differ in their last digits
            torch.testing.assert_close(
                one,
                other[by_turns] if turned else other,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("name", LOADERS)
def test_no_kind_of_loader_is_read_more_than_once(name):
    net, seen = firing(Net()), []
    handle = net.conv1.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    InfluentialFeatures(net).attribute(LOADERS[name]())
    handle.remove()
    assert sum(seen) == 11
