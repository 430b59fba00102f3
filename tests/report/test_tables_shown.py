"""Tables as frames and as HTML, and classes asked for by a name that is spelt nearly right."""

import pytest
import torch
from pages import HOSTILE, random_table

from captum_classfilters import ClassFilters
from captum_classfilters.core.errors import OptionError


def test_to_frame_has_the_top_channels_in_order():
    table = random_table(3, 7, names=("cat", "dog", "fox"))
    frame = table.to_frame(4)
    assert frame.channel.tolist() == table.top(4).flatten().tolist()
    assert frame["rank"].tolist() == [1, 2, 3, 4] * 3
    for row in frame.itertuples():
        assert row.score == float(table.scores[table.index(row.class_name), row.channel])
    assert len(table.to_frame()) == 21


def test_a_class_without_samples_has_no_rows():
    scores = torch.rand(2, 3, dtype=torch.float64)
    table = ClassFilters(scores, scores, torch.tensor([0, 5]), "histogram", "fc", ("cat", "dog"))
    assert set(table.to_frame().class_name) == {"dog"}
    assert "no samples" in table._repr_html_()


def test_html_escapes_names_and_says_how_many_are_left_out():
    text = random_table(6, 7, names=HOSTILE)._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "and 5 more classes" in random_table(25, 7)._repr_html_()


@pytest.mark.parametrize(("asked", "row"), [("Ankle Boot", 1), ("SHIRT", 0), ("t-shirt", 2), ("T-Shirt", 3)])
def test_names_are_read_whatever_their_case(asked, row):
    assert random_table(4, 3, names=("shirt", "ankle boot", "t-shirt", "T-Shirt")).index(asked) == row


def test_a_name_spelt_nearly_right_is_asked_about():
    table = random_table(3, 3, names=("Shirt", "ankle boot", "coat"))
    with pytest.raises(OptionError, match="did you mean 'Shirt'"):
        table.index("shrit")
    with pytest.raises(OptionError, match="no class is named 'zebra'; the names are: Shirt"):
        table.index("zebra")
