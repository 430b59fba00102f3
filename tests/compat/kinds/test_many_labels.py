"""Networks of many labels: rows of 0 and 1, (N, C), in every call that can take them; in words where one cannot."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from torch import nn

from captum_classfilters import (
    HeadMoments,
    HeadPass,
    InfluentialFeatures,
    PathDecoupler,
    compare,
    decompose,
    explain_confusion,
    filter_ambiguity,
    metrics,
    visualize,
)
from captum_classfilters.comparison import aggregate
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import LabelError, OptionError
from captum_classfilters.core.many_labels import average_precision, balanced_accuracy, quality

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(60, 3, 8, 8, generator=GENERATOR)
C, K = 5, 8
NAMES = tuple("abcde")


class Tagger(nn.Module):
    """Its labels are those it gives itself, with some noise."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.conv, self.fc = nn.Conv2d(3, K, 3), nn.Linear(K, C)
            nn.init.zeros_(self.fc.bias)

    def features(self, images):
        return self.conv(images).relu().mean((2, 3))

    def forward(self, images):
        return self.fc(self.features(images))


MODEL = Tagger().eval()
with torch.no_grad():  # each class for about a third of the images
    LOGITS = MODEL(IMAGES)
    MODEL.fc.bias.sub_(LOGITS.quantile(0.65, 0))
    LOGITS = MODEL(IMAGES)
    FEATURES = MODEL.features(IMAGES)
LABELS = (LOGITS + 0.5 * LOGITS.std() * torch.randn(60, C, generator=GENERATOR)) > 0
LABELS[0] = False  # one without a label, one with all
LABELS[1] = True
WEIGHT = MODEL.fc.weight.detach()


def loader(labels=LABELS, size=25):
    return list(zip(IMAGES.split(size), labels.split(size), strict=True))


FORMS = {
    "bool": LABELS,
    "float": LABELS.float(),
    "int64": LABELS.long(),
    "uint8": LABELS.to(torch.uint8),
}


def table(labels=LABELS, **options):
    return InfluentialFeatures(MODEL).attribute(loader(labels), class_names=NAMES, **options)


@pytest.mark.parametrize("form", FORMS)
def test_each_sample_counts_for_each_of_its_classes(form):
    result = table(FORMS[form], selector="contribution")
    expected = torch.stack([(WEIGHT[c] * FEATURES[LABELS[:, c]]).double().sum(0) for c in range(C)])
    torch.testing.assert_close(result.scores, expected, rtol=1e-4, atol=1e-5)
    assert result.counts.tolist() == LABELS.sum(0).tolist()


def rows_of(selector):
    """What a sample adds to a class, in a loop over samples and classes, from the definitions."""
    features, weight, bias = FEATURES.double(), WEIGHT.double(), MODEL.fc.bias.detach().double()
    scores = torch.zeros(C, K, dtype=torch.float64)
    for f, z, own in zip(features, features @ weight.T + bias, LABELS, strict=True):
        for y in own.nonzero().flatten().tolist():
            if selector == "histogram":
                best = sorted(range(K), key=lambda k, f=f: (-float(f[k].abs()), k))[: round(K**0.5)]
                scores[y, [k for k in best if f[k] != 0]] += 1
            elif selector == "mean_activation":
                scores[y] += f.abs()
            elif selector == "margin":
                others = [r for r in range(C) if not own[r]]
                rival = weight[max(others, key=lambda r, z=z: z[r])] if others else torch.zeros(K)
                scores[y] += (weight[y] - rival) * f
            else:  # ablation
                for k in range(K):
                    scores[y, k] += nn.functional.logsigmoid(z[y]) - nn.functional.logsigmoid(
                        z[y] - weight[y, k] * f[k]
                    )
    return scores


@pytest.mark.parametrize("selector", ["histogram", "mean_activation", "margin", "ablation"])
def test_selectors_are_their_definitions(selector):
    torch.testing.assert_close(table(selector=selector).scores, rows_of(selector), rtol=1e-4, atol=1e-5)


def test_by_prediction_a_logit_above_zero_counts():
    result = table(label_source="prediction", selector="contribution")
    assert result.counts.tolist() == (LOGITS > 0).sum(0).tolist()
    both = table(correct_only=True, selector="contribution")
    assert both.counts.tolist() == ((LOGITS > 0) & LABELS).sum(0).tolist()
    of_config = Tagger().eval()
    of_config.load_state_dict(MODEL.state_dict())
    of_config.config = type("Config", (), {"problem_type": "multi_label_classification"})()
    told = InfluentialFeatures(of_config).attribute([IMAGES], label_source="prediction", selector="contribution")
    torch.testing.assert_close(told.scores, result.scores)
    attribution = LayerGradientXActivation(of_config, of_config.conv)
    assert torch.equal(aggregate(attribution, [IMAGES], label_source="prediction").counts, result.counts)


