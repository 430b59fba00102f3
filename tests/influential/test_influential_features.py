"""InfluentialFeatures on real images and the trained network, against answers worked out another way."""

import warnings

import numpy as np
import pytest
import torch
from captum.attr import LayerActivation, LayerAttribution, LayerGradCam, NoiseTunnel
from torch import nn

from captum_classfilters import ClassFilters, InfluentialFeatures
from captum_classfilters.assets import load_demo_network, load_images
from captum_classfilters.core.errors import (
    DeviceError,
    EmptyLoaderError,
    HeadError,
    LabelError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnseenClassWarning,
)
from captum_classfilters.influential import SELECTORS


@pytest.fixture(scope="module")
def model():
    return load_demo_network()[0]


@pytest.fixture(scope="module")
def sample():
    return load_images("train")


@pytest.fixture(scope="module")
def features(model, sample):
    """Head inputs, worked out without any of our hooks."""
    with torch.no_grad():
        images = sample.images.float() / 255
        trunk = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
        return trunk(images)


def attribute(model, sample, **options):
    return InfluentialFeatures(model).attribute(sample.batches(), class_names=sample.class_names, **options)


# -- the histogram of Algorithm 1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k1", [1, 5, 64])
def test_histogram_is_algorithm_1(model, sample, features, k1):
    filters = attribute(model, sample, k1=k1)
    votes = np.zeros((10, 64), int)
    for row, label in zip(features.numpy(), sample.labels.tolist(), strict=True):
        for j in np.argsort(-np.abs(row), kind="stable")[:k1]:
            votes[label, j] += row[j] != 0
    np.testing.assert_array_equal(filters.scores.numpy(), votes)
    assert filters.counts.tolist() == [100] * 10
    np.testing.assert_allclose(
        filters.mass[3], features[sample.labels == 3].abs().double().sum(0), rtol=1e-5, atol=1e-5
    )


def test_several_k1_in_one_pass_are_the_same_as_one_by_one(model, sample):
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    together = attribute(model, sample, k1=[2, 0.9, 8])
    handle.remove()
    assert len(calls) == len(sample.batches())
    assert list(together) == [2, 0.9, 8]
    for k1, filters in together.items():
        assert torch.equal(filters.scores, attribute(model, sample, k1=k1).scores)
        assert filters.meta["k1"] == k1


def test_k1_defaults_to_the_root_of_the_number_of_channels(model, sample):
    assert attribute(model, sample).meta["k1"] == 8


def test_every_selector_in_one_pass_and_what_each_adds_up(model, sample, features):
    found = attribute(model, sample, selector=list(SELECTORS))
    assert list(found) == list(SELECTORS)
    weight, labels = model.fc.weight.detach().double(), sample.labels
    logits = features @ model.fc.weight.T + model.fc.bias
    for y in (0, 6):
        own = features[labels == y].double()
        rivals = logits[labels == y].clone()
        rivals[:, y] = -torch.inf
        expected = {
            "mean_activation": own.abs().sum(0),
            "contribution": (own * weight[y]).sum(0),
            "margin": (own * (weight[y] - weight[rivals.argmax(1)])).sum(0),
            "weight": weight[y].abs(),
        }
        for name, scores in expected.items():
            torch.testing.assert_close(found[name].scores[y], scores.detach(), rtol=1e-4, atol=1e-3)
    heaviest = weight.abs().argsort(1, descending=True)[:, :8]
    crossed = found["histogram"].scores * torch.zeros(10, 64).scatter_(1, heaviest, 1)
    assert torch.equal(found["weight_and_activation"].scores, crossed.double())
    assert not torch.equal(found["random"].scores, attribute(model, sample, selector="random", seed=1).scores)


