"""`LayerSmoothGradCamPlusPlus`: the noise, and what does not depend on it. Its other arguments: test_layer_grad_cam."""

import pytest
import torch
from shared import SmallCNN
from test_equations import weights_by_loop
from torch import nn

from captum_classfilters import LayerGradCamPlusPlus, LayerSmoothGradCamPlusPlus
from captum_classfilters.core.errors import OptionError


def smooth(model, images, target=1, layer="bn1", **options):
    return LayerSmoothGradCamPlusPlus(model, layer).attribute(images, target, **options)


def gradient_of(model, layer, images, targets):
    kept = []
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    score = model(images)[torch.arange(len(images)), targets].sum()
    handle.remove()
    return torch.autograd.grad(score, kept[0])[0].double(), kept[0].detach().double()


def by_loop(model, layer, images, targets, copies, spread, generator):
    """The mean of the derivatives, copy by copy."""
    clean = gradient_of(model, layer, images, targets)[1]
    sums = [torch.zeros_like(clean) for _ in range(3)]
    for _ in range(copies):
        noise = torch.randn(images.shape, generator=generator)
        gradient = gradient_of(model, layer, images + spread * noise, targets)[0]
        for power in (1, 2, 3):
            sums[power - 1] += gradient**power / copies
    weights = weights_by_loop(*sums, clean)
    return (weights[..., None, None] * clean).sum(1, keepdim=True)


