"""export_onnx: onnxruntime answers as torch does, for batches of any size; whole files or none."""

import logging

import pytest
import torch
from contract import Snapshot
from torch import nn

from captum_classfilters import ClassFilters
from captum_classfilters.core.errors import OptionError
from captum_classfilters.heads import DecomposedLinear, decompose, export_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


needs_exporter = pytest.mark.skipif(not hasattr(torch.export.Dim, "DYNAMIC"), reason="needs torch 2.6")


def rows(count, seed=0):
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def head(kind):
    linear = nn.Linear(12, 5)
    with torch.no_grad():
        linear.weight.copy_(rows(5, seed=1))
    if kind == "ragged":
        mask = rows(5, seed=2) > 0
        mask[0], mask[1] = False, True
        return DecomposedLinear.from_linear(linear, mask)
    return DecomposedLinear.from_linear(linear, rows(5, seed=2).argsort(1)[:, :3])


def any_table():
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    return ClassFilters(scores, scores, torch.ones(4, dtype=torch.int64), "histogram", "fc", tuple("abcd"))


def answers(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"inputs": inputs.numpy()})[0])


@needs_exporter
@pytest.mark.parametrize(("kind", "example"), [("even", 1), ("ragged", 4)])
def test_the_file_answers_as_the_layer_does_for_any_batch(kind, example, tmp_path):
    layer = head(kind)
    export_onnx(layer, rows(example), tmp_path / "head.onnx")
    for count in (1, 3, 17):
        with torch.no_grad():
            torch.testing.assert_close(answers(tmp_path / "head.onnx", rows(count)), layer(rows(count)))
    written = onnx.load(tmp_path / "head.onnx")
    assert [entry.version for entry in written.opset_import if entry.domain == ""] == [18]
    assert "Gather" in {node.op_type for node in written.graph.node}


@needs_exporter
def test_a_whole_network_answers_as_it_does_in_eval_mode_and_is_given_back(small_cnn, images, tmp_path):
    model = decompose(small_cnn(), any_table(), 2, backend="bag").train()
    model.bn1.eval()
    before = Snapshot.of(model)
    export_onnx(model, images(2), tmp_path / "model.onnx", opset=20)
    Snapshot.of(model).assert_same(before)
    model.eval()
    for count in (1, 3, 17):
        with torch.no_grad():
            expected = model(images(count))
        torch.testing.assert_close(answers(tmp_path / "model.onnx", images(count)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [7, 99, "18", True, 17])
def test_an_operator_set_it_cannot_write_is_refused(opset, tmp_path):
    with pytest.raises(OptionError, match=rf"opset must be an integer in \[18, \d+\], .* got {opset!r}$"):
        export_onnx(head("even"), rows(2), tmp_path / "head.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_refused_before_the_export(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to write head.onnx into"):
        export_onnx(nn.Identity(), None, tmp_path / "nowhere" / "head.onnx")


def test_an_older_torch_is_refused_before_the_export(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.export.Dim, "DYNAMIC", raising=False)
    with pytest.raises(ImportError, match=r"export_onnx needs torch 2\.6 or newer, .* this is \d+\.\d+"):
        export_onnx(nn.Identity(), None, tmp_path / "head.onnx")
    assert not list(tmp_path.iterdir())


class Unexportable(nn.Linear):
    """Asks for a number that only data can give."""

    def forward(self, x):
        return super().forward(x) * float(x.sum()) if float(x.sum()) > 0 else x


@needs_exporter
@pytest.mark.parametrize("when", ["exporting", "writing"])
def test_an_export_that_fails_leaves_an_older_file_whole_and_the_model_as_it_was(when, tmp_path, monkeypatch):
    path = tmp_path / "head.onnx"
    path.write_bytes(b"older")
    model = Unexportable(12, 5).train() if when == "exporting" else head("even").train()
    if when == "writing":
        monkeypatch.setattr("onnx.save", half_written)
    before, levels = Snapshot.of(model), logging.getLogger("torch.onnx").level
    with pytest.raises(Exception):  # noqa: B017, PT011 - of the exporter's own kind
        export_onnx(model, rows(2), path)
    Snapshot.of(model).assert_same(before)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]
    assert logging.getLogger("torch.onnx").level == levels


def half_written(proto, path):
    path.write_bytes(b"half")
    raise OSError("disk full")
