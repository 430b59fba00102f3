"""What holds for every picture: nothing is shown, no setting changes, nothing is cut off."""

from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch

from captum_classfilters.class_filters import ClassFilters


@pytest.fixture(autouse=True)
def clean_matplotlib(monkeypatch):
    mpl.use("agg")
    # doctests, which may have run in this process before, leave theirs open
    plt.close("all")
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: pytest.fail("plt.show was called"))
    before = dict(mpl.rcParams)
    yield
    after = dict(mpl.rcParams)
    plt.close("all")
    assert after == before


@pytest.fixture
def table():
    """Builds a ClassFilters of given rows."""

    def build(scores, counts=None, merge="sum", names=None, mass=None, layer="fc"):
        scores = torch.as_tensor(scores, dtype=torch.float64)
        counts = torch.full((len(scores),), 10) if counts is None else torch.as_tensor(counts)
        names = tuple(names or (f"class {i}" for i in range(len(scores))))
        mass = torch.zeros_like(scores) if mass is None else mass
        return ClassFilters(scores, mass, counts, "histogram", layer, names, merge_rule=merge)

    return build


@pytest.fixture
def inside():
    """Draws the figure of some axes and checks that everything on it lies on the page."""

    def check(ax):
        figure = ax.get_figure()
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 > -0.01, box
        assert box.y0 > -0.01, box
        assert box.x1 < width + 0.01, (box, width)
        assert box.y1 < height + 0.01, (box, height)

    return check


@pytest.fixture
def apart():
    """Checks that the labels along an axis do not run into each other."""

    def check(labels):
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        assert boxes
        for one, other in pairwise(boxes):
            assert not one.overlaps(other), (one, other)

    return check