def test_tables_merge_and_say_that_labels_are_many():
    whole, parts = table(), [InfluentialFeatures(MODEL).attribute([pair], class_names=NAMES) for pair in loader()]
    merged = type(whole).merge(*parts)
    assert torch.equal(merged.scores, whole.scores)
    assert torch.equal(merged.counts, whole.counts)
    assert whole.meta["labels"] == "many"


def test_what_a_table_serves():
    result = table(selector="contribution")
    overlap = result.overlap(3)
    first, second = ({*result.top(3)[row].tolist()} for row in (0, 1))
    assert overlap[0, 1] == pytest.approx(len(first & second) / len(first | second))
    assert {*result.contrast("a", "b", 3).tolist()} == first - second
    explained = InfluentialFeatures(MODEL).explain(IMAGES[:4], "c", result, 3)
    chosen = result.mask(3)[2]
    torch.testing.assert_close(
        explained.mean((1, 2, 3)), (FEATURES[:4] * WEIGHT[2] * chosen).sum(1), rtol=1e-4, atol=1e-5
    )
    assert visualize.filter_cards(MODEL, result, "c", loader(), k=2).size
    plt.close("all")
    confusion = explain_confusion(MODEL, IMAGES[:4], 0, 1)
    torch.testing.assert_close(confusion.difference, (LOGITS[:4, 1] - LOGITS[:4, 0]).double(), rtol=1e-4, atol=1e-5)
    moments = HeadMoments.collect(MODEL, loader())
    small = decompose(MODEL, result, 3, refit="least_squares", moments=moments)
    gap = [(decompose(MODEL, result, 3)(IMAGES) - LOGITS).pow(2).mean(), (small(IMAGES) - LOGITS).pow(2).mean()]
    assert gap[1] < gap[0]
    assert PathDecoupler(MODEL, ["conv"]).paths(loader()).labels is None


def test_captums_attributions():
    result = aggregate(LayerGradientXActivation(MODEL, MODEL.conv), loader())
    maps = MODEL.conv(IMAGES).relu().mean((2, 3))
    expected = torch.stack([(WEIGHT[c] * maps[LABELS[:, c]]).double().sum(0) for c in range(C)])
    torch.testing.assert_close(result.scores, expected, rtol=1e-4, atol=1e-4)
    assert result.counts.tolist() == LABELS.sum(0).tolist()
    predicted = aggregate(LayerGradientXActivation(MODEL, MODEL.conv), loader(), label_source="prediction")
    assert predicted.counts.tolist() == (LOGITS > 0).sum(0).tolist()
    nobody = [(IMAGES[:3], torch.zeros(3, C)), *loader()]
    assert torch.equal(aggregate(LayerGradientXActivation(MODEL, MODEL.conv), nobody).scores, result.scores)


