"""decompose: each class reads its k features, as a loop in float64 says; the network it came from is not touched."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from contract import Snapshot
from torch import nn

from captum_classfilters import ClassFilters, HeadMoments, InfluentialFeatures
from captum_classfilters.core.errors import HeadError, OptionError, ShapeError, SingularMomentsWarning
from captum_classfilters.heads import DecomposedLinear, decompose
from captum_classfilters.heads.decompose import Pointwise
from captum_classfilters.heads.decomposed_linear import BACKENDS
from captum_classfilters.influential.selectors import SELECTORS

NAMES = ("shirt", "coat", "bag", "boot")


def table(classes=4, channels=6, *, layer="fc", unseen=(), seed=0):
    scores = torch.randn(classes, channels, generator=torch.Generator().manual_seed(seed)).double()
    counts = torch.full((classes,), 7)
    counts[list(unseen)] = 0
    names = NAMES[:classes] if classes <= 4 else tuple(map(str, range(classes)))
    return ClassFilters(scores, scores.abs(), counts, "histogram", layer, names)


@pytest.fixture
def moments(images):
    """Of many images: none of the small network's features follows from the others."""

    def make(model):
        return HeadMoments.collect(model, [images(60, seed=5)])

    return make


def looped(model, filters, k, inputs):
    """Logits by the definition, in float64."""
    features = model.penultimate(inputs).double()
    out = torch.zeros(len(inputs), len(model.fc.weight), dtype=torch.float64)
    for y, channels in enumerate(filters.top(k).tolist()):
        for j in channels:
            out[:, y] += model.fc.weight[y, j].double() * features[:, j]
        if model.fc.bias is not None:
            out[:, y] += model.fc.bias[y].double()
    return out


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
@torch.no_grad()
def test_logits_are_sums_over_the_top_k(backend, k, bias, small_cnn, images):
    model, filters = small_cnn(bias=bias), table()
    small = decompose(model, filters, k, backend=backend)
    torch.testing.assert_close(small(images(20)).double(), looped(model, filters, k, images(20)), rtol=1e-5, atol=1e-5)
    assert (small.fc.bias is None) is not bias
    plain = isinstance(small.fc, nn.Linear)
    assert plain is (backend in ("auto", "dense"))
    assert plain or small.fc.backend == backend
    assert int((small.fc.weight != 0).sum()) == 4 * k


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("refit", [None, "least_squares", "omp"])
@pytest.mark.parametrize("backend", [*BACKENDS, "dense"])
def test_all_features_give_the_full_heads_logits(backend, refit, bias, small_cnn, images, moments):
    model = small_cnn(bias=bias)
    small = decompose(
        model,
        None if refit == "omp" else table(),
        6,
        refit=refit,
        moments=moments(model) if refit else None,
        backend=backend,
    )
    with torch.no_grad():
        torch.testing.assert_close(small(images(20)), model(images(20)), rtol=1e-5, atol=1e-5)
    # a refit needs a bias to put the means of the left-out features into
    assert (small.fc.bias is not None) is (bias or refit is not None)


@pytest.mark.parametrize("refit", ["least_squares", "omp"])
def test_a_refit_is_nearer_to_the_full_head_than_the_weights_as_they_are(refit, small_cnn, images, moments):
    model, filters = small_cnn(bias=False), table()
    small = decompose(model, None if refit == "omp" else filters, 3, refit=refit, moments=moments(model))
    seen = images(60, seed=5)
    with torch.no_grad():
        full = model(seen)
        missed, before = (float((m(seen) - full).square().mean()) for m in (small, decompose(model, filters, 3)))
    assert missed < before
    kept = small.fc.weight != 0
    assert (kept.sum(1) <= 3).all()
    assert refit == "omp" or not (kept & ~filters.mask(3)).any()


