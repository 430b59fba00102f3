"""`ALDTree`: nodes by name, their neurons, what is printed, files."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from captum_classfilters import ALDTree, ClassFilters
from captum_classfilters.core.errors import FileFormatError, OptionError
from captum_classfilters.core.files import read, write
from captum_classfilters.splitting.splits import Side, split_weights

WEIGHTS = torch.tensor([[-3.0, -1.0, 1.0, 2.0, 3.0, 8.0, 0.0], [-1.0, -2.0, -3.0, -4.0, -9.0, 0.0, 0.0]])


def tree(row=0, **options):
    return ALDTree(split_weights(WEIGHTS, min_size=3, layer="fc", targets=(4, 7), **options), row)


def large(**options):
    weights = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    return ALDTree(split_weights(weights, **options), 1)


def test_nodes_by_hand():
    found = tree()
    assert list(found.nodes) == ["+1", "+2", "-1"]
    assert (found.nodes["+1"].size, found.nodes["+1"].threshold, found.nodes["+1"].mean) == (4, 0.0, 3.5)
    assert (found.nodes["+2"].size, found.nodes["+2"].threshold, found.nodes["+2"].mean) == (1, 3.5, 8.0)
    assert (found.nodes["-1"].size, found.nodes["-1"].threshold, found.nodes["-1"].mean) == (2, 0.0, 2.0)
    x = np.arange(4) / 4
    assert [found.nodes["+1"].slope, found.nodes["+1"].intercept] == pytest.approx(
        np.polyfit(x, np.log([1, 2, 3, 8]), 1)
    )
    assert found.channels("+1").tolist() == [5, 4, 3, 2]
    assert found.channels("+2").tolist() == found.terminal("positive").tolist() == [5]
    assert found.channels("-1").tolist() == found.terminal("negative").tolist() == [0, 1]
    assert (found.target, found.layer, found.zeros, found.min_size, found.first_threshold) == (4, "fc", 1, 3, 0.0)
    assert torch.equal(found.weights, WEIGHTS[0])
    assert found.laplace is None


def test_a_side_without_weights_is_empty():
    found = tree(1)
    assert list(found.nodes) == ["-1", "-2"]
    assert found.depth("positive") == 0
    assert found.terminal("positive").shape == (0,)
    assert found.terminal("positive").dtype == torch.int64
    assert found.terminal("negative").tolist() == [4, 3]


@pytest.mark.parametrize("first_threshold", ["zero", "mean"])
def test_each_node_holds_the_next_one(first_threshold):
    found = large(first_threshold=first_threshold, min_size=5)
    for sign, branch in (("+", "positive"), ("-", "negative")):
        depth = found.depth(branch)
        assert depth > 2
        names = [f"{sign}{stage}" for stage in range(1, depth + 1)]
        assert [name for name in found.nodes if name[0] == sign] == names
        away = found.weights.double() - found.first_threshold
        beyond = away if sign == "+" else -away
        for outer, inner in pairwise(names):
            assert set(found.channels(inner).tolist()) < set(found.channels(outer).tolist())
            beyond = (found.weights - found.first_threshold).double() * (1 if sign == "+" else -1)
            away = found.weights.double() - found.first_threshold
            beyond = away if sign == "+" else -away
            assert set(found.channels(inner).tolist()) == set(
                (beyond > found.nodes[outer].mean).nonzero()[:, 0].tolist()
            )
            strengths = beyond[found.channels(inner)]
            assert torch.equal(strengths, strengths.sort(descending=True).values)
        assert all(len(found.channels(name)) == found.nodes[name].size for name in names)
        assert all(found.nodes[name].size >= 5 for name in names[:-1])
        assert torch.equal(found.terminal(branch), found.channels(names[-1]))


def test_the_print():
    lines = [" ".join(line.split()) for line in str(tree()).splitlines()]
    assert lines == [
        "class 4: 7 weights of layer 'fc', 1 of them 0 and dropped",
        "+1 4 neurons > 0 slope 2.66 R2 .97",
        "+2 1 neurons > 3.5 terminal",
        "-1 2 neurons < 0 slope 2.2 R2 1.00 terminal",
    ]
    assert [len(line) - len(line.lstrip()) for line in str(large()).splitlines()][:4] == [0, 0, 2, 4]
    assert "no weights on the positive side" in str(tree(1))
    assert repr(tree()) == "ALDTree(class 4, 7 weights, nodes +1, +2, -1)"
    mean = tree(first_threshold="mean")
    assert mean.first_threshold == pytest.approx(10 / 6)
    assert "+1     3 neurons > 1.67" in str(mean)
    assert "-1     3 neurons < 1.67" in str(mean)


@pytest.mark.parametrize("name", ["+3", "-2", "1", "", "+0", 1, "terminal"])
def test_an_unknown_node_is_refused(name):
    with pytest.raises(OptionError, match=r"the tree of class 4 has no node .*; its nodes are: \+1, \+2, -1"):
        tree().channels(name)


def test_an_unknown_branch_is_refused():
    for call in (tree().terminal, tree().depth):
        with pytest.raises(OptionError, match='branch must be "positive" or "negative", got \'up\''):
            call("up")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fit": "mle", "first_threshold": "mean", "min_size": 7}], ids=str)
def test_a_saved_tree_comes_back_to_the_bit(tmp_path, options):
    saved = large(**options)
    saved.save(tmp_path / "tree.safetensors")
    found = ALDTree.load(tmp_path / "tree.safetensors")
    assert torch.equal(found.weights, saved.weights)
    assert found.weights.dtype == saved.weights.dtype
    # as text, for NaN is not equal to NaN
    assert repr(found.nodes) == repr(saved.nodes)
    assert str(found) == str(saved)
    assert (found.target, found.layer, found.zeros, found.min_size) == (saved.target, saved.layer, 0, saved.min_size)
    assert found.first_threshold == saved.first_threshold
    for name in saved.nodes:
        assert torch.equal(found.channels(name), saved.channels(name))
    if options:
        np.testing.assert_array_equal(np.stack(found.laplace), np.stack(saved.laplace))
        assert found.laplace.location.shape == (1,)
    else:
        assert found.laplace is None
    found.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "tree.safetensors").read_bytes()


def test_broken_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "tree.safetensors"
    with pytest.raises(FileNotFoundError):
        ALDTree.load(path)
    large().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        ALDTree.load(path)
    scores = torch.ones(2, 3, dtype=torch.float64)
    ClassFilters(scores, scores, torch.ones(2, dtype=torch.int64), "m", "fc", ("a", "b")).save(path)
    with pytest.raises(FileFormatError, match="holds a ClassFilters; expected a ALDTree"):
        ALDTree.load(path)


def test_a_file_whose_tables_do_not_fit_together_is_refused(tmp_path):
    path = tmp_path / "tree.safetensors"
    large().save(path)
    tensors, about = read(path, kind="ALDTree", version=1)
    tensors["negative mean"] = tensors["negative mean"][:, :-1].contiguous()
    write(path, tensors, kind="ALDTree", version=1, meta=about)
    with pytest.raises(FileFormatError, match="do not fit together"):
        ALDTree.load(path)


@pytest.mark.parametrize("lost", ["weights", *(f"negative {name}" for name in Side._fields), "min_size", "layer"])
def test_a_file_with_a_part_missing_is_refused(tmp_path, lost):
    path = tmp_path / "tree.safetensors"
    large().save(path)
    with safe_open(path, "pt") as opened:
        header = json.loads(opened.metadata()["captum_classfilters"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys() if name != lost}  # noqa: SIM118
    header["meta"].pop(lost, None)
    save_file(tensors, path, metadata={"captum_classfilters": json.dumps(header)})
    with pytest.raises(FileFormatError, match="does not hold a whole tree"):
        ALDTree.load(path)
