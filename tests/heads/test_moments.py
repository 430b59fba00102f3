"""HeadMoments: numpy's mean and covariance from one pass, whatever the split; and what goes wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_classfilters import ClassFilters, HeadMoments
from captum_classfilters.core.errors import EmptyLoaderError, FileFormatError, MergeError, NonFiniteError, ShapeError
from captum_classfilters.core.files import write
from captum_classfilters.core.head_pass import HeadPass

SIZES = (4, 1, 6)  # ragged


@pytest.fixture
def data(images):
    return [(images(size, seed=seed), torch.arange(size) % 4) for seed, size in enumerate(SIZES)]


def of(features):
    """Moments by the definition."""
    features = torch.as_tensor(features, dtype=torch.float64)
    return HeadMoments(features.sum(0), features.T @ features, len(features), "fc")


def assert_same(actual, expected, rtol=1e-12):
    for name in ("total", "second"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=rtol, atol=0)
    assert (actual.count, actual.layer) == (expected.count, expected.layer)


@pytest.mark.parametrize("labels", ["labels", "no labels", "mapping"])
def test_moments_are_numpys_mean_and_covariance(labels, small_cnn, data):
    model = small_cnn()
    loader = {
        "labels": data,
        "no labels": [inputs for inputs, _ in data],
        "mapping": [{"pixel_values": inputs} for inputs, _ in data],
    }[labels]
    moments = HeadMoments.collect(model, iter(loader))
    with torch.no_grad():
        features = torch.cat([model.penultimate(inputs) for inputs, _ in data]).double().numpy()
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False, ddof=0), rtol=1e-9, atol=1e-12)
    assert (moments.count, moments.layer, moments.num_features) == (11, "fc", 6)
    assert moments.total.dtype == moments.second.dtype == torch.float64


def test_sums_of_a_half_precision_network_are_kept_in_float64(small_cnn, data):
    model = small_cnn().to(torch.bfloat16)
    moments = HeadMoments.collect(model, data * 40)
    with torch.no_grad():
        features = torch.cat([model.penultimate(inputs.bfloat16()) for inputs, _ in data]).double()
    assert_same(moments, of(features.repeat(40, 1)))


def test_the_head_and_further_arguments_may_be_named(small_cnn, data):
    model = small_cnn()
    model.forward = lambda images, scale: model.fc(model.penultimate(images)) * scale
    moments = HeadMoments.collect(HeadPass(model, data, layer="fc", additional_forward_args=(2.0,)))
    del model.forward
    assert_same(moments, HeadMoments.collect(model, data))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_split_merged_in_any_order_is_one_pass(data):
    count = data.draw(st.integers(2, 30))
    features = np.random.default_rng(data.draw(st.integers(0, 99))).gamma(1.0, size=(count, 3))
    cuts = sorted(data.draw(st.lists(st.integers(1, count - 1), max_size=4, unique=True)))
    parts = [of(part) for part in np.split(features, cuts)]
    assert_same(HeadMoments.merge(*data.draw(st.permutations(parts))), of(features))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), r"merge takes moments one by one, merge\(\*parts\); got none"),
        (([of(np.ones((2, 3)))],), r"got \['list'\]"),
        ((of(np.ones((2, 3))), of(np.ones((2, 4)))), r"\(3 features of 'fc', 2 samples\) and .*\(4 features"),
        ((of(np.ones((2, 3))), replace(of(np.ones((2, 3))), layer="head")), "'fc'.* 'head'.* different networks"),
    ],
    ids=["nothing", "list", "features", "layer"],
)
def test_merge_refuses_what_does_not_belong_together(parts, message):
    with pytest.raises(MergeError, match=message):
        HeadMoments.merge(*parts)


def test_totals_and_products_must_be_of_the_same_features():
    with pytest.raises(ShapeError, match=r"shape \(K,\) and second \(K, K\), got \(3,\) and \(3, 4\)"):
        HeadMoments(torch.zeros(3), torch.zeros(3, 4), 1, "fc")


def test_save_and_load_give_the_same_moments(tmp_path):
    moments = of(np.random.default_rng(0).normal(size=(9, 4)))
    moments.save(tmp_path / "moments.safetensors")
    loaded = HeadMoments.load(tmp_path / "moments.safetensors")
    assert_same(loaded, moments, rtol=0)
    assert repr(loaded) == "HeadMoments(4 features of 'fc', 9 samples)"


def test_foreign_and_broken_files_are_refused(tmp_path):
    path, scores = tmp_path / "file.safetensors", torch.zeros(2, 3)
    ClassFilters(scores, scores, torch.ones(2, dtype=torch.int64), "histogram", "fc", ("a", "b")).save(path)
    with pytest.raises(FileFormatError, match=r"holds a ClassFilters; expected a HeadMoments"):
        HeadMoments.load(path)
    of(np.ones((2, 3))).save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FileFormatError, match="truncated"):
        HeadMoments.load(path)
    tensors = {"total": torch.zeros(3), "second": torch.zeros(2, 2)}
    for meta in ({"count": 1, "layer": "fc"}, {"count": 1}):
        write(path, tensors, kind="HeadMoments", version=1, meta=meta)
        with pytest.raises(FileFormatError, match="does not hold whole moments"):
            HeadMoments.load(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
def test_an_error_of_the_loader_carries_the_moments_so_far(error, small_cnn, data):
    def broken():
        yield from data[:2]
        raise error

    model = small_cnn()
    with pytest.raises(type(error)) as caught:
        HeadMoments.collect(model, broken())
    assert caught.value is error
    assert_same(error.partial_result, HeadMoments.collect(model, data[:2]), rtol=0)
    rest = HeadMoments.collect(model, data[2:])
    assert_same(HeadMoments.merge(error.partial_result, rest), HeadMoments.collect(model, data))


def test_an_error_before_the_first_batch_carries_nothing(small_cnn):
    def broken():
        raise ZeroDivisionError
        yield

    with pytest.raises(ZeroDivisionError) as caught:
        HeadMoments.collect(small_cnn(), broken())
    assert not hasattr(caught.value, "partial_result")
    with pytest.raises(EmptyLoaderError, match="gave no sample"):
        HeadMoments.collect(small_cnn(), [])


def test_features_that_are_not_numbers_are_refused_and_do_not_spoil_the_sums(small_cnn, data, images):
    model = small_cnn()
    bad = images(2).index_fill(0, torch.tensor([1]), torch.nan)
    with pytest.raises(NonFiniteError, match="at the input of layer fc in batch 2") as caught:
        HeadMoments.collect(model, [*data[:2], (bad, torch.tensor([0, 1]))])
    assert_same(caught.value.partial_result, HeadMoments.collect(model, data[:2]), rtol=0)