# -- how good it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_precision_and_accuracy_are_scikit_learns(seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(-4, 4, 40) / 2  # equal ones among them
    labels, weights = generator.random(40) < 0.3, generator.integers(0, 4, (3, 40)).astype(float)
    weights[:, labels.argmax()] += 1
    expected = [average_precision_score(labels, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(average_precision(scores, labels, weights), expected)
    expected = [balanced_accuracy_score(labels, scores > 0, sample_weight=w) for w in weights]
    np.testing.assert_allclose(balanced_accuracy(scores[:, None] > 0, labels[:, None], weights)[:, 0], expected)


def test_intervals_are_those_of_the_bootstrap():
    """Against resampling with replacement, one class at a time; both draw at random."""
    ours = quality(LOGITS, LABELS, 200).precision[1:, 1:]
    generator = np.random.default_rng(7)
    theirs = np.empty((200, C))
    for row in theirs:
        chosen = generator.integers(0, 60, 60)
        row[:] = [average_precision_score(LABELS[chosen, c].numpy(), LOGITS[chosen, c].numpy()) for c in range(C)]
    for share in (0.025, 0.5, 0.975):
        np.testing.assert_allclose(np.quantile(ours, share, 0), np.quantile(theirs, share, 0), atol=0.06)


@pytest.fixture(scope="module")
def curve():
    return metrics.accuracy_curve(MODEL, table(selector="contribution"), loader(), [2, 4])


def test_a_curve_of_many_labels(curve):
    dense = curve[curve["filters"] == "dense"].set_index("class_name")
    small = curve[(curve["filters"] == "contribution") & (curve["k"] == 2)].set_index("class_name")
    kept = decompose(MODEL, table(selector="contribution"), 2)(IMAGES).detach()
    for frame, logits in ((dense, LOGITS), (small, kept)):
        precision = [average_precision_score(LABELS[:, c].numpy(), logits[:, c].numpy()) for c in range(C)]
        accuracy = [balanced_accuracy_score(LABELS[:, c].numpy(), logits[:, c].numpy() > 0) for c in range(C)]
        np.testing.assert_allclose(frame.average_precision[list(NAMES)], precision, rtol=1e-5)
        np.testing.assert_allclose(frame.balanced_accuracy[list(NAMES)], accuracy, rtol=1e-5)
        assert frame.average_precision["all"] == pytest.approx(np.mean(precision), rel=1e-5)
        assert ((frame.ap_low <= frame.average_precision) & (frame.average_precision <= frame.ap_high)).all()
    agreement = ((kept > 0) == (LOGITS > 0)).double().mean(0)
    np.testing.assert_allclose(small.agreement[list(NAMES)], agreement)
    assert dense.samples.tolist() == [60, *LABELS.sum(0).tolist()]


def test_the_control_is_the_mean_over_random_tables(curve):
    rows = curve[curve.control & (curve.k == 2)].set_index("class_name")
    drawn = []
    for ranking in Control().rankings((C, K)):
        mask = torch.zeros(C, K).scatter_(1, ranking[:, :2], 1)
        logits = nn.functional.linear(FEATURES, WEIGHT * mask, MODEL.fc.bias.detach())
        drawn.append([average_precision_score(LABELS[:, c].numpy(), logits[:, c].numpy()) for c in range(C)])
    np.testing.assert_allclose(rows.average_precision[list(NAMES)], np.mean(drawn, 0), rtol=1e-5)


def test_the_picture_shows_balanced_accuracy(curve):
    axes = visualize.accuracy_curve(curve, class_name="b")
    row = curve[(curve["filters"] == "contribution") & (curve.class_name == "b")]
    line = next(line for line in axes.lines if line.get_label() == "contribution")
    np.testing.assert_allclose(line.get_ydata(), row.balanced_accuracy)
    assert axes.get_ylabel() == "balanced accuracy of this class"
    plt.close("all")


def test_refits_and_cached_passes(curve):
    moments = HeadMoments.collect(MODEL, loader())
    result, cached = table(selector="contribution"), HeadPass(MODEL, loader()).cached(many_labels=True)
    again = metrics.accuracy_curve(cached, result, ks=[2, 4])
    assert again.equals(curve)
    fitted = metrics.accuracy_curve(cached, result, ks=[2], refit="least_squares", moments=moments)
    logits = decompose(MODEL, result, 2, refit="least_squares", moments=moments)(IMAGES).detach()
    row = fitted[(fitted["filters"] == "contribution") & (fitted.class_name == "b")].iloc[0]
    assert row.average_precision == pytest.approx(average_precision_score(LABELS[:, 1].numpy(), logits[:, 1].numpy()))
    pursued = metrics.accuracy_curve(cached, None, ks=[2], refit="omp", moments=moments)
    assert "omp" in set(pursued["filters"])


def test_a_class_that_nobody_has_is_nan():
    labels = LABELS.clone()
    labels[:, 3] = False
    with pytest.warns(match="no sample of class d"):
        result = table(labels)
    frame = metrics.accuracy_curve(MODEL, result, loader(labels), [2]).set_index(["filters", "class_name"])
    assert np.isnan(frame.average_precision["dense", "d"])
    assert np.isnan(frame.ap_low["dense", "d"])
    known = [frame.average_precision["dense", name] for name in "abce"]
    assert frame.average_precision["dense", "all"] == pytest.approx(np.mean(known))


OVERWRITTEN = {"zero": lambda f: torch.zeros_like(f), "mean": lambda f: f.mean(0).expand_as(f)}


@pytest.mark.parametrize("mode", OVERWRITTEN)
def test_ablation_judges_each_class_by_its_own_logit(mode):
    result = table(selector="contribution")
    frame = metrics.class_ablation(MODEL, result, loader(), 3, modes=[mode], means=FEATURES.mean(0))
    frame = frame.set_index(["mode", "channels", "class_name"]).average_precision
    for channels, mask in (("influential", result.mask(3)), ("rest", ~result.mask(3))):
        for c, name in enumerate(NAMES):
            changed = torch.where(mask[c], OVERWRITTEN[mode](FEATURES), FEATURES)
            logits = changed @ WEIGHT[c] + MODEL.fc.bias.detach()[c]
            expected = average_precision_score(LABELS[:, c].numpy(), logits.numpy())
            assert frame[mode, channels, name] == pytest.approx(expected, rel=1e-5)
    assert frame["intact", "none", "a"] == pytest.approx(
        average_precision_score(LABELS[:, 0].numpy(), LOGITS[:, 0].numpy())
    )


def test_masking_judges_all_classes():
    result = table(selector="contribution")
    frame = metrics.class_masking(MODEL, result, loader(), k=3)
    kept = frame[~frame.control].set_index(["masked", "class_name"])
    for row, masked in enumerate(NAMES):
        logits = nn.functional.linear(FEATURES * ~result.mask(3)[row], WEIGHT, MODEL.fc.bias.detach())
        expected = [balanced_accuracy_score(LABELS[:, c].numpy(), logits[:, c].numpy() > 0) for c in range(C)]
        np.testing.assert_allclose(kept.loc[masked].balanced_accuracy[list(NAMES)], expected, rtol=1e-6)
    assert set(frame.channels) == {3}
    assert frame.control.sum() == C * (C + 1)


def test_pruning():
    frame = metrics.pruning_curve(MODEL, loader(), [0.5], criteria=["magnitude"]).set_index(["criterion", "share"])
    kept = torch.zeros(C, K, dtype=torch.bool).scatter_(1, WEIGHT.abs().argsort(1)[:, K // 2 :], True)
    logits = nn.functional.linear(FEATURES, WEIGHT * kept, MODEL.fc.bias.detach())
    expected = np.mean([average_precision_score(LABELS[:, c].numpy(), logits[:, c].numpy()) for c in range(C)])
    assert frame.average_precision["magnitude", 0.5] == pytest.approx(expected, rel=1e-5)
    assert frame.agreement["magnitude", 0.5] == pytest.approx(float(((logits > 0) == (LOGITS > 0)).double().mean()))
    assert frame.control["random", 0.5]


def test_rows_with_one_class_each_are_one_label():
    """In the whole loader: then a softmax is meant, and everything is as with class indices."""
    classes = torch.arange(60) % C
    rows = torch.eye(C)[classes]
    for options in (
        {"selector": ["ablation", "margin", "correlation", "histogram"]},
        {"selector": ["ablation"], "correct_only": True},
    ):
        one, other = (table(labels, **options) for labels in (classes, rows))
        for name in one:
            assert torch.equal(one[name].scores, other[name].scores)
            assert one[name].meta == other[name].meta
    result = table(classes)
    for measure in (
        lambda x: metrics.accuracy_curve(MODEL, result, x, [2]),
        lambda x: metrics.class_ablation(MODEL, result, x, 2),
        lambda x: metrics.class_masking(MODEL, result, x, k=2),
        lambda x: compare(MODEL, x, x, ks=[2]).drop(columns="passes"),
    ):
        assert measure(loader(classes)).equals(measure(loader(rows)))


# -- what takes one label for each sample says so ----------------------------------------------------------------------

ONE = {
    "compare": lambda x: compare(MODEL, x, x, ks=[1]),
    "masked_confusion": lambda x: metrics.masked_confusion(MODEL, table(), x, ["a"], k=2),
    "mutual_information": lambda x: metrics.mutual_information(MODEL, x),
    "filter_ambiguity": lambda x: filter_ambiguity(MODEL, x, steps=1),
    "path_accuracy": lambda x: metrics.path_accuracy(PathDecoupler(MODEL, ["conv"]), x),
    "a cached pass": lambda x: HeadPass(MODEL, x).cached(),
}


@pytest.mark.parametrize("call", ONE)
def test_what_takes_one_label_says_so(call):
    with pytest.raises(LabelError, match="one class for each sample here, got rows of 0 and 1") as caught:
        ONE[call](loader())
    assert "argmax" not in str(caught.value)


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match=r"selectors \['correlation'\] tell classes apart by one label"):
        table(selector=["histogram", "correlation"])
    with pytest.raises(LabelError, match="must have 5 columns, one for each output of the head, got 4"):
        InfluentialFeatures(MODEL).attribute([(IMAGES, LABELS[:, :4])])
    mixed = [(IMAGES, LABELS), (IMAGES, torch.zeros(60, dtype=torch.long))]
    for batches in (mixed, mixed[::-1]):
        with pytest.raises(LabelError, match="in one form"):
            InfluentialFeatures(MODEL).attribute(batches)
        with pytest.raises(LabelError, match="in one form"):
            metrics.accuracy_curve(MODEL, table(), batches, [2])
    with pytest.raises(LabelError, match="labels have 4 columns, and there are 5 classes"):
        aggregate(LayerGradientXActivation(MODEL, MODEL.conv), [(IMAGES, LABELS[:, :4])])
