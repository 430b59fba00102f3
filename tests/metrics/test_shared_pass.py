"""Every measure of the head gives the same of a model and a loader, of a `HeadPass`, and of a cached one."""

import pandas as pd
import pytest
import torch

from captum_classfilters import HeadPass, InfluentialFeatures, metrics
from captum_classfilters.core import head_pass as module
from captum_classfilters.core.errors import OptionError

MEASURES = {
    "accuracy_curve": lambda filters, *source: metrics.accuracy_curve(source[0], filters, *source[1:], ks=[1, 3]),
    "class_ablation": lambda filters, *source: metrics.class_ablation(source[0], filters, *source[1:], k=2),
    "masked_confusion": lambda filters, *source: metrics.masked_confusion(
        source[0], filters, *source[1:], classes=["0", ("1", "2")], k=2
    ),
    "class_masking": lambda filters, *source: metrics.class_masking(source[0], filters, *source[1:], k=2),
    "channel_deletion": lambda filters, *source: metrics.channel_deletion(source[0], filters, *source[1:], sizes=3),
    "stability": lambda filters, *source: metrics.stability(*source, k=2, draws=5),
}


@pytest.fixture
def task(small_cnn, images):
    """A network, its loader and a table."""
    model, loader = small_cnn(), [(images(size, seed), torch.arange(size) % 4) for seed, size in enumerate((20, 17))]
    return model, loader, InfluentialFeatures(model).attribute(loader)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_frame_is_the_same_of_a_model_a_head_pass_and_a_cached_one(task, measure):
    model, loader, filters = task
    head_pass = HeadPass(model, loader)
    expected = measure(filters, model, loader)
    assert expected.control.dtype == bool
    assert expected.control.nunique() == 2  # rows of chance, and others
    pd.testing.assert_frame_equal(measure(filters, head_pass), expected)
    pd.testing.assert_frame_equal(measure(filters, head_pass.cached()), expected)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_head_pass_with_a_loader_and_a_model_without_one_are_refused(task, measure):
    model, loader, filters = task
    with pytest.raises(OptionError, match="a HeadPass has its own loader and layer"):
        measure(filters, HeadPass(model, loader), loader)
    with pytest.raises(OptionError, match="a loader is missing"):
        measure(filters, model)


@pytest.mark.parametrize("cached", [False, True])
def test_several_measures_find_the_head_once_and_a_cached_pass_runs_the_network_once(task, cached, monkeypatch):
    model, loader, filters = task
    searches, seen = [], []

    class Counted(module.HeadSearch):
        def __init__(self, *args):
            searches.append(1)
            super().__init__(*args)

    monkeypatch.setattr(module, "HeadSearch", Counted)
    model.conv1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    head_pass = HeadPass(model, loader)
    head_pass = head_pass.cached() if cached else head_pass
    for measure in MEASURES.values():
        measure(filters, head_pass)
    assert len(searches) == 1
    assert sum(seen) == 37 * (1 if cached else len(MEASURES))
