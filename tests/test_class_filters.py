"""ClassFilters: ranking, sets, merging, storing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_classfilters import ClassFilters
from captum_classfilters.core.errors import FileFormatError, MergeError, OptionError, ShapeError
from captum_classfilters.core.files import write

NAMES = ("shirt", "coat", "bag", "boot")


def table(seed=0, classes=4, channels=9, *, unseen=(), ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3 if ties else 1000, (classes, channels), generator=generator).double()
    mass = torch.randint(0, 2 if ties else 1000, (classes, channels), generator=generator).double()
    counts = torch.full((classes,), 7)
    for row in unseen:
        scores[row], mass[row], counts[row] = 0, 0, 0
    return ClassFilters(scores, mass, counts, "histogram", "fc", NAMES[:classes], {"k1": 3})


@pytest.mark.parametrize("seed", range(5))
def test_ranking_is_by_score_then_mass_then_index(seed):
    filters = table(seed, ties=True)
    rows = zip(filters.scores.numpy(), filters.mass.numpy(), strict=True)
    expected = np.stack([np.lexsort((np.arange(9), -mass, -scores)) for scores, mass in rows])
    np.testing.assert_array_equal(filters.ranking().numpy(), expected)
    np.testing.assert_array_equal(filters.top(4).numpy(), expected[:, :4])


def test_mask_holds_exactly_the_top():
    filters = table(1)
    for k in (1, 4, 9):
        assert [set(row.nonzero().flatten().tolist()) for row in filters.mask(k)] == [
            set(row.tolist()) for row in filters.top(k)
        ]


def test_overlap_is_the_jaccard_index_of_the_sets():
    filters = table(2)
    sets = [set(row.tolist()) for row in filters.top(4)]
    expected = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    torch.testing.assert_close(filters.overlap(4), torch.tensor(expected, dtype=torch.float64))


def test_contrast_names_channels_of_a_and_not_of_b_strongest_first():
    filters = table(3)
    found = filters.contrast("shirt", "bag", k=5).tolist()
    other = set(filters.top(5)[2].tolist())
    assert found == [channel for channel in filters.top(5)[0].tolist() if channel not in other]
    assert found == filters.contrast(0, 2, k=5).tolist()
    assert 0 < len(found) <= 5


def test_an_unseen_class_is_minus_one_in_top_empty_in_mask_and_nan_in_overlap():
    filters = table(unseen=[1])
    assert filters.top(3)[1].tolist() == [-1, -1, -1]
    assert not filters.mask(3)[1].any()
    assert filters.mask(3)[0].sum() == 3
    assert filters.overlap(3)[1].isnan().all()
    assert filters.overlap(3)[:, 1].isnan().all()
    assert filters.overlap(3)[0, 0] == 1
    with pytest.raises(OptionError, match="'coat' has no samples"):
        filters.contrast("shirt", "coat", k=3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_merged_in_any_order_is_the_same_to_the_bit(data):
    parts = [table(seed, ties=True) for seed in range(data.draw(st.integers(2, 6)))]
    whole = ClassFilters.merge(*parts)
    cut = data.draw(st.integers(1, len(parts) - 1))
    shuffled = data.draw(st.permutations(parts))
    nested = ClassFilters.merge(ClassFilters.merge(*shuffled[cut:]), ClassFilters.merge(*shuffled[:cut]))
    for name in ("scores", "mass", "counts"):
        assert torch.equal(getattr(whole, name), getattr(nested, name))
    assert torch.equal(whole.top(5), nested.top(5))


def test_merge_adds_scores_mass_and_counts():
    a, b = table(0), table(1)
    merged = ClassFilters.merge(a, b)
    assert torch.equal(merged.scores, a.scores + b.scores)
    assert torch.equal(merged.mass, a.mass + b.mass)
    assert merged.counts.tolist() == [14] * 4


def test_merge_of_static_scores_keeps_them():
    a = replace(table(0), method="weight", meta={}, merge_rule="same")
    merged = ClassFilters.merge(a, a)
    assert torch.equal(merged.scores, a.scores)
    assert torch.equal(merged.mass, 2 * a.mass)
    with pytest.raises(MergeError, match="other weights or seed"):
        ClassFilters.merge(a, replace(a, scores=a.scores + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "margin"}, "method differs: 'histogram' and 'margin'"),
        ({"layer": "classifier"}, "layer differs"),
        ({"class_names": ("a", "b", "c", "d")}, "class_names differs"),
        ({"meta": {"k1": 4}}, r"options differ in \['k1'\]"),
    ],
)
def test_merge_refuses_what_does_not_belong_together(change, message):
    with pytest.raises(MergeError, match=message):
        ClassFilters.merge(table(0), replace(table(1), **change))


def test_merge_refuses_nothing_other_shapes_and_tables_that_do_not_add_up():
    with pytest.raises(MergeError, match="at least one table, got none"):
        ClassFilters.merge()
    with pytest.raises(MergeError, match=r"merge takes tables one by one, merge\(\*parts\); got list"):
        ClassFilters.merge([table(0), table(1)])
    with pytest.raises(MergeError, match="shapes differ"):
        ClassFilters.merge(table(0), table(0, channels=8))
    with pytest.raises(MergeError, match="cannot be merged"):
        ClassFilters.merge(*[replace(table(0), merge_rule="none")] * 2)


def test_save_and_load_give_the_same_table(tmp_path):
    filters = table(5, unseen=[2])
    filters.save(tmp_path / "filters.safetensors")
    loaded = ClassFilters.load(tmp_path / "filters.safetensors")
    for name in ("scores", "mass", "counts"):
        assert torch.equal(getattr(loaded, name), getattr(filters, name))
        assert getattr(loaded, name).dtype == getattr(filters, name).dtype
    assert (loaded.method, loaded.layer, loaded.class_names) == (filters.method, filters.layer, filters.class_names)
    assert dict(loaded.meta) == dict(filters.meta)
    assert torch.equal(ClassFilters.merge(filters, loaded).scores, 2 * filters.scores)


def test_tables_that_share_memory_are_saved(tmp_path):
    filters = replace(table(), mass=table().scores)
    filters = replace(filters, scores=filters.mass)
    filters.save(tmp_path / "filters.safetensors")
    assert torch.equal(ClassFilters.load(tmp_path / "filters.safetensors").mass, filters.scores)


def test_load_refuses_another_kind_of_file(tmp_path):
    (tmp_path / "notes.txt").write_text("not a table")
    with pytest.raises(FileFormatError, match=r"notes\.txt is not a whole safetensors file"):
        ClassFilters.load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="no file at"):
        ClassFilters.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        ClassFilters.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write f into; create it first"):
        table().save(tmp_path / "nowhere" / "f")


def test_load_refuses_a_table_that_is_not_whole(tmp_path):
    filters = table()
    tensors = {"scores": filters.scores, "mass": filters.mass, "counts": filters.counts}
    write(tmp_path / "f", tensors, kind="ClassFilters", version=1, meta={"method": "histogram", "layer": "fc"})
    with pytest.raises(FileFormatError, match=r"does not hold a whole table .*class_names"):
        ClassFilters.load(tmp_path / "f")


@pytest.mark.parametrize("k", [0, 10, -1, 2.0, True])
@pytest.mark.parametrize("method", ["top", "mask", "overlap"])
def test_k_outside_the_channels_is_refused(method, k):
    with pytest.raises(OptionError, match=r"k must be an integer in \[1, 9\]"):
        getattr(table(), method)(k)


def test_unknown_classes_are_refused_with_the_known_ones():
    with pytest.raises(OptionError, match="no class is named 'hat'; the names are: shirt, coat, bag, boot"):
        table().contrast("hat", "bag", k=2)
    with pytest.raises(OptionError, match=r"a class must be an integer in \[0, 3\], its index, or a name; got 4"):
        table().contrast(0, 4, k=2)
    with pytest.raises(OptionError, match=r"got 1\.7"):
        table().index(1.7)
    with pytest.raises(OptionError, match="two different classes"):
        table().contrast("bag", 2, k=2)


def test_tables_that_do_not_fit_together_are_refused():
    filters = table()
    with pytest.raises(ShapeError, match="scores and mass"):
        replace(filters, mass=filters.mass[:, 1:])
    with pytest.raises(ShapeError, match="one for each row"):
        replace(filters, counts=filters.counts[1:])
    with pytest.raises(ShapeError, match="one for each row"):
        replace(filters, class_names=("a", "b"))
    with pytest.raises(OptionError, match="'a' more than once"):
        replace(filters, class_names=("a", "b", "a", "c"))


def test_repr_says_what_is_there():
    assert repr(table(unseen=[1])) == (
        "ClassFilters('histogram', 4 classes x 9 channels of 'fc', 21 samples, 1 classes unseen)"
    )
