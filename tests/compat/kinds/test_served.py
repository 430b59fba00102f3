"""What kinds of classifiers are served, and how: the readme's table, made from the tests of this folder."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from captum.attr import LayerActivation
from torch import nn

from captum_classfilters import HeadPass, aggregate
from captum_classfilters.core.errors import HeadError

README = Path(__file__).parents[3] / "README.md"
# kind of network, how it is served, the tests that say so
SERVED = [
    (
        "Hugging Face, dict, tuple and object outputs",
        "as they are, with the class names of `config.id2label`; other outputs by `output=`, a function",
        ["test_output_forms.test_every_call_reads_every_form", "test_output_forms.test_measures"],
    ),
    (
        "one logit, also behind a sigmoid",
        "two classes, of which the first has the negative weights: all calls of the head, gates, CAM, retraining",
        ["test_one_logit.test_tables_of_two_classes", "test_one_logit.test_the_smaller_network_has_one_logit"],
    ),
    (
        "many labels, rows of 0 and 1",
        "a sample counts for each of its classes; average precision and balanced accuracy instead of accuracy",
        [
            "test_many_labels.test_each_sample_counts_for_each_of_its_classes",
            "test_many_labels.test_what_a_table_serves",
        ],
    ),
    (
        "transformers, channels last (ViT, DeiT, Swin, ConvNeXt)",
        "maps of (h, w) without `reshape=`; layouts are proved by value, others are refused and `reshape=` named",
        ["test_tokens.test_tables_maps_confusion_and_smaller_heads"],
    ),
    (
        "signals and volumes (1-D, 3-D)",
        "maps over their positions; cards are curves, or the middle slice",
        ["test_dimensions.test_cards_without_a_map_say_why"],
    ),
    (
        "LoRA and PEFT adapters, averaged heads, temperature, weight norm, softmax at the end",
        "with their effective weights; `decompose` gives a working smaller network",
        [
            "test_heads.test_the_head_is_the_effective_one",
            "test_heads.test_the_smaller_network_answers_as_the_formula_does",
        ],
    ),
    (
        "cosine and normalised heads, regression, detection, segmentation",
        "refused with the reason; `aggregate` with a Captum layer attribution scores the channels of any layer",
        ["test_served.test_what_has_no_linear_head_is_refused_and_the_remedy_works"],
    ),
]


def table():
    rows = [f"| {kind} | {how} |" for kind, how, _ in SERVED]
    return "\n".join(["| your network | how it is served |", "|---|---|", *rows])


def test_the_readme_has_the_table_of_these_tests():
    assert table() in README.read_text(encoding="utf-8"), f"the table has changed; the readme needs:\n{table()}"


@pytest.mark.parametrize("name", [name for _, _, names in SERVED for name in names])
def test_what_the_table_says_is_tested(name):
    module, _, function = name.partition(".")
    if module == "test_served":
        assert function in globals()
    else:
        assert hasattr(import_module(module), function)


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, images):
        return self.head(self.conv(images).relu())


class Detector(Segmenter):
    def forward(self, images):
        return [{"boxes": torch.zeros(1, 4), "scores": image.mean()} for image in super().forward(images)]


class Quadratic(Segmenter):
    def forward(self, images):
        return super().forward(images).mean((2, 3)).square()


@pytest.mark.parametrize("make", [Segmenter, Detector, Quadratic])
def test_what_has_no_linear_head_is_refused_and_the_remedy_works(make):
    model = make().eval()
    loader = [(torch.rand(8, 3, 8, 8), torch.arange(8) % 4)]
    with pytest.raises(HeadError, match=r"aggregate\(LayerActivation\(model, layer\), loader\) scores the channels"):
        print(HeadPass(model, loader).head)
    if make is Quadratic:
        assert aggregate(LayerActivation(model, model.conv), loader).scores.shape == (4, 8)
    else:
        assert aggregate(LayerActivation(model, model.conv), loader, classes=4).scores.shape == (4, 8)
