"""Reading the class from gates, and running on other paths, against loops and plain networks."""

import math

import pandas as pd
import pytest
import torch
from scipy import stats

from captum_classfilters import PathDecoupler
from captum_classfilters.core.errors import EmptyLoaderError, LabelError, MergeError, OptionError
from captum_classfilters.metrics import path_accuracy, path_information


@pytest.fixture
def decoupler(small_cnn):
    """Two gated layers, about half of the gates open, some of them for every image."""
    generator = torch.Generator().manual_seed(3)
    made = PathDecoupler(small_cnn(), ["conv1", "conv2"], reduction=1, generator=generator).eval()
    with torch.no_grad():
        for controller in made.controllers:
            controller.excite.weight.sub_(controller.excite.weight.mean(1, keepdim=True)).mul_(4)
            controller.excite.bias.zero_()
    return made


@pytest.fixture
def loader(images):
    labels = torch.arange(40) % 4
    labels[:3] = 0  # classes of unequal size
    return list(zip(images(40).split(16), labels.split(16), strict=True))


def test_cross_entropy_is_that_of_a_loop_over_images(decoupler, loader):
    paths = decoupler.paths(loader)
    frame = path_information(decoupler, paths)
    found = frame[~frame.control].set_index("layer")
    every = []
    for layer, gates, reader in zip(paths.layers, paths.gates(), decoupler.readers, strict=True):
        losses = []
        for gate, label in zip(gates.tolist(), paths.labels.tolist(), strict=True):
            scores = [sum(w * z for w, z in zip(row, gate, strict=True)) for row in reader.weight.double().tolist()]
            losses.append(math.log(sum(map(math.exp, scores))) - scores[label])
        every.append(losses)
        mean = sum(losses) / len(losses)
        spread = (sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)) ** 0.5
        assert found.cross_entropy[layer] == pytest.approx(mean, rel=1e-6)
        assert found.high[layer] - mean == pytest.approx(
            stats.t.ppf(0.975, len(losses) - 1) * spread / len(losses) ** 0.5, rel=1e-6
        )
        assert mean - found.low[layer] == pytest.approx(found.high[layer] - mean)
    assert frame.layer.tolist() == ["conv1", "conv2", "all"] * 2
    assert frame.control.tolist() == [False] * 3 + [True] * 3
    assert found.cross_entropy["all"] == pytest.approx(sum(map(sum, every)) / 80, rel=1e-6)


def test_information_is_the_entropy_of_the_labels_less_the_cross_entropy(decoupler, loader):
    paths = decoupler.paths(loader)
    with torch.no_grad():
        for reader in decoupler.readers:
            reader.weight.zero_()
    found = path_information(decoupler, paths)
    # a reader that reads nothing: ln C, which is more than the entropy of classes of unequal size
    assert found.cross_entropy.tolist() == pytest.approx([math.log(4)] * 6)
    assert found.information.tolist() == [0] * 6
    shares = torch.bincount(paths.labels) / 40
    entropy = -sum(p * math.log(p) for p in shares.tolist())
    gates = paths.gates()[0].float()
    with torch.no_grad():  # one that has learnt these gates
        members = torch.nn.functional.one_hot(paths.labels, 4).float()
        decoupler.readers[0].weight.copy_(torch.linalg.lstsq(gates, members * 3).solution.T)
    found = path_information(decoupler, paths)[:3].set_index("layer")
    assert found.information["conv1"] == pytest.approx(max(0, entropy - found.cross_entropy["conv1"]))


def test_gates_that_tell_the_class_are_told_from_the_control(decoupler, images):
    labels = torch.arange(40) % 2
    inputs = images(40) + labels[:, None, None, None] * 4.0
    with torch.no_grad():
        for controller, reader in zip(decoupler.controllers, decoupler.readers, strict=True):
            controller.squeeze.weight.fill_(1.0)
            controller.squeeze.bias.fill_(-3.0)
            controller.excite.weight.fill_(1.0)
            controller.excite.bias.fill_(-0.5)
            reader.weight.zero_()
            reader.weight[1] = 1.0
            reader.weight[0] = -1.0
    found = path_information(decoupler, decoupler.paths([(inputs, labels)])).set_index(["layer", "control"])
    assert found.high["conv1", False] < math.log(4) - 0.3 < found.low["conv1", True]
    assert found.information["conv1", True] == 0


def test_own_path_is_plain_accuracy_and_all_open_that_of_the_network(decoupler, loader):
    found = path_accuracy(decoupler, loader)
    count = 0
    plain = 0
    with torch.no_grad():
        for inputs, labels in loader:
            count += int((decoupler(inputs).argmax(1) == labels).sum())
            plain += int((decoupler.model(inputs).argmax(1) == labels).sum())
    assert found.accuracy["own"] == count / 40
    assert found.accuracy["all open"] == plain / 40
    assert (found.images == 40).all()
    assert found.index[found.control].tolist() == ["random"]
    assert ((found.low <= found.accuracy) & (found.accuracy <= found.high)).all()


def test_another_images_path_is_the_previous_of_the_batch_and_random_ones_are_as_wide(decoupler, loader, monkeypatch):
    seen = []
    frozen = decoupler.frozen
    monkeypatch.setattr(PathDecoupler, "frozen", lambda self, gates: (seen.append(gates), frozen(gates))[1])
    path_accuracy(decoupler, loader[:1])
    with torch.no_grad():
        own = decoupler.gates(loader[0][0])[1]
    other, random, everything = seen
    for mine, rolled, permuted, opened in zip(own, other, random, everything, strict=True):
        assert torch.equal(rolled, torch.cat([mine[-1:], mine[:-1]]))
        assert torch.equal(permuted.sum(1), mine.sum(1))
        assert not torch.equal(permuted, mine)
        assert bool(opened.all())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_empty_batch_changes_nothing(decoupler, loader, images, place):
    empty = (images(0), torch.arange(0))
    pd.testing.assert_frame_equal(
        path_accuracy(decoupler, [*loader[:place], empty, *loader[place:]]), path_accuracy(decoupler, loader)
    )


def test_the_model_is_given_back(decoupler, loader):
    decoupler.train()
    decoupler.model.bn1.eval()
    path_accuracy(decoupler, loader)
    assert decoupler.training
    assert not decoupler.model.bn1.training
    assert not decoupler.model.conv1._forward_pre_hooks


def test_bad_input_is_refused(decoupler, small_cnn, loader, images):
    paths = decoupler.paths(loader)
    other = PathDecoupler(small_cnn(), ["conv1", "conv2"])
    with pytest.raises(MergeError, match="of another decoupler"):
        path_information(other, paths)
    with pytest.raises(LabelError, match="no labels"):
        path_information(decoupler, decoupler.paths([images(4)]))
    decoupler.readers = None
    with pytest.raises(OptionError, match="no readers"):
        path_information(decoupler, paths)
    with pytest.raises(EmptyLoaderError, match="no sample"):
        path_accuracy(decoupler, [])
    with pytest.raises(LabelError, match="no labels"):
        path_accuracy(decoupler, [images(4)])
