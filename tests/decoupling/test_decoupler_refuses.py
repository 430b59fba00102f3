"""What `PathDecoupler` refuses, with a remedy; and numbers that are not finite, which it names."""

import copy
import math

import pytest
import torch
from torch import nn

from captum_classfilters import PathDecoupler
from captum_classfilters.core.errors import HeadError, LabelError, LayerError, NonFiniteError, OptionError, ShapeError
from captum_classfilters.decoupling import DecouplingOptions

BOTH = ["conv1", "conv2"]
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.fixture
def decoupler(small_cnn):
    return PathDecoupler(small_cnn(), BOTH, generator=torch.Generator().manual_seed(0))


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "reduction must be an integer of at least 1; got 0"),
        ({"reduction": 4.0}, "reduction must be an integer of at least 1; got 4.0"),
        ({"reduction": True}, "reduction must be an integer of at least 1; got True"),
        ({"mix": "half"}, r"mix must be one of \['sample', 'channel', 'element'\], got 'half'"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1; got 0"),
        ({"num_classes": 4.0}, "num_classes must be an integer of at least 1; got 4.0"),
    ],
)
def test_bad_options_of_the_decoupler_are_refused(small_cnn, options, message):
    with pytest.raises(OptionError, match=message):
        PathDecoupler(small_cnn(), BOTH, **options)


@pytest.mark.parametrize("model", [None, len, torch.ones(1), [nn.Conv2d(1, 1, 1)]], ids=lambda m: type(m).__name__)
def test_what_is_no_module_is_refused(model):
    with pytest.raises(OptionError, match=f"the model must be an nn.Module without gates, got {type(model).__name__}"):
        PathDecoupler(model)


def test_a_decoupled_network_is_not_decoupled_again(decoupler):
    with pytest.raises(OptionError, match="without gates, got PathDecoupler"):
        PathDecoupler(decoupler)


@pytest.mark.parametrize("state", [None, {"controllers.0.squeeze.weight": 1.0}])
def test_what_is_no_state_is_refused(decoupler, state):
    with pytest.raises(ShapeError, match="expected what controllers_state_dict"):
        decoupler.load_controllers_state_dict(state)


def test_gates_that_are_not_hard_have_no_costs(decoupler, images):
    _, gates = decoupler.train().gates(images())
    with pytest.raises(OptionError, match=r"got floating point; pass gate > 0\.5"):
        decoupler.costs(images()[:1]).of(gates)


class Depends(nn.Module):
    """Its path through Python depends on values."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def test_skipping_says_that_it_needs_a_traceable_network(small_cnn, images):
    decoupler = PathDecoupler(Depends(small_cnn()), ["inner.conv2"], example_input=images())
    with pytest.raises(LayerError, match=r"cannot be traced: (?!.*example_input).*; skipping\(\) rewrites the traced"):
        decoupler.skipping(images())


def test_inputs_of_skipping_may_come_as_a_tuple(decoupler, images):
    skipping = decoupler.eval().skipping((images(),))
    assert torch.allclose(skipping(images()), decoupler(images()), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"information": -1.0}, "information must be a finite number of at least 0; got -1.0"),
        ({"divergence": math.nan}, "divergence must be a finite number of at least 0; got nan"),
        ({"sparsity": -1e-9}, "sparsity must be a finite number of at least 0; got -1e-09"),
        ({"depth": -1}, "depth must be a finite number of at least 0; got -1"),
        ({"budget": "image"}, r"budget must be one of \['network', 'layer'\], got 'image'"),
        ({"distillation": 1.5}, r"distillation must be a number in \[0, 1\], a share of the cross-entropy; got 1.5"),
        ({"temperature": 0}, "temperature must be a finite number above 0; got 0"),
        ({"target_rate": 1.1}, r"target_rate must be a number in \[0, 1\], a share of channels; got 1.1"),
        ({"target_rate": -0.1}, r"target_rate must be a number in \[0, 1\], a share of channels; got -0.1"),
        ({"sparsity": "a"}, "sparsity must be a finite number of at least 0; got .a."),
        ({"target_rate": None}, "target_rate must be a number in .*; got None"),
        ({"target_rate": math.nan}, "target_rate must be a number"),
        ({"direction": "both"}, r"direction must be one of \['z_y', 'y_z'\], got 'both'"),
    ],
)
def test_bad_options_of_the_loss_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        DecouplingOptions(**options)


def test_options_of_another_kind_are_refused_before_the_model_runs(decoupler, images):
    runs = []
    decoupler.model.register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(OptionError, match="options must be DecouplingOptions, got float"):
        decoupler.loss(images(), LABELS, 0.5)
    assert runs == []


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan, "half"])
def test_progress_out_of_range_is_refused_and_changes_nothing(decoupler, progress):
    with pytest.raises(OptionError, match="progress must be a number in"):
        decoupler.anneal_(progress)
    assert {(controller.noise, controller.hard) for controller in decoupler.controllers} == {(1.0, 0.5)}


@pytest.mark.parametrize(
    ("teacher", "found"), [(torch.zeros(6, 3), r"\(6, 3\)"), (torch.zeros(5, 4), r"\(5, 4\)"), ([0.0], "list")]
)
def test_logits_of_a_teacher_that_do_not_fit_are_refused(decoupler, images, teacher, found):
    with pytest.raises(
        ShapeError, match=rf"teacher must be logits \(6, 4\), as this network's, got {found}; give what"
    ):
        decoupler.loss(images(), LABELS, teacher=teacher)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 1, r"labels must lie in \[0, 4\), got 4; the head has 4 outputs"),
        (LABELS - 1, r"labels must lie in \[0, 4\), got -1"),
        (LABELS[:5], r"labels must have shape \(6,\), got \(5,\); pass one class index per sample"),
        (nn.functional.one_hot(LABELS) * 0, r"one class for each sample here, got rows of 0 and 1 of shape \(6, 4\)"),
        (LABELS + 0.5, "labels must be integers, got torch.float32 with fractions"),
        (None, "labels must be integers, got NoneType"),
    ],
)
def test_labels_that_do_not_fit_are_refused(decoupler, images, labels, message):
    with pytest.raises(LabelError, match=message):
        decoupler.loss(images(), labels)


@pytest.mark.parametrize("classes", [1, 3, 5])
def test_readers_of_another_number_of_classes_are_refused(small_cnn, images, classes):
    decoupler = PathDecoupler(small_cnn(), BOTH, num_classes=classes)
    with pytest.raises(ShapeError, match=f"the model gives 4 classes, the readers of eq. 9 were made for {classes}"):
        decoupler.loss(images(), LABELS)


class Halved(nn.Module):
    """Its last step is no linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) / 2


