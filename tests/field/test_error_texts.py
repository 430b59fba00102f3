"""What an error says is true, and its remedy works when it is followed."""

import pytest
import torch
from torch import nn

from captum_classfilters import ALDSplitter, HeadPass, InfluentialFeatures
from captum_classfilters.core.errors import HeadError, LabelError


def batches(*shape, dtype=torch.int64):
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(8, *shape, generator=generator), (torch.arange(8) % 4).to(dtype))]


def test_a_name_is_told_as_the_name_that_it_is():
    splitter = ALDSplitter(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    names = ("cat", "dog", "owl")
    with pytest.raises(LabelError, match=r"got the name 'cat'; use class_names.index\('cat'\)"):
        splitter.split("cat")
    assert torch.equal(splitter.split(names.index("cat")).weights, splitter.split(0).weights)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.fc = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(input=self.trunk(x))


class Position(Keyword):
    def forward(self, x):
        return self.fc(self.trunk(x))


def test_a_layer_that_is_called_by_keyword_is_not_said_to_run_once_once():
    with pytest.raises(HeadError, match=r"must be called with its input by position, as self\.fc\(x\)"):
        print(HeadPass(Keyword(), batches(1, 8, 8), layer="fc").head)
    assert HeadPass(Position(), batches(1, 8, 8), layer="fc").head.name == "fc"


def test_a_network_of_signals_hears_of_its_own_head():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    with HeadPass(model, batches(2, 20)).batches(need_maps=True) as stream:
        assert next(stream).maps.shape == (8, 8, 18)


def test_labels_of_many_classes_are_not_told_to_take_the_largest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    soft = [(images, torch.rand(8, 4)) for images, _ in batches(1, 8, 8)]
    with pytest.raises(LabelError) as caught:
        InfluentialFeatures(model).attribute(soft)
    assert "argmax" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", b"", b"\x80\x02}q\x00."], ids=["page", "empty", "pickle"]
)
def test_a_file_that_is_no_checkpoint_is_not_told_to_be_trusted(content, tmp_path):
    from captum_classfilters.cli.models import read_weights

    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"weights\.pt") as caught:
        read_weights(path, None)
    assert "weights_only=False" not in str(caught.value)
