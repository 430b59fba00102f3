"""Attack success on networks and attacks whose numbers can be counted by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from captum_classfilters.attacks import LocalSearch
from captum_classfilters.core.control import Control
from captum_classfilters.core.errors import EmptyLoaderError, LabelError, OptionError, ShapeError
from captum_classfilters.metrics import attack_success, wilson


class Corner(nn.Module):
    """Class 1 where the pixel at (0, 0) is brighter than a threshold, else class 0."""

    def __init__(self, threshold=0.5):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        bright = self.dropout(x)[:, 0, 0, 0] - self.threshold
        return torch.stack([-bright, bright], dim=1)


VALUES = [0.0, 0.1, 0.2, 0.4, 0.9, 0.8, 0.3]
LABELS = [0, 0, 0, 1, 1, 1, 0]  # the fourth is wrong for all; the seventh for a threshold of 0.25


def loader(size=3):
    images = torch.full((7, 1, 2, 2), 0.5)
    images[:, 0, 0, 0] = torch.tensor(VALUES)
    labels = torch.tensor(LABELS)
    return list(zip(images.split(size), labels.split(size), strict=True))


def brighten(model):
    """Adds 0.4 to the corner, and changes a second place of the first image's likeness."""

    def attack(images, labels):
        assert not model.training
        changed = images.clone()
        changed[:, 0, 0, 0] = (images[:, 0, 0, 0] + 0.4).clamp(max=1)
        changed[images[:, 0, 0, 0] == 0.2, 0, 1, 1] = 0.8
        return changed

    return attack


def row(frame, **wanted):
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_the_numbers_are_those_counted_by_hand():
    models = {"even": Corner(), "low": Corner(0.25).train()}
    frame = attack_success(models, loader(), {"brighten": brighten}, batch_size=2)
    columns = ["model", "attack", "control", "tried", "succeeded", "success", "low", "high", "pixels", "l2"]
    assert list(frame.columns) == columns
    assert list(zip(frame.model, frame.attack, strict=True)) == [
        (name, attack) for name in models for attack in ("brighten", "random (brighten)")
    ]
    assert frame.control.tolist() == [False, True] * 2
    # right for both: 0, 0.1, 0.2, 0.9, 0.8; brightened, 0.6 passes a half, and 0.4, 0.5, 0.6 a quarter
    found = row(frame, model="even", attack="brighten")
    assert (found.tried, found.succeeded, found.success) == (5, 1, 0.2)
    assert (found.low, found.high) == pytest.approx([float(bound) for bound in wilson(1, 5)])
    assert (found.pixels, found.l2) == pytest.approx((2, (0.4**2 + 0.3**2) ** 0.5))
    found = row(frame, model="low", attack="brighten")
    assert (found.tried, found.succeeded) == (5, 3)
    assert (found.pixels, found.l2) == pytest.approx((4 / 3, (0.4 + 0.4 + 0.5) / 3))
    assert models["low"].training
    assert models["low"].dropout.training


@pytest.mark.parametrize("colours", [1, 2])
def test_the_control_hits_as_often_as_chance(colours):
    images = torch.full((4, colours, 2, 2), 0.25)
    data = [(images, torch.zeros(4, dtype=torch.int64))]

    def half(model):
        """Fools it with two places, and once with three."""

        def attack(images, labels):
            changed = images.clone()
            changed[:, 0, 0, 0], changed[:, 0, 0, 1] = 1.0, 0.0
            changed[0, 0, 1, 1] = 0.0
            return changed

        return attack

    frame = attack_success({"a": Corner()}, data, {"half": half}, control=Control(1000))
    found = row(frame, attack="random (half)")
    # two of four places are drawn, and half of the corners that are get bright
    assert found.tried == 4000
    assert found.success == pytest.approx(1 / 4, abs=0.02)
    assert found.low < 1 / 4 < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * (1 / 4 * 3 / 4 / 4000) ** 0.5, rel=0.1)
    assert found.pixels == 2
    assert found.succeeded == found.success * 4000
    if colours == 1:
        # the corner to 1, the other place to 0 or to 1
        assert found.l2 == pytest.approx(((0.75**2 + 0.25**2) ** 0.5 + (2 * 0.75**2) ** 0.5) / 2, abs=0.01)
    first, again, other = (
        attack_success({"a": Corner()}, data, {"half": half}, control=Control(20, seed)) for seed in (0, 0, 1)
    )
    assert again.equals(first)
    assert not other.equals(first)


