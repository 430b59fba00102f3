"""The head, its features and the map behind them, and where there is none to be found."""

import pytest
import torch
from reading import Tail, assert_linear, read
from torch import nn
from torch.nn import functional as F

from captum_classfilters.core.errors import HeadError
from captum_classfilters.core.head import find_layer


class Conv(nn.Module):
    """A fully convolutional classifier: 1x1 convolution, something, the average over positions."""

    def __init__(self, between=None, last=None):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.classifier = nn.Conv2d(6, 4, 1)
        self.between = between or nn.Identity()
        self.last = last or nn.Identity()

    def forward(self, images):
        return self.last(self.between(self.classifier(self.body(images).relu())).mean((2, 3)))


# -- networks without a linear head are refused, with the way out ------------------------------------------------------


TAILS = {
    "relu": (lambda z: z.relu(), "an activation stands between model.fc and"),
    "in-place relu": (lambda z: z.relu_(), "an activation stands between model.fc and"),
    "normalisation": (F.normalize, "is not the output of an nn.Linear"),
    "some of the classes": (lambda z: z[:, :3], "leaves classes of model.fc out"),
    "nothing": (lambda z: (None, z), "floating logits .*, got tuple"),
    "other key": (lambda z: {"scores": z}, "floating logits .*, got dict with the keys"),
    "one number a sample": (lambda z: z[:, 0], "leaves classes of model.fc out"),
    "one number": (lambda z: z.sum(), r"got torch.float32 of shape \(\)"),
    "class indices": (lambda z: z.argmax(1), "got torch.int64"),
    "decisions": (lambda z: z > 0, "got torch.bool"),
}


@pytest.mark.parametrize("tail", TAILS)
def test_what_is_not_logits_is_refused_and_candidates_are_named(tail, small_cnn, images):
    change, reason = TAILS[tail]
    with pytest.raises(HeadError, match=reason) as caught:
        read(Tail(small_cnn(), change), images())
    assert "model.fc (6 -> 4)" in str(caught.value)
    assert "layer=" in str(caught.value)


@pytest.mark.parametrize(
    "tail",
    [
        lambda z: z.softmax(1),
        lambda z: z.log_softmax(1),
        lambda z: z.sigmoid(),
        TAILS["nothing"][0],
        TAILS["other key"][0],
    ],
)
def test_layer_says_what_cannot_be_found(tail, small_cnn, images):
    plain = small_cnn()
    batch = read(Tail(plain, tail), images(), layer="model.fc")
    torch.testing.assert_close(batch.logits, plain(images()).detach())
    torch.testing.assert_close(batch.features, plain.penultimate(images()).detach())


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_as_a_module_is_refused(inplace, small_cnn, images):
    model = nn.Sequential(small_cnn(), nn.ReLU(inplace))
    with pytest.raises(HeadError, match=r"an activation stands between 0\.fc"):
        read(model, images())


def test_an_in_place_activation_that_changes_nothing_is_refused(small_cnn, images):
    model = small_cnn()
    with torch.no_grad():
        model.fc.bias.fill_(100.0)
    with pytest.raises(HeadError, match="an activation stands between"):
        read(Tail(model, torch.relu_), images())