def test_the_same_features_in_any_batches_and_shards_give_the_same_bits(sample, features):
    # the head alone: its input is the same to the bit however it is cut, which a convolution's output is not
    torch.manual_seed(0)
    head = nn.Linear(64, 10)
    # eight orders of magnitude: off the grid, their sums in float64 would depend on the order
    features = features * 10 ** (8 * torch.rand(features.shape, generator=torch.Generator().manual_seed(0)) - 5)
    names = ["histogram", "mean_activation", "contribution", "weight_and_activation", "weight", "random"]

    def table(rows, size):
        loader = [(features[part], sample.labels[part]) for part in rows.split(size)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnseenClassWarning)
            return InfluentialFeatures(head).attribute(loader, selector=names)

    whole = table(torch.arange(1000), 1000)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(1000, generator=generator)
        cuts = sorted(torch.randint(1, 999, (3,), generator=generator).unique().tolist())
        shards = [table(rows, 7 + seed) for rows in order.tensor_split(cuts)]
        for name in names:
            merged = ClassFilters.merge(*(shard[name] for shard in reversed(shards)))
            assert torch.equal(merged.scores, whole[name].scores), name
            assert torch.equal(merged.mass, whole[name].mass), name
            assert torch.equal(merged.top(8), whole[name].top(8)), name


def test_importance_matters_where_features_are_negative():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    loader = [(torch.randn(50, 5), torch.arange(50) % 3)]
    absolute = InfluentialFeatures(model).attribute(loader, k1=2)
    signed = InfluentialFeatures(model).attribute(loader, k1=2, importance="signed")
    assert not torch.equal(absolute.scores, signed.scores)
    assert torch.equal(absolute.mass, signed.mass)
    with torch.no_grad():
        hidden = model[0](loader[0][0])
    assert (hidden < 0).any()
    torch.testing.assert_close(absolute.mass[1], hidden[1::3].abs().double().sum(0), rtol=1e-5, atol=1e-5)


def test_label_source_and_correct_only_choose_the_samples(model, sample, features):
    predicted = (features @ model.fc.weight.T + model.fc.bias).argmax(1)
    by_prediction = attribute(model, sample, label_source="prediction")
    assert by_prediction.counts.tolist() == predicted.bincount(minlength=10).tolist()
    without_labels = InfluentialFeatures(model).attribute(
        (images for images, _ in sample.batches()), label_source="prediction", class_names=sample.class_names
    )
    assert torch.equal(without_labels.scores, by_prediction.scores)
    right = attribute(model, sample, correct_only=True)
    assert right.counts.sum() == (predicted == sample.labels).sum()
    assert right.counts.sum() < 1000


def test_class_names_come_from_the_data_set(model, sample):
    class Named(torch.utils.data.TensorDataset):
        classes = tuple(name.upper() for name in sample.class_names)

    loader = torch.utils.data.DataLoader(Named(sample.images[:200].float() / 255, sample.labels[:200]), batch_size=64)
    assert InfluentialFeatures(model).attribute(loader).class_names[0] == "T-SHIRT"
    assert InfluentialFeatures(model).attribute(sample.batches()).class_names[0] == "0"


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_names_that_do_not_fit_the_head_are_not_taken_and_said(model, sample):
    class Four(torch.utils.data.TensorDataset):
        classes = ("a", "b", "c", "d")

    data = torch.utils.data.Subset(Four(sample.images.float() / 255, sample.labels), range(200))
    with pytest.warns(UserWarning, match="the data set names 4 classes, the head has 10 outputs"):
        filters = InfluentialFeatures(model).attribute(torch.utils.data.DataLoader(data, batch_size=100))
    assert filters.class_names == tuple("0123456789")


def test_synonyms_and_repeated_names_become_text_of_their_own(model, sample):
    class ImageNetLike(torch.utils.data.TensorDataset):
        classes = (("tench", "Tinca tinca"), "crane", "crane", *"defghij")

    data = torch.utils.data.Subset(ImageNetLike(sample.images.float() / 255, sample.labels), range(200))
    filters = InfluentialFeatures(model).attribute(torch.utils.data.DataLoader(data, batch_size=100))
    assert filters.class_names[:4] == ("tench, Tinca tinca", "crane (1)", "crane (2)", "d")


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_batch_without_a_correct_sample_adds_nothing(model, sample, features, selector):
    right = (features @ model.fc.weight.T + model.fc.bias).argmax(1) == sample.labels
    wrong = (~right).nonzero().flatten()[:1]
    loader = sample.batches()
    with_wrong = [loader[0], (sample.images[wrong].float() / 255, sample.labels[wrong]), *loader[1:]]
    found = InfluentialFeatures(model).attribute(with_wrong, selector=selector, correct_only=True)
    assert found.counts.sum() == right.sum()


