"""Files: whole or not at all, never executed, and refused with a reason."""

import json
import os
import pickle
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_classfilters import ClassFilters
from captum_classfilters.core import files
from captum_classfilters.core.errors import FileFormatError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "b": torch.tensor([1, -2], dtype=torch.int64),
    "c": torch.tensor([[True, False]]),
    "d": torch.tensor([1.5], dtype=torch.bfloat16),
}
META = {"name": "Zürich", "values": [1, 2.5, None], "nested": {"yes": True}}


@pytest.fixture
def path(tmp_path):
    """A file of kind "Table", version 3."""
    path = tmp_path / "table.safetensors"
    save(path)
    return path


def save(path, tensors=TENSORS, meta=META):
    files.write(path, tensors, kind="Table", version=3, meta=meta)


def load(path, tensors=()):
    return files.read(path, kind="Table", version=3, tensors=tensors)


def assert_same(found, tensors=TENSORS, meta=META):
    found_tensors, found_meta = found
    assert found_meta == meta
    assert set(found_tensors) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found_tensors[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("names", [(), ("d", "c", "b", "a")])
def test_round_trip(path, names):
    assert_same(load(path, names))


@pytest.mark.parametrize("kind", [str, os.fspath, lambda path: path])
def test_a_path_is_text_or_path(path, kind):
    assert_same(load(kind(path)))
    save(kind(path), meta={})
    assert load(path)[1] == {}


def test_tensors_are_saved_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": base.T,
        "every other": base[:, ::2],
        "with gradient": base.clone().requires_grad_(),
        "empty": base[:0],
    }
    save(tmp_path / "table", tensors)
    found, _ = load(tmp_path / "table")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert not found[name].requires_grad


def test_loaded_tensors_do_not_hang_on_the_file(path):
    found = load(path)
    save(path, {"a": torch.zeros(2, 3)}, {})
    os.remove(path)
    assert_same(found)


def test_the_file_is_as_readable_as_any_other(path):
    path.with_name("other").touch()
    assert path.stat().st_mode == path.with_name("other").stat().st_mode


def test_nothing_but_the_file_is_left(path):
    save(path)
    assert os.listdir(path.parent) == [path.name]


# -- a write that fails ------------------------------------------------------------------------------------------------


def fail(*args, **options):
    raise OSError("no space left on device")


def save_half(tensors, beside, metadata):
    with open(beside, "wb") as file:
        file.write(b"half of it")
    raise KeyboardInterrupt


FAILURES = {
    "before a byte": ("save_file", fail, OSError),
    "half way": ("save_file", save_half, KeyboardInterrupt),
    "at the rename": ("os.replace", fail, OSError),
}


@pytest.mark.parametrize("when", FAILURES)
@pytest.mark.parametrize("there", [True, False], ids=["a file there", "none there"])
def test_a_failed_write_changes_nothing(when, there, path, monkeypatch):
    what, replacement, error = FAILURES[when]
    before = path.read_bytes()
    if not there:
        path.unlink()
    monkeypatch.setattr(f"captum_classfilters.core.files.{what}", replacement)
    with pytest.raises(error):
        save(path, {"a": torch.zeros(1)}, {})
    monkeypatch.undo()
    assert os.listdir(path.parent) == ([path.name] if there else [])
    if there:
        assert path.read_bytes() == before


def test_what_json_cannot_hold_is_known_before_the_file_is_touched(path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(path, meta={"odd": object()})
    assert os.listdir(path.parent) == [path.name]
    assert_same(load(path))


def test_no_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "no such folder" / "table")


# -- files that are not ours, or no longer whole -----------------------------------------------------------------------


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*none"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        load(tmp_path)


def test_truncated_at_any_length(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"is not a whole safetensors file.*truncated"):
            load(path)


def test_more_than_whole(path):
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    with pytest.raises(FileFormatError, match="is not a whole safetensors file"):
        load(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_an_error_of_ours_or_a_table(data, tmp_path_factory):
    """No byte anywhere makes reading fail in another way."""
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    save(path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        tensors, _ = load(path, tuple(TENSORS))
    except FileFormatError:
        return
    assert set(tensors) == set(TENSORS)


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\3\4 a zip", b"\xff" * 64, b"hello" * 100], ids=repr)
def test_other_formats(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="is not a whole safetensors file"):
        load(path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_nothing_in_a_file_is_executed(how, tmp_path):
    path, traces = tmp_path / "bomb.safetensors", tmp_path / "it ran"
    with open(path, "wb") as file:
        (pickle.dump if how == "pickle" else torch.save)(Bomb(traces), file)
    for read in (load, ClassFilters.load):
        with pytest.raises(FileFormatError):
            read(path)
    assert not traces.exists()


def test_a_foreign_safetensors_file(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "foreign", metadata={"format": "pt"})
    with pytest.raises(FileFormatError, match="without a captum_classfilters header; expected a Table"):
        load(tmp_path / "foreign")


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"text"',
        "{}",
        '{"kind": "Table"}',
        '{"kind": "Table", "version": 3}',
    ],
)
def test_a_broken_header(header, tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "broken", metadata={"captum_classfilters": header})
    with pytest.raises(FileFormatError, match="has a broken captum_classfilters header"):
        load(tmp_path / "broken")


def test_a_header_that_announces_more_than_there_is(tmp_path):
    header = json.dumps({"a": {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(FileFormatError):
        load(tmp_path / "file")


def test_another_kind(path):
    with pytest.raises(FileFormatError, match=r"holds a Table; expected a ClassFilters: load it with Table\.load"):
        ClassFilters.load(path)


@pytest.mark.parametrize("version", [2, 4, "3"])
def test_another_schema_version(path, version):
    with pytest.raises(FileFormatError, match="has schema version 3 of Table; this version of the package reads"):
        files.read(path, kind="Table", version=version)


@pytest.mark.parametrize("names", [("a", "b", "c", "d", "e"), ("a", "b", "c")], ids=["missing", "unexpected"])
def test_other_tensors_than_expected(path, names):
    with pytest.raises(FileFormatError, match=r"should hold \['a', 'b', 'c'.*got \['a', 'b', 'c', 'd'\]"):
        load(path, names)
