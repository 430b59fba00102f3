"""`Paths` as the table of bits that numpy and scikit-learn take it for; one tensor as a loader."""

import json

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GroupKFold, cross_val_score, train_test_split
from test_decoupler import decoupled, images, network
from test_paths import bits_of, paths_of, same

from captum_classfilters.core.errors import ShapeError
from captum_classfilters.decoupling import PathDecoupler, Paths
from captum_classfilters.decoupling.path_reader import PathReader

ROWS = np.array([3, 0, 7, 3])
MASK = np.arange(20) % 3 == 1


@pytest.mark.parametrize(("dtype", "expected"), [(None, np.uint8), (bool, bool), ("float32", np.float32), (int, int)])
def test_the_array_is_of_bits_in_the_dtype_asked_for(dtype, expected):
    bits = bits_of()
    for found in (np.asarray(paths_of(bits), dtype=dtype), np.array(paths_of(bits), dtype=dtype)):
        assert found.dtype == expected
        assert found.shape == paths_of(bits).shape == (20, 11)
        np.testing.assert_array_equal(found, bits.numpy())
    # numpy would convert what came in another one
    assert paths_of(bits).__array__(dtype).dtype == expected


def test_the_shape_is_that_of_the_bits_whole_bytes_or_not():
    for channels in ((8,), (5, 6), (16, 1)):
        paths = paths_of(bits_of(7, channels=sum(channels)), channels=channels, layers=tuple(map(str, channels)))
        assert paths.shape == (7, sum(channels)) == np.shape(paths)
        assert paths[:0].shape == np.asarray(paths[:0]).shape == (0, sum(channels))


def test_writing_into_the_array_changes_no_path():
    paths = paths_of(bits_of())
    np.asarray(paths)[:] = 1
    assert torch.equal(paths.bits(), bits_of())


@pytest.mark.parametrize("rows", [ROWS, MASK, ROWS.tolist(), torch.from_numpy(ROWS), slice(2, 9), np.array([], int)])
@pytest.mark.parametrize("ellipsis", [False, True])
def test_rows_are_chosen_as_of_an_array(rows, ellipsis):
    paths = paths_of(bits_of(), torch.arange(20) % 4, logits=torch.randn(20, 11, generator=torch.Generator()))
    some = paths[rows, ...] if ellipsis else paths[rows]
    assert isinstance(some, Paths)
    np.testing.assert_array_equal(np.asarray(some), np.asarray(paths)[rows])
    for name in ("labels", "predictions", "logits"):
        np.testing.assert_array_equal(getattr(some, name).numpy(), getattr(paths, name).numpy()[rows])


def test_scikit_learn_splits_paths():
    paths, marks = paths_of(bits_of(40), torch.arange(40) % 4), np.arange(40) % 2
    for options in ({"stratify": marks}, {"shuffle": False}):
        options |= {"test_size": 0.3, "random_state": None if "shuffle" in options else 1}
        train, test, *_ = train_test_split(paths, marks, **options)
        rows = train_test_split(np.asarray(paths), np.arange(40), **options)
        assert isinstance(train, Paths)
        np.testing.assert_array_equal(np.asarray(train), rows[0])
        np.testing.assert_array_equal(np.asarray(test), rows[1])
        assert train.labels.tolist() == (rows[2] % 4).tolist()


def test_scikit_learn_cross_validates_and_fits_paths_as_their_array():
    bits = bits_of(60, seed=2)
    marks = (bits[:, 2] ^ (torch.arange(60) % 7 == 0)).long().numpy()
    paths, groups = paths_of(bits), np.arange(60) // 4
    forest = RandomForestClassifier(10, random_state=0)
    found, expected = (
        cross_val_score(forest, table, marks, groups=groups, cv=GroupKFold(4)) for table in (paths, bits.numpy())
    )
    np.testing.assert_array_equal(found, expected)
    assert found.mean() > 0.7
    proba = forest.fit(paths[:40], marks[:40]).predict_proba(paths[40:])
    np.testing.assert_array_equal(proba, forest.fit(bits[:40].numpy(), marks[:40]).predict_proba(bits[40:].numpy()))


# -- one tensor, stored parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", [False, True])
def test_a_tensor_is_one_batch(logits):
    decoupler, x = decoupled(network()), images(3)
    calls = []
    expected = decoupler.paths([x], logits=logits)
    handle = decoupler.model.fc.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    found = decoupler.paths(x, logits=logits)
    handle.remove()
    assert 3 in calls  # not one image after another, of which the first has no batch
    same(found, expected)
    assert found.labels is None
    assert (found.fingerprint, found.costs) == (expected.fingerprint, expected.costs)
    assert torch.equal(found.bits(), torch.cat(decoupler.gates(x)[1], 1).bool())


@pytest.mark.parametrize("labels", [None, torch.arange(20) % 4], ids=["no labels", "labels"])
@pytest.mark.parametrize("logits", [None, torch.linspace(-3, 3, 220).reshape(20, 11)], ids=["bits", "logits"])
def test_tensors_and_meta_are_all_of_it(labels, logits):
    paths = paths_of(bits_of(), labels, logits=logits)
    assert set(paths.tensors()) == {"codes", "predictions"} | {
        name for name, value in (("labels", labels), ("logits", logits)) if value is not None
    }
    meta = json.loads(json.dumps(paths.meta()))
    again = Paths.of(paths.tensors(), meta)
    same(again, paths)
    for name in ("layers", "channels", "num_classes", "fingerprint", "costs"):
        assert getattr(again, name) == getattr(paths, name), name
    assert torch.equal(again.macs(), paths.macs())
    assert len(Paths.merge(again, paths)) == 40


def test_images_of_another_size_are_refused_by_whatever_reads():
    decoupler = decoupled(network())
    message = r"batch 1 has inputs of size \(3, 14, 14\), those before it \(3, 12, 12\); .* collect each size"
    with pytest.raises(ShapeError, match=message):
        decoupler.paths([images(2), images(2, size=14)])
    reader = PathReader(decoupler)
    reader.read((images(2),))
    with pytest.raises(ShapeError, match=message):
        reader.read((images(2, size=14),), index=1)
    # how many come in a batch is another matter
    assert len(decoupler.paths([images(2), images(5)])) == 7


def test_what_a_path_costs_is_found_once_for_each_size(monkeypatch):
    decoupler, x = decoupled(network()), images(6)
    sizes = []
    real = PathDecoupler.costs

    def costs(self, *example):
        sizes.append(tuple(example[0].shape))
        return real(self, *example)

    monkeypatch.setattr(PathDecoupler, "costs", costs)
    first, again, other = (decoupler.paths(inputs) for inputs in (x, x[:2], x[..., :-1]))
    assert sizes == [(1, *x.shape[1:]), (1, *x[..., :-1].shape[1:])]
    assert again.costs == first.costs != other.costs