def test_integers_of_numpy_are_integers(model, sample):
    found = attribute(model, sample, k1=np.arange(1, 3))
    assert list(found) == [1, 2]
    assert torch.equal(found[2].top(np.int64(3)), found[2].top(3))


def test_the_models_own_forward_is_the_model(model, sample):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    filters = InfluentialFeatures(model.forward).attribute(sample.batches())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(filters.scores, InfluentialFeatures(model).attribute(sample.batches()).scores)
    model.eval()


@pytest.mark.parametrize(("options", "keys"), [({"k1": [1, 2]}, [1, 2]), ({"selector": ["margin"]}, ["margin"])])
def test_a_partial_result_has_the_shape_of_the_whole(model, options, keys):
    def loader():
        yield torch.rand(10, 1, 28, 28), torch.arange(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        InfluentialFeatures(model).attribute(loader(), **options)
    assert list(caught.value.partial_result) == keys


def test_weights_that_are_not_finite_are_refused(sample):
    broken = load_demo_network()[0]
    with torch.no_grad():
        broken.fc.weight[3, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity in layer fc; load a whole checkpoint"):
        InfluentialFeatures(broken).attribute(sample.batches())


def test_contributions_and_bias_sum_to_the_logit(model, sample):
    images = sample.images[:32].float() / 255
    targets = torch.arange(32) % 10
    rows = InfluentialFeatures(model).attribute(images, target=targets)
    logits = model(images).detach()
    assert rows.shape == (32, 64)
    torch.testing.assert_close(
        rows.sum(1) + model.fc.bias.detach()[targets], logits[torch.arange(32), targets], rtol=1e-5, atol=1e-5
    )
    single = InfluentialFeatures(model, layer="fc").attribute((images,), target=3)
    torch.testing.assert_close(single.sum(1) + model.fc.bias.detach()[3], logits[:, 3], rtol=1e-5, atol=1e-5)


def test_contributions_are_the_weights_times_captums_layer_activation(model, sample):
    images = sample.images[:8].float() / 255
    activation = LayerActivation(model, model.fc).attribute(images, attribute_to_layer_input=True)
    expected = activation * model.fc.weight[4]
    torch.testing.assert_close(InfluentialFeatures(model).attribute(images, target=4), expected.detach())


def test_works_under_captums_noise_tunnel(model, sample):
    images = sample.images[:4].float() / 255
    torch.manual_seed(0)
    smooth = NoiseTunnel(InfluentialFeatures(model, layer=model.fc)).attribute(
        images, nt_type="smoothgrad", nt_samples=3, stdevs=0.0, target=1
    )
    torch.testing.assert_close(smooth, InfluentialFeatures(model).attribute(images, target=1))


def test_layer_is_read_at_call_time(model, sample):
    attribution = InfluentialFeatures(model)
    attribution.layer = "fc"
    assert attribution.attribute(sample.batches()[:1]).layer == "fc"


# -- explain -----------------------------------------------------------------------------------------------------------


def test_explain_with_all_channels_is_the_class_activation_map(model, sample):
    images = sample.images[:6].float() / 255
    filters = attribute(model, sample)
    maps = InfluentialFeatures(model).explain(images, 2, filters, k=64)
    assert maps.shape == (6, 1, 7, 7)
    logits = model(images).detach()[:, 2]
    torch.testing.assert_close(maps.mean((1, 2, 3)) + model.fc.bias.detach()[2], logits, rtol=1e-4, atol=1e-4)
    # Grad-CAM of a head behind average pooling is the class activation map divided by the number of positions
    gradcam = LayerGradCam(model, model.layer3).attribute(images, target=2, relu_attributions=False).detach()
    torch.testing.assert_close(maps / 49, gradcam, rtol=1e-4, atol=1e-4)


def test_explain_averages_to_what_the_k_channels_add_to_the_logit(model, sample):
    images, targets = sample.images[:6].float() / 255, torch.tensor([0, 1, 2, 3, 4, 9])
    filters = attribute(model, sample)
    maps = InfluentialFeatures(model).explain(images, targets, filters, k=5)
    rows = InfluentialFeatures(model).attribute(images, target=targets)
    expected = (rows * filters.mask(5)[targets]).sum(1)
    torch.testing.assert_close(maps.mean((1, 2, 3)), expected, rtol=1e-4, atol=1e-4)
    assert LayerAttribution.interpolate(maps, (28, 28), "bilinear").shape == (6, 1, 28, 28)
    ones = InfluentialFeatures(model).explain(images, targets, filters, k=5, channel_weights="ones")
    assert not torch.allclose(ones, maps)
    by_name = InfluentialFeatures(model).explain(images, "coat", filters, k=5)
    assert torch.equal(by_name, InfluentialFeatures(model).explain(images, 4, filters, k=5))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k1": 65}, OptionError, r"k1 must be an integer in \[1, 64\], the number of channels; got 65"),
        ({"k1": 0}, OptionError, "k1 must be an integer of at least 1"),
        ({"k1": 1.5}, OptionError, "k1 must be"),
        ({"k1": True}, OptionError, "k1 must be"),
        ({"k1": [1, 99]}, OptionError, r"k1 must be an integer in \[1, 64\]"),
        ({"k1": []}, OptionError, "list of k1 or selectors is empty"),
        ({"k1": 3, "selector": "margin"}, OptionError, "k1 belongs to the selectors"),
        ({"k1": [3], "selector": ["histogram"]}, OptionError, "not both"),
        ({"selector": "magic"}, OptionError, "selector must be some of .*'histogram'.*magic"),
        ({"importance": "l2"}, OptionError, "importance must be one of"),
        ({"label_source": "guess"}, OptionError, "label_source must be one of"),
        ({"num_classes": 9}, OptionError, "num_classes=9, but the head fc has 10 outputs"),
        ({"class_names": ["a", "b"]}, OptionError, "class_names must be 10, one for each class; got 2"),
        ({"class_names": ["a"] * 10}, OptionError, "class names must be unique, got 'a' more than once"),
        ({"class_names": [*"abcdefghi", "all"]}, OptionError, "no class may be named 'all'"),
        ({"target": 3}, OptionError, "target belongs to tensors"),
        ({"attribute_to_layer_input": False}, OptionError, "attribute_to_layer_input must be True"),
    ],
)
def test_wrong_options_are_refused(model, sample, options, error, message):
    with pytest.raises(error, match=message):
        InfluentialFeatures(model).attribute(sample.batches(), **options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((4,), 10), r"labels must lie in \[0, 10\), got 10 in batch 1; the head has 10 outputs"),
        (torch.full((4,), -1), r"labels must lie in \[0, 10\), got -1 in batch 1"),
        (torch.full((4,), 0.5), "labels must be integers, got torch.float32 with fractions in batch 1"),
        (
            torch.full((4, 10), 0.1),
            r"labels must have shape \(4,\), got \(4, 10\) in batch 1 with other numbers than 0",
        ),
        (torch.zeros(3, dtype=torch.long), r"labels must have shape \(4,\), got \(3,\)"),
        (None, "batch 1 has no labels"),
    ],
)
def test_wrong_labels_are_refused_and_the_batches_before_kept(model, labels, message):
    images = torch.rand(4, 1, 28, 28)
    good = (images, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(LabelError, match=message) as caught:
        InfluentialFeatures(model).attribute([good, (images, labels)])
    assert caught.value.partial_result.counts.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("loader", [[], iter(()), [(torch.rand(0, 1, 28, 28), torch.zeros(0, dtype=torch.long))]])
def test_a_loader_that_yields_nothing_is_refused(model, loader):
    with pytest.raises(EmptyLoaderError, match="the loader gave no sample"):
        InfluentialFeatures(model).attribute(loader)


def test_a_class_never_seen_is_named_once(model):
    loader = [(torch.rand(9, 1, 28, 28), torch.arange(9))] * 3
    with pytest.warns(UnseenClassWarning, match="no sample of class bag") as caught:
        filters = InfluentialFeatures(model).attribute(loader, class_names=[*"abcdefghi", "bag"])
    assert len(caught) == 1
    assert caught[0].filename == __file__  # not Captum's wrapper
    assert filters.counts[9] == 0
    assert filters.scores[9].abs().sum() == 0
    assert filters.top(3)[9].tolist() == [-1] * 3
    with pytest.raises(OptionError, match=r"classes \['bag'\] have no samples in the table"):
        InfluentialFeatures(model).explain(torch.rand(2, 1, 28, 28), 9, filters, k=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_name_layer_and_batch(model, value):
    good = (torch.rand(10, 1, 28, 28), torch.arange(10))
    bad = torch.rand(10, 1, 28, 28)
    bad[3, 0, 0, 0] = value
    with pytest.raises(NonFiniteError, match="NaN or infinity at the input of layer fc in batch 2"):
        InfluentialFeatures(model).attribute([good, good, (bad, good[1])])


def test_no_head_and_wrong_device_are_refused(sample):
    with pytest.raises(HeadError, match="could not find the classifier head"):
        InfluentialFeatures(nn.Sequential(nn.Flatten(), nn.ReLU())).attribute(sample.batches())
    with pytest.raises(DeviceError, match="the model is on cpu, but device='cuda:0' was asked for"):
        InfluentialFeatures(load_demo_network()[0], device_ids=[0]).attribute(sample.batches())


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (None, OptionError, r"tensors need target=.*pass a loader, \[\(images, labels\)\]"),
        (10, LabelError, r"target must lie in \[0, 10\), got 10"),
        (-1, LabelError, "got -1"),
        (1.5, LabelError, "target must be integers"),
        (True, LabelError, "target must be integers"),
        ("coat", LabelError, "got the name 'coat'"),
        (torch.tensor([1, 2, 3]), LabelError, "target must be an int or 2 of them"),
    ],
)
def test_wrong_targets_are_refused(model, target, error, message):
    with pytest.raises(error, match=message):
        InfluentialFeatures(model).attribute(torch.rand(2, 1, 28, 28), target=target)