def test_a_model_that_ends_otherwise_asks_for_the_number_of_classes(small_cnn, images):
    model, layers = Halved(small_cnn()), ["inner.conv1", "inner.conv2"]
    decoupler = PathDecoupler(model, layers)
    assert decoupler.readers is None
    assert decoupler(images()).shape == (6, 4)
    with pytest.raises(OptionError, match=r"not end in a Linear layer.*make the PathDecoupler with num_classes=4"):
        decoupler.loss(images(), LABELS)
    assert torch.isfinite(PathDecoupler(model, layers, num_classes=4).loss(images(), LABELS).total)


class Twice(Halved):
    """Logits and something else, as networks with auxiliary heads."""

    def forward(self, x):
        return self.inner(x), None


def test_the_loss_reads_the_logits_of_a_model_with_auxiliary_outputs(small_cnn, images):
    decoupler = PathDecoupler(Twice(small_cnn()), ["inner.conv2"], num_classes=4).eval()
    plain = PathDecoupler(small_cnn(), ["conv2"]).eval()
    plain.load_controllers_state_dict(decoupler.controllers_state_dict())
    with torch.no_grad():
        torch.testing.assert_close(decoupler.loss(images(), LABELS), plain.loss(images(), LABELS))


class Nothing(Halved):
    """Returns no logits."""

    def forward(self, x):
        return {"maps": self.inner(x)}


def test_logits_that_are_none_are_refused(small_cnn, images):
    maps = PathDecoupler(nn.Sequential(nn.Conv2d(3, 4, 3)), ["0"], num_classes=4)
    with pytest.raises(ShapeError, match=r"expected logits \(N, C\) from the model, got \(6, 4, 6, 6\)"):
        maps.loss(images(), LABELS)
    nothing = PathDecoupler(Nothing(small_cnn()), ["inner.conv2"], num_classes=4)
    for read in (lambda: nothing.loss(images(), LABELS), lambda: nothing.paths(images())):
        with pytest.raises(HeadError, match=r"expected a model that returns logits.*keys \['maps'\]"), torch.no_grad():
            read()


def test_an_image_without_a_batch_is_refused(decoupler, images):
    with pytest.raises(ShapeError, match=r"conv1 got an image without a batch, \(3, 8, 8\); pass \(N, C, ...\)"):
        decoupler(images()[0])
    assert decoupler(images()[:1]).shape == (1, 4)


# -- numbers that are not finite ---------------------------------------------------------------------------------------


def overflowing(decoupler, images, what):
    """A copy, and images at which a convolution's input is NaN or infinite."""
    decoupler, x = copy.deepcopy(decoupler), images()
    with torch.no_grad():
        for controller in decoupler.controllers:
            controller.squeeze.weight.abs_()  # a negative one may end minus infinity at its ReLU
    if what == "half precision":
        decoupler.model.half()
        with torch.no_grad():
            decoupler.model.conv1.weight.abs_()
        return decoupler, (x.abs() * 100 + 60000).half(), "conv2"
    x[2, 1, 3, 3] = math.nan if what == "NaN" else math.inf
    return decoupler, x, "conv1"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("what", ["half precision", "NaN", "infinity"])
def test_gates_that_are_not_finite_are_named(decoupler, images, what, train):
    decoupler, x, layer = overflowing(decoupler, images, what)
    message = f"the gates of {layer} are not finite: its input overflowed or holds NaN; use bfloat16 or float32"
    if train and what != "NaN":
        message = "not finite|NaN or infinity"  # sigmoid(inf) is 1: a soft gate survives, the logits do not
    with pytest.raises(NonFiniteError, match=message):
        decoupler.train(train).loss(x, LABELS)


@pytest.mark.parametrize("what", ["half precision", "NaN", "infinity"])
def test_a_forward_shows_them_as_nan(decoupler, images, what):
    decoupler, x, _ = overflowing(decoupler, images, what)
    output, gates = decoupler.gates(x)
    assert output[2].isnan().all()
    assert any(gate[2].isnan().any() for gate in gates)
    if what != "half precision":
        others = [0, 1, 3, 4, 5]
        torch.testing.assert_close(output[others], decoupler(images())[others])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("fc", "logits of this batch: NaN or infinity; look at inputs and learning rate"),
        ("reader", "the loss of this batch: NaN or infinity"),
    ],
)
def test_a_loss_that_is_not_finite_says_what_is_not(decoupler, images, module, message):
    weight = decoupler.readers[1].weight if module == "reader" else decoupler.model.fc.weight
    with torch.no_grad():
        weight[0] = math.nan
    with pytest.raises(NonFiniteError, match=message):
        decoupler.loss(images(), LABELS)