@pytest.mark.parametrize("selector", SELECTORS)
@torch.no_grad()
def test_tables_of_any_selector_do(selector, small_cnn, images):
    model = small_cnn()
    filters = InfluentialFeatures(model).attribute([(images(20), torch.arange(20) % 4)], selector=selector)
    small = decompose(model, filters, 2)
    torch.testing.assert_close(small(images()).double(), looped(model, filters, 2, images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("refit", [None, "least_squares"])
def test_features_that_follow_from_one_another_warn_where_the_caller_stands(refit, small_cnn, images, moments):
    model = small_cnn()
    with torch.no_grad():
        for layer in (model.conv2, model.bn2):  # channel 4 copies channel 1
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.dim():
                    tensor[4] = tensor[1]
    everything = table()
    if refit is None:
        decompose(model, everything, 6)
        return
    with pytest.warns(SingularMomentsWarning, match=r"for 4 of 4 classes .* over the 60 samples; a ridge") as caught:
        small = decompose(model, everything, 6, refit=refit, moments=moments(model))
    assert caught[0].filename == __file__
    with torch.no_grad():
        torch.testing.assert_close(small(images()), model(images()), rtol=1e-4, atol=1e-4)


# -- which form the head gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "features", "k", "dtype", "sparse"),
    [
        (10, 64, 5, torch.float32, False),
        (1000, 2048, 50, torch.float32, True),
        (1000, 2048, 50, torch.float64, True),
        (1000, 2048, 50, torch.bfloat16, False),
        (128, 1024, 128, torch.float32, True),  # 2^17 weights, an eighth kept
        (128, 1024, 129, torch.float32, False),
        (127, 1024, 128, torch.float32, False),
    ],
)
def test_auto_is_sparse_where_that_was_measured_to_win(classes, features, k, dtype, sparse):
    model = nn.Sequential(nn.Linear(features, classes, dtype=dtype))
    small = decompose(model, table(classes, features, layer="0"), k)
    assert type(small[0]) is (DecomposedLinear if sparse else nn.Linear)
    assert small[0].weight.dtype == dtype


class Pointwise1x1(nn.Module):
    """A head over positions, averaged afterwards."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, images):
        return self.head(self.body(images).relu()).mean((2, 3))


@pytest.mark.parametrize("refit", [None, "least_squares", "omp"])
@pytest.mark.parametrize("backend", ["auto", "csr", "bag"])
def test_a_1x1_convolution_becomes_a_layer_at_each_position(backend, refit, images):
    model = Pointwise1x1()
    moments = HeadMoments.collect(model, [images(60)]) if refit else None
    filters = None if refit == "omp" else table(layer="head")
    small = decompose(model, filters, 2, refit=refit, moments=moments, backend=backend)
    assert isinstance(small.head, Pointwise)
    if refit is None:
        expected = copy.deepcopy(model)
        with torch.no_grad():
            expected.head.weight.mul_(filters.mask(2)[:, :, None, None])
            torch.testing.assert_close(small(images()), expected(images()))
            maps = model.body(images())
            torch.testing.assert_close(small.head(maps), expected.head(maps))
    else:
        with torch.no_grad():
            gap = (small(images(60)) - model(images(60))).mean(0)
        torch.testing.assert_close(gap, torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("refit", [None, "least_squares", "omp"])
def test_a_head_that_bears_another_name_now_can_be_named(refit, moments, small_cnn, images):
    model = small_cnn()
    given = {"refit": refit, "moments": moments(model)} if refit else {}
    filters = None if refit == "omp" else table()
    expected = decompose(model, filters, 2, **given)
    wrapped = nn.Sequential(model)
    small = decompose(wrapped, filters, 2, layer="0.fc", **given)
    with torch.no_grad():
        assert torch.equal(small(images()), expected(images()))
        assert not torch.equal(small(images()), model(images()))


def test_a_decomposed_network_says_why_its_head_cannot_be_read(small_cnn, images):
    small = decompose(small_cnn(), table(), 2, backend="csr")
    with pytest.raises(HeadError, match=r"has been decomposed; use the network it was made from"):
        HeadMoments.collect(small, [images()])
    dense = decompose(small_cnn(), table(), 2, backend="dense")
    assert HeadMoments.collect(dense, [images()]).num_features == 6


def test_a_model_may_be_its_own_head():
    linear = nn.Linear(6, 4).eval()
    filters = table(layer="the model itself")
    small = decompose(linear, filters, 2, backend="csr")
    assert isinstance(small, DecomposedLinear)
    assert torch.equal(small.to_dense().weight, linear.weight * filters.mask(2))
    assert not small.training


@pytest.mark.parametrize("backend", ["dense", "bag"])
@torch.no_grad()
def test_a_half_precision_network_stays_one(backend, small_cnn, images, moments):
    model, filters = small_cnn().bfloat16(), table()
    for small in (
        decompose(model, filters, 3, backend=backend),
        decompose(model, filters, 6, refit="least_squares", moments=moments(model), backend=backend),
    ):
        logits = small(images().bfloat16())
        assert logits.dtype == small.fc.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits, model(images().bfloat16()), rtol=0.05, atol=0.05)


# -- what is left alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refit", [None, "least_squares", "omp"])
@pytest.mark.parametrize("backend", ["dense", "bag"])
def test_the_network_is_not_changed_and_shares_nothing_with_the_copy(backend, refit, small_cnn, images, moments):
    model = small_cnn().train()
    model.bn1.eval()
    model.conv1.requires_grad_(False)
    model(images()).sum().backward()
    sums = moments(model) if refit else None
    before = Snapshot.of(model)
    small = decompose(model, None if refit == "omp" else table(), 3, refit=refit, moments=sums, backend=backend)
    Snapshot.of(model).assert_same(before)
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert mine.isdisjoint(tensor.data_ptr() for tensor in small.state_dict().values())
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    Snapshot.of(model).assert_same(before)


@pytest.mark.parametrize("backend", ["dense", "bag"])
@pytest.mark.parametrize("frozen", ["nothing", "fc.weight", "fc.bias", "conv1.weight"])
@pytest.mark.parametrize("head_trains", [True, False])
def test_modes_and_frozen_parameters_are_kept(head_trains, frozen, backend, small_cnn):
    model = small_cnn().train()
    model.bn1.eval()
    model.fc.train(head_trains)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != frozen)
    small = decompose(model, table(), 3, backend=backend)
    assert {n: m.training for n, m in small.named_modules()} == {n: m.training for n, m in model.named_modules()}
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ([] if frozen == "nothing" else [frozen])


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
def test_wrapped_networks_are_unwrapped(wrap, small_cnn, images):
    model = small_cnn()
    small = decompose(wrap(model), table(), 2)
    assert type(small) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(small(images()), decompose(model, table(), 2)(images()))


def test_the_small_network_can_be_read_and_decomposed_again(small_cnn, images):
    once = decompose(small_cnn(), table(), 4)
    filters = InfluentialFeatures(once).attribute([(images(20), torch.arange(20) % 4)], selector="contribution")
    again = decompose(once, filters, 2)
    assert ((again.fc.weight != 0) <= (once.fc.weight != 0)).all()


# -- classes without samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "auto", "csr", "gather"])
@pytest.mark.parametrize("refit", [None, "least_squares"])
def test_unseen_classes_are_refused_or_stay_as_they_are(refit, backend, small_cnn, images, moments):
    model, filters = small_cnn(), table(unseen=[1, 3])
    options = {"refit": refit, "moments": moments(model) if refit else None, "backend": backend}
    with pytest.raises(OptionError, match=r"no sample of class coat, boot: .* unseen=\"dense\""):
        decompose(model, filters, 2, **options)
    small = decompose(model, filters, 2, unseen="dense", **options)
    with torch.no_grad():
        found, full = small(images()), model(images())
        torch.testing.assert_close(found[:, [1, 3]], full[:, [1, 3]], rtol=1e-6, atol=1e-6)
        seen = decompose(model, table(), 2, **options)(images())
        torch.testing.assert_close(found[:, [0, 2]], seen[:, [0, 2]], rtol=1e-6, atol=1e-6)


def test_many_unseen_classes_are_counted():
    model = nn.Sequential(nn.Linear(3, 40))
    with pytest.raises(OptionError, match=r"class 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. \(39 in all\)"):
        decompose(model, table(40, 3, layer="0", unseen=range(39)), 2)


def test_a_class_kept_dense_is_not_refitted_even_where_all_keep_all_their_features(small_cnn, images):
    model = small_cnn()
    with torch.no_grad():
        model.bn2.weight[2], model.bn2.bias[2] = 0, 1  # constant: a refit would give it no weight
    moments = HeadMoments.collect(model, [images(60)])
    small = decompose(model, table(unseen=[1]), 6, refit="least_squares", moments=moments, unseen="dense")
    assert torch.equal(small.fc.weight[1], model.fc.weight[1])
    assert small.fc.weight[0, 2] == 0


# -- what is refused ---------------------------------------------------------------------------------------------------


def sums(channels=6, layer="fc"):
    features = torch.randn(50, channels, generator=torch.Generator().manual_seed(0)).double()
    return HeadMoments(features.sum(0), features.T @ features, 50, layer)


FITTED = {"refit": "least_squares"}


@pytest.mark.parametrize(
    ("filters", "k", "options", "error", "message"),
    [
        (table(), 7, {}, OptionError, r"k must be an integer in \[1, 6\], the number of channels; got 7"),
        (table(), 0, {}, OptionError, r"k must be an integer in \[1, 6\].*got 0"),
        (table(), 2.0, {}, OptionError, r"k must be an integer"),
        (table(channels=9), 2, {}, ShapeError, r"4 classes x 9 channels of layer 'fc', the head 'fc' is 4 x 6"),
        (table(classes=3), 2, {}, ShapeError, r"3 classes x 6 channels .* the head 'fc' is 4 x 6"),
        (table(4, 5, layer="head"), 2, {"layer": "fc"}, ShapeError, r"4 classes x 5 .* the head 'fc' is 4 x 6"),
        (table(layer="head"), 2, {}, ShapeError, "ClassFilters are of layer 'head', which this network does not"),
        (table(layer="bn2"), 2, {}, HeadError, "must be an nn.Linear or a 1x1 convolution"),
        ({"histogram": table()}, 2, {}, OptionError, r"got dict; of \['histogram'\] pass one"),
        (None, 2, {}, OptionError, "filters must be a ClassFilters, got NoneType"),
        (
            table(),
            2,
            {"refit": "sgd"},
            OptionError,
            r"refit must be one of \[None, 'least_squares', .*\], got 'sgd'",
        ),
        (table(), 2, {"backend": "fast"}, OptionError, "backend must be one of .*'dense'.* got 'fast'"),
        (table(), 2, {"unseen": "drop"}, OptionError, "unseen must be one of"),
        (table(), 2, {"moments": sums()}, OptionError, "moments without a refit"),
        (table(), 2, FITTED, OptionError, r"refit='least_squares' needs moments=HeadMoments.collect"),
        (None, 2, {"refit": "omp"}, OptionError, r"refit='omp' needs moments"),
        (
            table(),
            2,
            {"refit": "omp", "moments": sums()},
            OptionError,
            "chooses the features itself; pass filters=None",
        ),
        ({"a": table()}, 2, {**FITTED, "moments": sums()}, OptionError, r"of \['a'\] pass one"),
        (table(), 2, {**FITTED, "moments": sums(9)}, ShapeError, r"9 features of layer 'fc', the head 'fc' has 6"),
        (table(), 2, {**FITTED, "moments": sums(layer="x")}, ShapeError, "6 features of layer 'x', the head 'fc'"),
        (None, 2, {"refit": "omp", "moments": sums(9)}, ShapeError, r"9 features of layer 'fc', the head 'fc' has 6"),
        (table(), 2, {**FITTED, "moments": {"m": 1}}, OptionError, "needs moments=HeadMoments.collect.* got dict"),
        (None, 2, {"refit": "omp", "moments": {"m": 1}}, OptionError, "needs moments=HeadMoments.collect.* got dict"),
        (None, 7, {"refit": "omp", "moments": sums()}, OptionError, r"k must be an integer in \[1, 6\]"),
        (table(), 2, {**FITTED, "moments": replace(sums(), count=2)}, OptionError, "at least 3 samples.* hold 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(filters, k, options, error, message, small_cnn):
    model = small_cnn()
    before = Snapshot.of(model)
    with pytest.raises(error, match=message):
        decompose(model, filters, k, **options)
    Snapshot.of(model).assert_same(before)


def test_a_quantised_head_is_refused(small_cnn):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(small_cnn(), {nn.Linear})
    with pytest.raises(HeadError, match="is quantised, its weights cannot be read; use the network before"):
        decompose(model, table(), 2)