def test_explain_refuses_foreign_tables_and_wrong_k(model, sample):
    filters = attribute(model, sample)
    other = InfluentialFeatures(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))
    foreign = other.attribute(sample.batches())
    images = torch.rand(2, 1, 28, 28)
    with pytest.raises(ShapeError, match="the table is 10 classes x 784 channels"):
        InfluentialFeatures(model).explain(images, 0, foreign, k=3)
    with pytest.raises(OptionError, match=r"k must be an integer in \[1, 64\]"):
        InfluentialFeatures(model).explain(images, 0, filters, k=65)
    with pytest.raises(OptionError, match=r"must be a ClassFilters, got dict; of \['votes'\] pass one"):
        InfluentialFeatures(model).explain(images, 0, {"votes": filters}, k=5)
    with pytest.raises(OptionError, match="channel_weights must be"):
        InfluentialFeatures(model).explain(images, 0, filters, k=5, channel_weights="all")
    with pytest.raises(HeadError, match="no feature map of 784 channels behind the head"):
        other.explain(images, 0, foreign, k=3)


@pytest.mark.gpu
def test_cuda_gives_the_cpus_table(sample):
    model = load_demo_network()[0]
    names = [name for name in SELECTORS if name != "random"]
    on_cpu = attribute(model, sample, selector=names)
    on_cuda = attribute(model.cuda(), sample, selector=names)
    for name in names:
        assert on_cuda[name].scores.device.type == "cpu"
        same = (on_cpu[name].mask(5) == on_cuda[name].mask(5)).float().mean()
        assert same > 0.99, name
