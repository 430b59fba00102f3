"""`aggregate`: any layer attribution summed by class, against a loop and against this package's own pass."""

import pytest
import torch
from captum.attr import (
    IntegratedGradients,
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)

from captum_classfilters import ClassFilters, ClassFiltersError, InfluentialFeatures, UnseenClassWarning
from captum_classfilters.comparison import aggregate

NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def case(small_cnn, images):
    model = small_cnn()
    x, y = images(30), torch.randint(4, (30,), generator=torch.Generator().manual_seed(0))
    return model, [(x[:12], y[:12]), (x[12:], y[12:])], x, y


def by_hand(values, y, classes=4):
    scores = torch.zeros(classes, values.shape[1], dtype=torch.float64)
    for row, label in zip(values.double(), y.tolist(), strict=True):
        scores[label] += row
    return scores


def test_contributions_agree_with_the_package_s_own_pass(case):
    model, loader, *_ = case
    own = InfluentialFeatures(model).attribute(loader, selector="contribution", class_names=NAMES)
    found = aggregate(InfluentialFeatures(model), loader, classes=NAMES)
    torch.testing.assert_close(found.scores, own.scores, atol=1e-6, rtol=0)
    assert torch.equal(found.counts, own.counts)
    assert torch.equal(found.top(3), own.top(3))


@pytest.mark.parametrize("importance", ["signed", "abs"])
@pytest.mark.parametrize("kind", [LayerIntegratedGradients, LayerConductance, LayerGradientXActivation])
def test_sums_agree_with_a_loop(case, kind, importance):
    model, loader, x, y = case
    attribution = kind(model, model.conv2)
    options = {} if kind is LayerGradientXActivation else {"n_steps": 4}
    found = aggregate(attribution, loader, importance=importance, classes=NAMES, **options)
    values = torch.cat(
        [kind(model, model.conv2).attribute(a[None], target=int(b), **options) for a, b in zip(x, y, strict=True)]
    )
    values = values.detach().sum((2, 3))
    torch.testing.assert_close(
        found.scores, by_hand(values.abs() if importance == "abs" else values, y), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(found.mass, by_hand(values.abs(), y), atol=1e-4, rtol=1e-4)
    assert found.counts.tolist() == y.bincount(minlength=4).tolist()
    assert (found.method, found.layer, found.class_names) == (kind.__name__, "conv2", NAMES)


def test_one_without_target_and_predictions_in_place_of_labels(case):
    model, loader, x, _ = case
    with pytest.warns(UnseenClassWarning):  # it predicts one class only
        found = aggregate(
            LayerActivation(model, model.conv2), [images for images, _ in loader], label_source="prediction"
        )
    with torch.no_grad():
        predicted = model(x).argmax(1)
        seen = []
        hook = model.conv2.register_forward_hook(lambda module, args, output: seen.append(output))
        model(x)
        hook.remove()
    torch.testing.assert_close(found.scores, by_hand(seen[0].sum((2, 3)), predicted), atol=1e-3, rtol=1e-4)


def test_grad_cam_must_not_sum_over_channels(case):
    model, loader, *_ = case
    with pytest.raises(ClassFiltersError, match="attr_dim_summation=False"):
        aggregate(LayerGradCam(model, model.conv2), loader)
    assert aggregate(LayerGradCam(model, model.conv2), loader, attr_dim_summation=False).num_channels == 6


def test_tokens_have_their_channels_last(case):
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(12, 5)
            self.head = torch.nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.mix(x.flatten(2).transpose(1, 2)[:, :, None].expand(-1, -1, 12, -1)[..., 0]).mean(1))

    _, loader, *_ = case
    model = Tokens().eval()
    found = aggregate(LayerGradientXActivation(model, model.mix), loader, channel_dim=-1)
    assert found.scores.shape == (4, 5)


def test_shards_merge_to_the_bits_of_one_pass(case):
    model, loader, *_ = case
    attribution = LayerGradientXActivation(model, model.conv2)
    whole = aggregate(attribution, loader)
    parts = ClassFilters.merge(*(aggregate(attribution, [batch]) for batch in loader))
    assert torch.equal(whole.scores, parts.scores)
    assert torch.equal(whole.mass, parts.mass)


def test_the_model_is_given_back_and_what_was_summed_is_kept(case):
    model, loader, *_ = case
    model.train()

    def failing():
        yield loader[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        aggregate(LayerGradientXActivation(model, model.conv2), failing())
    assert int(caught.value.partial_result.counts.sum()) == 12
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_gives_the_same_table(case):
    model, loader, *_ = case
    expected = aggregate(LayerGradientXActivation(model, model.conv2), loader)
    compiled = torch.compile(model, backend="eager")
    compiled(loader[0][0])  # now it skips hooks that come later
    found = aggregate(LayerGradientXActivation(compiled, model.conv2), loader)
    assert torch.equal(expected.scores, found.scores)
    assert found.layer == "conv2"


def test_mappings_and_integers_are_read_as_everywhere(case):
    model, loader, *_ = case
    expected = aggregate(LayerGradientXActivation(model, model.conv2), loader)
    found = aggregate(LayerGradientXActivation(model, model.conv2), iter([{"image": x, "label": y} for x, y in loader]))
    assert torch.equal(expected.scores, found.scores)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"importance": "l2"}, "importance must be"),
        ({"label_source": "guess"}, "label_source must be"),
        ({"classes": ("a", "b")}, "the model has 4 outputs.*says 2"),
        ({"classes": 20}, "the model has 4 outputs.*says 20"),
    ],
)
def test_options_are_refused_in_words(case, options, words):
    model, loader, *_ = case
    with pytest.raises(ClassFiltersError, match=words):
        aggregate(LayerGradientXActivation(model, model.conv2), loader, **options)


def test_bad_attributions_and_loaders_are_refused_in_words(case):
    model, loader, x, _ = case
    with pytest.raises(ClassFiltersError, match="layer attribution"):
        aggregate(IntegratedGradients(model), loader)
    with pytest.warns(UnseenClassWarning, match="no sample of class 3"):
        aggregate(LayerActivation(model, model.conv2), [(x[:3], torch.arange(3))])
    with pytest.raises(ClassFiltersError, match="no sample"):
        aggregate(LayerGradientXActivation(model, model.conv2), [])
    with pytest.raises(ClassFiltersError, match="no labels"):
        aggregate(LayerGradientXActivation(model, model.conv2), [x])
    with pytest.raises(ClassFiltersError, match="one tensor"):
        aggregate(LayerActivation(model, [model.conv1, model.conv2]), loader)
    with pytest.raises(ClassFiltersError, match="NaN or infinity in batch 0"):
        aggregate(LayerActivation(model, model.conv2), [(x * torch.nan, torch.zeros(30, dtype=torch.int64))])