@pytest.mark.parametrize("targets", [[1, 1, 1], [3, 0, 2]], ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_the_map_is_the_definition_s(small_cnn, images, spread, targets):
    model, inputs = small_cnn(), images(3)
    expected = by_loop(model, model.bn1, inputs, targets, 5, spread, torch.Generator().manual_seed(0))
    found = smooth(model, inputs, targets, stdevs=spread)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    plain = LayerGradCamPlusPlus(model, "bn1").attribute(inputs, targets)
    assert not torch.allclose(found, plain, rtol=1e-3)


def test_the_same_call_gives_the_same_map_and_the_generator_another(small_cnn, images):
    model, inputs = small_cnn(), images(3)
    state = torch.get_rng_state()
    first = smooth(model, inputs)
    assert torch.equal(smooth(model, inputs), first)
    assert torch.equal(torch.get_rng_state(), state)
    own = torch.Generator().manual_seed(7)
    second = smooth(model, inputs, generator=own)
    assert not torch.allclose(second, first, rtol=1e-3)
    assert torch.equal(smooth(model, inputs, generator=torch.Generator().manual_seed(7)), second)
    # a generator goes on
    assert not torch.allclose(smooth(model, inputs, generator=own), second, rtol=1e-3)
    assert not torch.allclose(smooth(model, inputs, n_samples=9), first, rtol=1e-3)


@pytest.mark.parametrize("targets", [1, [3, 0, 2], torch.tensor([3, 0, 2]), [(3,), (0,), (2,)]], ids=str)
def test_the_map_does_not_depend_on_the_portions(small_cnn, images, targets):
    model, inputs = small_cnn().double(), images(3).double()
    expected = smooth(model, inputs, targets)
    for size in (1, 3, 7, 100):
        found = smooth(model, inputs, targets, internal_batch_size=size)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_portions_are_as_large_as_was_asked(small_cnn, images):
    model, sizes = small_cnn(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    smooth(model, images(3), internal_batch_size=7)
    assert sizes == [3, 7, 7, 1]
    sizes.clear()
    smooth(model, images(3))
    assert sizes == [3] * 6


def test_without_noise_it_is_grad_cam(small_cnn, images):
    model, inputs = small_cnn(), images(3)
    expected = LayerGradCamPlusPlus(model, "bn1").attribute(inputs, 1)
    torch.testing.assert_close(smooth(model, inputs, n_samples=1, stdevs=0), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(smooth(model, inputs, stdevs=0.0), expected, rtol=1e-5, atol=1e-6)


def test_a_given_weight_needs_no_noise(small_cnn, images):
    model, inputs, calls = small_cnn(), images(3), []
    model.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    found = smooth(model, inputs, channel_weights="ones", generator=generator, stdevs=5.0)
    assert len(calls) == 1
    assert torch.equal(calls[0], inputs)
    assert torch.equal(generator.get_state(), state)
    torch.testing.assert_close(found, LayerGradCamPlusPlus(model, "bn1").attribute(inputs, 1, channel_weights="ones"))


class Several(nn.Module):
    """Two images and a row of tokens for each sample."""

    def __init__(self):
        super().__init__()
        self.inner = SmallCNN()
        self.table = nn.Embedding(5, 3)
        self.seen = []

    def forward(self, left, right, tokens):
        self.seen.append((left.detach(), right.detach(), tokens))
        shift = self.table(tokens).mean(1)[:, :, None, None]
        return self.inner(left + 2 * right + shift)


@pytest.fixture
def several(small_cnn, images):
    model = Several().eval()
    model.inner.load_state_dict(small_cnn().state_dict())
    with torch.no_grad():
        model.table.weight.copy_(torch.arange(15.0).reshape(5, 3) / 10)
    inputs = (images(3), images(3, seed=2), torch.tensor([[0, 1], [2, 3], [4, 4]]))
    return model, inputs


def test_each_input_has_its_noise_and_integers_none(several):
    model, inputs = several
    smooth(model, inputs, layer="inner.bn1", stdevs=(0.5, 0.0, 3.0), n_samples=200, internal_batch_size=150)
    clean, *noisy = model.seen
    assert all(torch.equal(value, given) for value, given in zip(clean, inputs, strict=True))
    left, right, tokens = (torch.cat(values).unflatten(0, (200, 3)) for values in zip(*noisy, strict=True))
    assert torch.equal(right, inputs[1].expand(200, -1, -1, -1, -1))
    assert torch.equal(tokens, inputs[2].expand(200, -1, -1))
    noise = left - inputs[0]
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(0.5, rel=0.01)
    assert len(noise[:, 0, 0, 0, 0].unique()) > 190
    model.seen.clear()
    smooth(model, inputs, layer="inner.bn1", stdevs=0.5, n_samples=200, internal_batch_size=600)
    both = [model.seen[1][i].unflatten(0, (200, 3)) - inputs[i] for i in (0, 1)]
    assert [float(noise.std()) for noise in both] == pytest.approx([0.5, 0.5], rel=0.01)
    assert float(torch.corrcoef(torch.stack([noise.flatten() for noise in both]))[0, 1]) == pytest.approx(0, abs=0.02)


def test_several_inputs_in_portions(several):
    model, inputs = several
    model.double()
    inputs = (inputs[0].double(), inputs[1].double(), inputs[2])
    expected = smooth(model, inputs, [3, 0, 2], layer="inner.bn1")
    found = smooth(model, inputs, [3, 0, 2], layer="inner.bn1", internal_batch_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples must be an integer of at least 1; got 0"),
        ({"n_samples": 2.0}, "n_samples must be an integer of at least 1; got 2.0"),
        ({"n_samples": True}, "n_samples must be an integer"),
        ({"n_samples": None}, "n_samples must be an integer of at least 1; got None"),
        ({"internal_batch_size": 0}, "internal_batch_size must be an integer of at least 1; got 0"),
        ({"stdevs": -1}, "stdevs must be a finite number of at least 0, in units of the inputs; got -1"),
        ({"stdevs": float("nan")}, "stdevs must be a finite number of at least 0.*got nan"),
        ({"stdevs": float("inf")}, "stdevs must be a finite number of at least 0.*got inf"),
        ({"stdevs": "0.3"}, "stdevs must be a finite number of at least 0.*got '0.3'"),
        ({"stdevs": (0.1, 0.2)}, "stdevs must be one number, or one for each of the 1 inputs; got 2"),
    ],
    ids=str,
)
def test_wrong_noise_is_refused(small_cnn, images, options, message):
    with pytest.raises(OptionError, match=message):
        smooth(small_cnn(), images(3), **options)