def test_without_a_success_the_control_changes_one_pixel():
    frame = attack_success({"a": Corner()}, loader(), {"none": lambda model: lambda x, y: x}, control=Control(40))
    found = row(frame, attack="none")
    assert (found.tried, found.succeeded, found.success, found.low) == (6, 0, 0, 0)
    assert np.isnan(found.pixels)
    assert np.isnan(found.l2)
    control = row(frame, attack="random (none)")
    assert control.pixels == 1
    assert control.success == pytest.approx(1 / 8, abs=0.06)


def test_only_so_many_images_are_read_and_attacked():
    read, attacked = [], []

    def reading():
        for batch in loader(2):
            read.append(len(batch[1]))
            yield batch

    def note(model):
        return lambda x, y: (attacked.append(x[:, 0, 0, 0].tolist()), x)[1]

    frame = attack_success({"a": Corner(), "b": Corner()}, reading(), {"note": note}, max_images=4, batch_size=3)
    assert read == [2, 2, 2]
    assert frame.tried.tolist() == [4, 20, 4, 20]
    assert np.concatenate(attacked[:2]) == pytest.approx([0.0, 0.1, 0.2, 0.9])
    assert attacked[2:] == attacked[:2]


def test_an_attack_may_use_gradients_and_none_is_left_behind():
    model = Corner()

    def ascend(network):
        def attack(images, labels):
            images.requires_grad_()
            wrong = network(images).gather(1, 1 - labels[:, None]).sum()
            (slope,) = torch.autograd.grad(wrong, images)
            return (images + 0.35 * slope.sign()).clamp(0, 1)

        return attack

    with torch.no_grad():
        frame = attack_success({"a": model}, loader(), {"ascend": ascend})
    # within 0.35 of a half: 0.2, 0.3 and 0.8
    assert row(frame, attack="ascend").succeeded == 3
    assert model.threshold.grad is None


def test_with_an_attack_of_ours():
    frame = attack_success(
        {"a": Corner(0.25)},
        [(torch.full((3, 1, 10, 10), 0.3), torch.ones(3, dtype=torch.int64))],
        {"local search": lambda model: LocalSearch(model, rounds=20)},
    )
    found = row(frame, attack="local search")
    assert (found.tried, found.succeeded) == (3, 3)
    assert found.high == pytest.approx(1)
    assert row(frame, attack="random (local search)").success < 1


def test_it_refuses_what_it_cannot_compare():
    attacks = {"none": lambda model: lambda x, y: x}
    models = {"a": Corner(), "b": Corner(0.95)}
    wrong = [(torch.zeros(2, 1, 2, 2), torch.tensor([1, 1]))]
    with pytest.raises(OptionError, match=r"none of 2 images correctly \(each alone: {'a': 0, 'b': 0}"):
        attack_success(models, wrong, attacks)
    with pytest.raises(EmptyLoaderError, match="the loader gave no sample"):
        attack_success(models, [], attacks)
    with pytest.raises(OptionError, match="models must be at least one function by name"):
        attack_success({}, loader(), attacks)
    with pytest.raises(OptionError, match="attacks must be at least one function by name"):
        attack_success(models, loader(), [brighten])
    with pytest.raises(OptionError, match=r"may not be named 'random \(none\)'"):
        attack_success(models, loader(), {**attacks, "random (none)": brighten})
    with pytest.raises(OptionError, match="max_images must be"):
        attack_success(models, loader(), attacks, max_images=0)
    with pytest.raises(OptionError, match=r"images of batch 0 must lie in \[0.2, 1"):
        attack_success(models, loader(), attacks, bounds=(0.2, 1.0))
    with pytest.raises(OptionError, match="images of attack 'far' must lie in"):
        attack_success(models, loader(), {"far": lambda model: lambda x, y: x + 5})
    with pytest.raises(ShapeError, match=r"attack 'flat' must return images of shape \(4, 1, 2, 2\), got \(4, 4\)"):
        attack_success(models, loader(), {"flat": lambda model: lambda x, y: x.flatten(1)})
    with pytest.raises(OptionError, match="function of attack 'nothing' must return"):
        attack_success(models, loader(), {"nothing": lambda model: None})
    with pytest.raises(LabelError, match=r"labels must lie in \[0, 2\), got 2 in batch 0"):
        attack_success(models, [(torch.zeros(1, 1, 2, 2), torch.tensor([2]))], attacks)
    with pytest.raises(ShapeError, match="batch 0 has 2 inputs"):
        attack_success(models, [((torch.zeros(1, 1, 2, 2),) * 2, torch.tensor([0]))], attacks)


def test_an_attack_on_one_network_is_refused_for_what_makes_it(small_cnn, images):
    model = small_cnn()
    with pytest.raises(OptionError, match=r"pass a function of the network: lambda model: LocalSearch\(model\)"):
        attack_success({"a": model}, [(images(4), torch.arange(4))], {"ls": LocalSearch(model)})
