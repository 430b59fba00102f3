"""`accuracy_curve` with refits, against the networks that `decompose` makes."""

import pytest
import torch

from captum_classfilters import ClassFilters, HeadMoments, HeadPass, InfluentialFeatures, decompose, metrics
from captum_classfilters.assets import load_demo_network, load_images
from captum_classfilters.core.errors import OptionError, ShapeError


@pytest.fixture(scope="module")
def trained():
    """The same, of a network that has learned something."""
    model, _ = load_demo_network()
    loader = load_images("train").batches()[:1]
    tables = InfluentialFeatures(model).attribute(loader, selector=["histogram", "margin"])
    return model, tables, HeadMoments.collect(model, loader), load_images("test").batches(100)[:1]


@pytest.fixture
def task(small_cnn, images):
    """A network, its tables and moments, and images to judge by."""
    model = small_cnn()
    loader = [(images(60, seed), torch.arange(60) % 4) for seed in (1, 2)]
    tables = InfluentialFeatures(model).attribute(loader, selector=["histogram", "margin"])
    return model, tables, HeadMoments.collect(model, loader), [(images(80, 9), torch.arange(80) % 4)]


def share_right(model, loader):
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in loader) / sum(len(y) for _, y in loader)


def accuracy(curve, name, k):
    rows = curve[(curve.filters == name) & (curve.k == k) & (curve.class_name == "all")]
    assert len(rows) == 1
    return rows.accuracy.item()


@pytest.mark.parametrize("refit", [None, "least_squares"])
def test_each_table_at_each_k_is_the_network_that_decompose_makes(refit, trained):
    model, tables, moments, test = trained
    given = {} if refit is None else {"refit": refit, "moments": moments}
    curve = metrics.accuracy_curve(model, tables, test, [1, 2, 4], **given)
    found = {(name, k): accuracy(curve, name, k) for name in tables for k in (1, 2, 4)}
    expected = {(name, k): share_right(decompose(model, tables[name], k, **given), test) for name, k in found}
    assert found == expected
    assert len(set(found.values())) > 2  # not all alike: a curve that ignored k or the table would be


def test_omp_is_the_network_that_decompose_makes_and_the_control_is_refitted(trained):
    model, _, moments, test = trained
    curve = metrics.accuracy_curve(model, None, test, [1, 3], refit="omp", moments=moments)
    assert set(curve.filters) == {"dense", "omp", "random"}
    for k in (1, 3):
        assert accuracy(curve, "omp", k) == share_right(decompose(model, None, k, refit="omp", moments=moments), test)
    head_pass = HeadPass(model, test, class_names=list("abcdefghij"))
    named = metrics.accuracy_curve(head_pass, None, ks=iter([3]), refit="omp", moments=moments)
    assert set(named.class_name) == {"all", *"abcdefghij"}
    plain = metrics.accuracy_curve(model, trained[1], test, [1, 3])
    assert accuracy(plain, "random", 3) != accuracy(curve, "random", 3)


def test_all_channels_refitted_are_the_full_head(task):
    model, tables, moments, test = task
    curve = metrics.accuracy_curve(model, tables, test, [6], refit="least_squares", moments=moments)
    assert (curve[curve.filters != "dense"].agreement.dropna() == 1).all()


def test_a_class_that_no_table_has_seen_has_no_channels_in_the_control_either(task):
    model, tables, _, test = task
    table = tables["histogram"]
    counts = table.counts.clone()
    counts[2] = 0
    unseen = ClassFilters(table.scores, table.mass, counts, "histogram", "fc", table.class_names)
    with torch.no_grad():
        model.fc.bias[2] = -1e6  # its bias alone: never predicted
        model.fc.weight[2] = 1e9  # with any channel: always
    curve = metrics.accuracy_curve(model, unseen, test, [3])
    of_class = curve[(curve.class_name == table.class_names[2]) & (curve.k == 3)]
    assert (of_class.accuracy == 0).all()


def test_further_arguments_reach_the_model(task):
    model, tables, _, test = task

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, scale):
            return self.inner(x * scale)

    tables = {"histogram": InfluentialFeatures(Scaled()).attribute(test, additional_forward_args=1.0)}
    curve = metrics.accuracy_curve(HeadPass(Scaled(), test, additional_forward_args=0.0), tables, ks=[2])
    dark = [(0 * test[0][0], test[0][1])]
    blank = metrics.accuracy_curve(HeadPass(Scaled(), dark, additional_forward_args=1.0), tables, ks=[2])
    assert accuracy(curve, "dense", 6) == accuracy(blank, "dense", 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refit": "least_squares"}, "needs moments"),
        ({"moments": "given"}, "moments without a refit"),
        ({"refit": "sgd", "moments": "given"}, "refit must be one of"),
        ({"refit": "omp", "moments": "given"}, "chooses the features itself"),
    ],
)
def test_a_refit_without_what_it_needs_is_refused(options, message, task):
    model, tables, moments, test = task
    options = {**options, **({"moments": moments} if "moments" in options else {})}
    with pytest.raises(OptionError, match=message):
        metrics.accuracy_curve(model, tables, test, [1], **options)


def test_moments_of_another_network_are_refused(task, small_cnn, images):
    model, tables, _, test = task
    other = HeadMoments.collect(small_cnn(channels=5), [images(20)])
    with pytest.raises(ShapeError, match=r"moments are of 5 features of layer 'fc', the head 'fc' has 6"):
        metrics.accuracy_curve(model, tables, test, [1], refit="least_squares", moments=other)


def test_k_above_the_moments_channels_is_refused(task):
    model, _, moments, test = task
    with pytest.raises(OptionError, match=r"each of ks must be an integer in \[1, 6\]"):
        metrics.accuracy_curve(model, None, test, [7], refit="omp", moments=moments)


@pytest.mark.parametrize(
    ("names", "message"),
    [(tuple("abc"), "class_names must be 4, one for each class; got 3"), (tuple("abca"), "class names must be unique")],
)
def test_class_names_are_checked_before_the_images_are_read_on(task, names, message):
    model, _, moments, test = task
    read = []

    def loader():
        for batch in test * 3:
            read.append(1)
            yield batch

    head_pass = HeadPass(model, loader(), class_names=names)
    with pytest.raises(OptionError, match=message):
        metrics.accuracy_curve(head_pass, None, ks=[1], refit="omp", moments=moments)
    assert len(read) == 1