def test_no_linear_at_all_is_refused(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(HeadError, match=r"no nn\.Linear or 1x1 convolution ran.*there is no candidate.*aggregate"):
        read(model, images())


def test_a_linear_that_does_not_make_the_logits_is_a_candidate(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(HeadError, match=r"candidates: 0 \(3 -> 4\).*layer="):
        read(model, images())


def test_the_sum_of_two_heads_is_refused(small_cnn, images):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = small_cnn(seed=0), small_cnn(seed=1)

        def forward(self, x):
            return (self.a(x) + self.b(x)) / 2

    with pytest.raises(HeadError, match=r"a.fc \(6 -> 4\), b.fc \(6 -> 4\)"):
        read(Two(), images())


# -- heads that are shared, tied or called twice -----------------------------------------------------------------------


def test_a_head_under_two_names_is_one_module(small_cnn, images):
    model = small_cnn()
    model.again = model.fc
    for layer in (None, "fc", "again", model.fc):
        head = read(model, images(), layer=layer).head
        assert head.module is model.fc
        assert head.aliases == ("fc", "again")


def test_a_head_tied_to_another_module_is_refused(small_cnn, images):
    model = small_cnn()
    model.embedding = nn.Embedding(4, 6)
    model.embedding.weight = model.fc.weight
    with pytest.raises(HeadError, match="the head's weight is shared by fc, embedding"):
        read(model, images())


def test_a_head_tied_to_the_models_own_parameter_is_refused(small_cnn, images):
    model = small_cnn()
    model.prototypes = model.fc.weight
    with pytest.raises(HeadError, match="the head's weight is shared by fc, the model itself"):
        read(model, images())


class Twice(nn.Module):
    """Calls its head on two crops; the logits are those of the second alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        self.model(images.flip(3))
        return self.model(images)


@pytest.mark.parametrize("layer", [None, "model.fc"])
def test_a_head_called_twice_is_refused(layer, small_cnn, images):
    with pytest.raises(HeadError, match=r"is called 2 times|ran 2 times"):
        read(Twice(small_cnn()), images(), layer=layer)


def test_a_head_that_does_not_run_is_refused(small_cnn, images):
    model = small_cnn()
    model.unused = nn.Linear(6, 4)
    assert read(model, images()).head.name == "fc"
    with pytest.raises(HeadError, match=r"unused must run once .* it ran 0 times"):
        read(model, images(), layer="unused")


def test_auxiliary_heads_before_it_do_not_matter(small_cnn, images):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.aux = small_cnn(), nn.Linear(6, 4)
            # even one that gives the same logits
            self.aux.load_state_dict(self.model.fc.state_dict())

        def forward(self, x):
            features = self.model.penultimate(x)
            self.aux(features)
            return self.model.fc(features)

    assert read(Auxiliary(), images()).head.name == "model.fc"


# -- 1x1 convolutions and Linears over positions -----------------------------------------------------------------------


def test_a_convolution_before_the_average_is_a_head(images):
    model = Conv()
    batch = read(model, images(), need_maps=True)
    assert (batch.head.name, batch.head.num_features, batch.head.num_classes) == ("classifier", 6, 4)
    assert_linear(batch, model(images()).detach())
    assert (batch.head.feature_map.name, batch.head.feature_map.exact) == ("body", True)
    assert batch.head.feature_map.relu
    torch.testing.assert_close(batch.maps.mean((2, 3)), batch.features)


def test_a_rounded_convolution_before_the_average_is_a_head(images):
    """The average of rounded logits is not, to the last bit, the logits of the rounded average."""
    batch = read(Conv().bfloat16(), images())
    assert (batch.head.name, batch.logits.dtype) == ("classifier", torch.bfloat16)


@pytest.mark.parametrize("layer", [None, "classifier"])
def test_a_convolution_with_relu_before_the_average_is_refused(layer, images):
    with pytest.raises(HeadError, match="candidates: classifier"):
        read(Conv(between=nn.ReLU()), images(), layer=layer)


def test_a_convolution_read_at_its_maximum_is_refused(images):
    class Peak(Conv):
        def forward(self, images):
            return self.classifier(self.body(images)).amax((2, 3))

    with pytest.raises(HeadError, match="candidates: classifier"):
        read(Peak(), images())


@pytest.mark.parametrize("keep", [False, True])
def test_a_convolution_after_the_average_is_a_head(keep, images):
    """As in BiT and DPN: (N, C, 1, 1) is flattened or not."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1))
    model.append(nn.Identity() if keep else nn.Flatten())
    assert_linear(read(model, images()), model(images()).detach().flatten(1))


def test_convolutions_rounded_as_on_a_gpu_are_a_head(images):
    """cuDNN rounds the factors of a float32 convolution to TF32, 10 bits after the point; F.linear does not."""

    class Rounded(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(to_tf32(x), to_tf32(self.weight), self.bias)

    model = nn.Sequential(nn.Conv2d(3, 256, 3), nn.AdaptiveAvgPool2d(1), Rounded(256, 4, 1), nn.Flatten())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model[2].weight.data.normal_()
        model[0].weight.data.normal_()
    assert read(model, images()).head.name == "2"


def to_tf32(tensor):
    return ((tensor.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Tokens(nn.Module):
    """A Linear over tokens, of which ``choose`` makes the logits."""

    def __init__(self, choose):
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.choose = choose

    def forward(self, tokens):
        return self.choose(self.head(tokens))


def test_a_linear_over_tokens_that_are_averaged_is_a_head():
    tokens = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    model = Tokens(lambda z: z.mean(1))
    batch = read(model, tokens)
    torch.testing.assert_close(batch.features, tokens.mean(1))
    assert_linear(batch, model(tokens).detach())


@pytest.mark.parametrize("layer", [None, "head"])
def test_a_linear_over_tokens_of_which_one_is_taken_is_refused(layer):
    tokens = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    with pytest.raises(HeadError, match=r"candidates: head \(6 -> 4\)"):
        read(Tokens(lambda z: z[:, 0]), tokens, layer=layer)


@pytest.mark.parametrize(
    "convolution", [nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(6, 4, 1, stride=2)], ids=str
)
def test_other_convolutions_are_not_heads(convolution):
    with pytest.raises(HeadError, match=r"an nn\.Linear or a 1x1 convolution without groups, got Conv2d"):
        find_layer(convolution, convolution)


# -- layer= ------------------------------------------------------------------------------------------------------------


def test_layer_by_name_and_by_module_are_the_same(small_cnn, images):
    model = small_cnn()
    found, named, given = (read(model, images(), layer=layer) for layer in (None, "fc", model.fc))
    assert found.head == named.head == given.head
    assert torch.equal(found.features, named.features)
    assert torch.equal(found.features, given.features)


def test_a_misspelt_layer_suggests_names(small_cnn, images):
    model = Tail(small_cnn(), nn.Identity())
    with pytest.raises(HeadError, match=r"no layer 'model.fcc'; did you mean one of \['model.fc'"):
        read(model, images(), layer="model.fcc")
    with pytest.raises(HeadError, match=r"no layer 'zzz'; did you mean one of \['model.fc'\]"):
        read(model, images(), layer="zzz")


def test_a_layer_of_another_model_is_refused(small_cnn, images):
    with pytest.raises(HeadError, match="layer Linear is not a module of this model"):
        read(small_cnn(), images(), layer=small_cnn().fc)


@pytest.mark.parametrize(("layer", "kind"), [("relu", "ReLU"), ("conv1", "Conv2d"), ("", "SmallCNN")])
def test_a_layer_that_is_not_linear_is_refused(layer, kind, small_cnn, images):
    with pytest.raises(HeadError, match=f"must be an nn.Linear or a 1x1 convolution without groups, got {kind}"):
        read(small_cnn(), images(), layer=layer)


def test_a_bare_function_needs_its_layer(small_cnn, images):
    model = small_cnn()
    batch = read(lambda x: model(x), images(), layer=model.fc)
    torch.testing.assert_close(batch.features, model.penultimate(images()).detach())
    assert batch.head.name == "Linear"
    with pytest.raises(HeadError, match=r"pass layer= with the nn\.Linear"):
        read(lambda x: model(x), images())
    with pytest.raises(HeadError, match=r"pass layer= with the nn\.Linear"):
        read(lambda x: model(x), images(), layer="fc")


def test_a_layer_called_by_keyword_is_refused():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(input=x)

    for layer in (None, "fc"):
        with pytest.raises(HeadError, match=r"candidates: fc \(6 -> 4\)"):
            read(Keyword(), torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), layer=layer)


# -- heads as they come ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, ""])
def test_a_model_that_is_a_linear_is_its_own_head(layer):
    model, features = nn.Linear(6, 4), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    batch = read(model, features, layer=layer)
    assert torch.equal(batch.features, features)
    assert batch.head.module is model
    assert_linear(batch, model(features).detach())


def test_a_head_without_bias(small_cnn, images):
    model = small_cnn(bias=False)
    batch = read(model, images())
    assert torch.equal(batch.head.bias, torch.zeros(4))
    assert_linear(batch, model(images()).detach())


def test_a_parametrised_head(small_cnn, images):
    model = small_cnn()
    torch.nn.utils.parametrizations.weight_norm(model.fc)
    batch = read(model, images())
    assert batch.head.name == "fc"
    assert_linear(batch, model(images()).detach())


def test_weights_are_read_when_asked_for(small_cnn, images):
    model = small_cnn()
    head = read(model, images()).head
    with torch.no_grad():
        model.fc.weight.zero_()
    assert not head.weight.any()
    assert not head.weight.requires_grad


def test_a_class_token_is_no_map():
    """As in PiT: what runs last before the head is the norm of the class token alone."""

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 4)

        def forward(self, tokens):
            return self.head(self.norm(tokens[:, :1])[:, 0])

    tokens = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(0))
    assert read(Token(), tokens).head.feature_map is None
    with pytest.raises(HeadError, match="there is no feature map of 6 channels behind the head head"):
        read(Token(), tokens, need_maps=True)


def test_one_class(small_cnn, images):
    assert read(small_cnn(num_classes=1), images()).logits.shape == (6, 2)
