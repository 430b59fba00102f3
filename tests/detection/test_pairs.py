"""`adversarial_paths`: which images are kept, their twins, and what it takes and refuses."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from captum.robust import FGSM, PGD
from contract import Snapshot
from examples import attack_on, decoupler_of, inverted, planted, tints
from torch import nn

from captum_classfilters.attacks import Attack, Normalized
from captum_classfilters.core import errors
from captum_classfilters.decoupling import Paths
from captum_classfilters.detection import PathPairs, adversarial_paths
from captum_classfilters.detection.pairs import stack_pairs

EPSILON = 0.1
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def cut(images, labels, size=15):
    return list(zip(images.split(size), labels.split(size), strict=True))


def one_by_one(decoupler, image):
    """``(what it says, its bits)`` of a single image by a plain forward."""
    with torch.no_grad():
        output, gates = decoupler(image[None]), decoupler.gates(image[None])[1]
    return int(output.argmax()), torch.cat(gates, 1)[0].bool()


def same(first, second):
    """Every tensor of two `PathPairs`, and their counts."""
    assert first.tried == second.tried
    for part in ("clean", "adversarial", "noise", "misclassified"):
        mine, other = getattr(first, part), getattr(second, part)
        assert mine.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(value, other.tensors()[name]) for name, value in mine.tensors().items()), part
        assert mine.meta() == other.meta()
    for name in ("index", "images", "adversarial_images", "noise_images"):
        mine, other = getattr(first, name), getattr(second, name)
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other), name


# -- which images are kept ---------------------------------------------------------------------------------------------


def test_those_that_were_right_and_then_fooled_are_kept_and_no_others(decoupler, data):
    pairs = adversarial_paths(decoupler, cut(*data), Attack(attack_on(decoupler), epsilon=EPSILON), keep_images=True)
    right, fooled, wrong = [], [], []
    for number, (image, label) in enumerate(zip(*data, strict=True)):
        said, bits = one_by_one(decoupler, image)
        if said != label:
            wrong.append(bits)
            continue
        right.append(number)
        changed = attack_on(decoupler).perturb(image[None].clone().requires_grad_(), EPSILON, label[None])[0].detach()
        after, after_bits = one_by_one(decoupler, changed)
        if after != label:
            fooled.append((number, label, bits, after, after_bits, changed))
    assert 5 < len(fooled) < len(right) == 32
    index, labels, before, after, after_bits, changed = zip(*fooled, strict=True)
    assert pairs.index.tolist() == list(index)
    assert pairs.clean.labels.tolist() == pairs.clean.predictions.tolist() == list(map(int, labels))
    assert pairs.adversarial.labels.tolist() == pairs.noise.labels.tolist() == list(map(int, labels))
    assert pairs.adversarial.predictions.tolist() == list(after)
    assert torch.equal(pairs.clean.bits(), torch.stack(before))
    assert torch.equal(pairs.adversarial.bits(), torch.stack(after_bits))
    assert not torch.equal(pairs.adversarial.bits(), pairs.clean.bits())
    assert torch.equal(pairs.misclassified.bits(), torch.stack(wrong))
    torch.testing.assert_close(pairs.adversarial_images, torch.stack(changed), rtol=0, atol=1e-6)
    assert torch.equal(pairs.images, data[0][pairs.index])
    counts = (len(pairs), pairs.succeeded, pairs.tried, pairs.dropped, len(pairs.misclassified))
    assert counts == (len(index), len(index), 32, 32 - len(index), 8)
    assert pairs.success == len(index) / 32
    assert (
        repr(pairs) == f"PathPairs({len(index)} of 32 attacked images fooled the network, 8 were misclassified before)"
    )


def test_batches_do_not_matter(decoupler, data):
    whole = adversarial_paths(decoupler, [data], Attack(attack_on(decoupler), epsilon=EPSILON))
    images, labels = data
    wrong_alone = [(images[:1], labels[:1]), (images[1:1], labels[1:1]), *cut(images[1:], labels[1:], 6)]
    for loader in (cut(*data, size=7), iter(wrong_alone), [{"image": x, "label": y} for x, y in cut(*data)]):
        found = adversarial_paths(decoupler, loader, Attack(attack_on(decoupler), epsilon=EPSILON))
        assert torch.equal(found.index, whole.index)
        assert torch.equal(found.adversarial.bits(), whole.adversarial.bits())
        assert torch.equal(found.misclassified.bits(), whole.misclassified.bits())
        assert found.tried == whole.tried


def test_max_pairs_stops_reading(decoupler, data):
    everything = adversarial_paths(decoupler, cut(*data, 5), Attack(attack_on(decoupler), epsilon=EPSILON))
    loader = iter(cut(*data, 5))
    found = adversarial_paths(
        decoupler, loader, Attack(attack_on(decoupler), epsilon=EPSILON), max_pairs=3, keep_images=True
    )
    assert len(found) == len(found.noise) == len(found.images) == len(found.adversarial_images) == 3
    assert torch.equal(found.index, everything.index[:3])
    # the share of successes is that up to the last pair
    right = decoupler(data[0]).argmax(1) == data[1]
    assert (found.tried, len(found) + found.dropped) == (int(right[: found.index[2] + 1].sum()),) * 2
    # as many batches are left as lie behind that of the third pair
    assert len(list(loader)) == 8 - (int(found.index[2]) // 5 + 1)


def test_rows_of_pairs(decoupler, data):
    pairs = adversarial_paths(decoupler, [data], Attack(attack_on(decoupler), epsilon=EPSILON), keep_images=True)
    some = pairs[torch.tensor([4, 1])]
    assert some.index.tolist() == [pairs.index[4], pairs.index[1]]
    assert torch.equal(some.noise.bits(), pairs.noise.bits()[[4, 1]])
    assert torch.equal(some.adversarial_images, pairs.adversarial_images[[4, 1]])
    assert (some.tried, len(some.misclassified)) == (pairs.tried, 8)
    assert [len(some.stack()[0]), len(pairs[2:3].stack()[0]), len(pairs[3].stack()[0])] == [6, 3, 3]
    assert [int(each.index[0]) for each in pairs] == pairs.index.tolist()


def test_logits_are_kept_where_asked_for(decoupler, data):
    pairs = adversarial_paths(decoupler, [data], Attack(attack_on(decoupler), epsilon=EPSILON), logits=True)
    for part in (pairs.clean, pairs.adversarial, pairs.noise, pairs.misclassified):
        assert torch.equal(part.logits > 0, part.bits())
    assert adversarial_paths(decoupler, [data], Attack(attack_on(decoupler), epsilon=EPSILON)).clean.logits is None


# -- noise -------------------------------------------------------------------------------------------------------------


def test_noise_is_epsilon_up_or_down_for_every_pixel(decoupler, data):
    attack = attack_on(decoupler)
    pairs = adversarial_paths(decoupler, [data], Attack(attack, epsilon=EPSILON), keep_images=True)
    noisy = pairs.noise_images
    assert torch.equal(pairs.noise.bits(), torch.cat(decoupler.gates(noisy)[1], 1).bool())
    change = noisy - pairs.images
    inside = (noisy > 0) & (noisy < 1)
    torch.testing.assert_close(change[inside].abs(), torch.full_like(change[inside], EPSILON), rtol=0, atol=1e-6)
    assert 0.45 < (change[inside] > 0).double().mean() < 0.55
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    again, other = (
        adversarial_paths(decoupler, [data], Attack(attack, epsilon=EPSILON), seed=seed).noise for seed in (0, 1)
    )
    assert torch.equal(again.bits(), pairs.noise.bits())
    assert not torch.equal(other.bits(), again.bits())


def test_where_epsilon_bounds_the_length_of_the_change_noise_is_as_long(decoupler, data):
    attack = PGD(decoupler, nn.CrossEntropyLoss(reduction="none"), 0, 1)
    pairs = adversarial_paths(decoupler, [data], Attack(attack, epsilon=1.0, norm="L2"), keep_images=True)
    assert len(pairs) > 3
    lengths = (pairs.adversarial_images - pairs.images).flatten(1).norm(dim=1)
    noise = (pairs.noise_images - pairs.images).flatten(1).norm(dim=1)
    # cut off at the bounds, it may be a little shorter
    assert ((noise > 0.5 * lengths) & (noise < 1.01 * lengths)).all()


def test_pairs_that_were_picked_keep_the_share_of_successes(decoupler, data):
    pairs = adversarial_paths(decoupler, [data], Attack(attack_on(decoupler), epsilon=0.5))
    assert len(pairs) > 3
    some = pairs[:2]
    assert (some.success, some.dropped, some.succeeded) == (pairs.success, pairs.dropped, len(pairs))


def test_without_epsilon_noise_is_the_attacks_own_changes_in_other_places(decoupler, data):
    def small(images, labels):
        """Fools by tints; every pixel by its own amount, and never out of the bounds by noise."""
        grid = torch.linspace(0.01, 0.08, images[0].numel()).view_as(images[0])
        return (images + torch.where(images > 0.5, -grid, grid)).clamp(0.09, 0.91)

    images = data[0].clamp(0.1, 0.9)
    pairs = adversarial_paths(decoupler, [(images, data[1])], small, keep_images=True)
    noisy = pairs.noise_images
    assert len(pairs) > 0
    assert torch.equal(pairs.noise.bits(), torch.cat(decoupler.gates(noisy)[1], 1).bool())
    for image, changed, noise in zip(pairs.images, pairs.adversarial_images, noisy, strict=True):
        attacked, random = (changed - image).flatten().abs(), (noise - image).flatten().abs()
        inside = (noise > 0.001) & (noise < 0.999)
        assert inside.all()
        torch.testing.assert_close(random.sort().values, attacked.sort().values, rtol=0, atol=1e-6)
        assert (random - attacked).abs().max() > 0.01
    assert 0.45 < (noisy > pairs.images).double().mean() < 0.55


# -- attacks -----------------------------------------------------------------------------------------------------------


def test_captums_pgd_takes_steps(decoupler, data):
    calls = []

    class Watched(PGD):
        def perturb(self, inputs, radius, step_size, step_num, target, **more):
            calls.append((radius, step_size, step_num, more))
            return super().perturb(inputs, radius, step_size, step_num, target, **more)

    pairs = adversarial_paths(decoupler, [data], Attack(attack_on(decoupler, PGD), epsilon=EPSILON), keep_images=True)
    assert len(pairs)
    assert (pairs.adversarial_images - pairs.images).abs().max() <= EPSILON + 1e-6
    assert (pairs.adversarial.predictions != pairs.adversarial.labels).all()
    attack = attack_on(decoupler, Watched)
    same(adversarial_paths(decoupler, [data], Attack(attack, epsilon=EPSILON), keep_images=True), pairs)
    adversarial_paths(decoupler, [data], Attack(attack, epsilon=EPSILON, step_num=4))
    adversarial_paths(decoupler, [data], Attack(attack, epsilon=EPSILON, step_num=3, step_size=0.07, norm="Linf"))
    adversarial_paths(decoupler, [data], Attack(attack, radius=EPSILON, step_num=3, step_size=0.07))
    assert [call[:3] for call in calls] == [
        (EPSILON, pytest.approx(0.025), 10), (EPSILON, pytest.approx(0.0625), 4), (EPSILON, 0.07, 3), (EPSILON, 0.07, 3)
    ]  # fmt: skip
    assert calls[2][3] == {"norm": "Linf"}


def test_any_function_is_an_attack(decoupler, data):
    images, labels = data
    seen = []

    def plain(x, y):
        seen.append((x.requires_grad, y))
        with torch.no_grad():
            x += 0.05  # into what it was given
        return x.clamp(0, 1)

    first = adversarial_paths(decoupler, [(images, labels)], inverted, keep_images=True)
    assert torch.equal(first.adversarial_images, 1 - first.images)
    assert torch.equal(images, tints())
    right = decoupler(images).argmax(1) == labels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.AttackFailedWarning)
        pairs = adversarial_paths(decoupler, [(images, labels)], plain, keep_images=True)
    assert torch.equal(seen[0][1], labels[right])
    assert torch.equal(images, tints())
    assert torch.equal(pairs.images, images[pairs.index])


@pytest.mark.parametrize("named", [
    lambda x, labels: (1 - x, labels), lambda x, *, target: (1 - x, target), lambda x, eps, y: (eps - x, y),
    lambda x, t, **more: (more["most"] - x, t),
])  # fmt: skip
def test_sizes_and_labels_go_by_the_names_that_the_attack_has(decoupler, data, named):
    options = {"most": 1.0} if "more" in named.__code__.co_varnames else {}
    seen = []

    def attack(*args, **options):
        changed, labels = named(*args, **options)
        seen.append(labels)
        return changed

    attack.__signature__ = inspect.signature(named)
    pairs = adversarial_paths(decoupler, [data], Attack(attack, epsilon=1.0, **options), keep_images=True)
    assert len(pairs)
    assert torch.equal(pairs.adversarial_images, 1 - pairs.images)
    assert torch.equal(seen[0], data[1][decoupler(data[0]).argmax(1) == data[1]])


def test_an_attack_on_another_network_transfers(decoupler, data):
    images, labels = data
    other = decoupler_of(0)
    pairs = adversarial_paths(decoupler, [data], Attack(attack_on(other), epsilon=0.2), keep_images=True)
    right = decoupler(images).argmax(1) == labels
    changed = attack_on(other).perturb(images[right].clone().requires_grad_(), 0.2, labels[right]).detach()
    fooled = decoupler(changed).argmax(1) != labels[right]
    assert 0 < fooled.sum() < right.sum()
    assert torch.equal(pairs.index, right.nonzero()[:, 0][fooled])
    assert torch.equal(pairs.adversarial_images, changed[fooled])
    assert pairs.adversarial.fingerprint == decoupler.paths([data]).fingerprint


def test_normalized_is_as_normalising_by_hand(decoupler, data):
    images, labels = data
    mean, std = torch.tensor([0.4, 0.5, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    # the network is made for tints: undo the normalisation in front of it
    pixels = (images * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    by_hand = (pixels - mean[:, None, None]) / std[:, None, None]
    labels = decoupler(by_hand).argmax(1)
    network = Normalized(decoupler, mean.tolist(), std.tolist())
    pairs = adversarial_paths(
        network, [(pixels, labels)], Attack(attack_on(network), epsilon=EPSILON), keep_images=True
    )
    changed = attack_on(network).perturb(pixels.clone().requires_grad_(), EPSILON, labels).detach()
    assert len(pairs)
    said = decoupler((changed - mean[:, None, None]) / std[:, None, None]).argmax(1)
    assert torch.equal(pairs.index, (said != labels).nonzero()[:, 0])
    assert torch.equal(pairs.clean.bits(), decoupler.paths([by_hand]).bits()[pairs.index])
    after = decoupler.paths([(changed - mean[:, None, None]) / std[:, None, None]])
    assert torch.equal(pairs.adversarial.bits(), after.bits()[pairs.index])
    assert torch.equal(pairs.images, pixels[pairs.index])
    assert pairs.clean.fingerprint == after.fingerprint


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("wraps", [lambda d: d, lambda d: Normalized(d, [0.0] * 3, [1.0] * 3), nn.DataParallel])
def test_the_network_comes_back_as_it_was(decoupler, data, wraps, device):
    decoupler = decoupler.to(device).train()
    decoupler.model.bn1.eval()
    decoupler.model.conv2.weight.requires_grad_(False)
    decoupler.model.fc.weight.grad = torch.ones_like(decoupler.model.fc.weight)
    network = wraps(decoupler)
    before = Snapshot.of(network)
    with torch.no_grad():
        pairs = adversarial_paths(network, cut(*data), Attack(attack_on(network), epsilon=EPSILON), keep_images=True)
    Snapshot.of(network).assert_same(before)
    assert len(pairs)
    assert {each.device.type for each in (pairs.images, pairs.index, pairs.clean.codes)} == {"cpu"}

    def fails(images, labels):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        adversarial_paths(network, cut(*data), fails)
    Snapshot.of(network).assert_same(before)


# -- without success ---------------------------------------------------------------------------------------------------


def test_an_attack_in_vain_gives_nothing_and_says_so(decoupler, data, tmp_path):
    with pytest.warns(errors.AttackFailedWarning, match="the attack fooled the network on none of 32 images; raise"):
        pairs = adversarial_paths(decoupler, cut(*data), lambda x, y: x, keep_images=True, logits=True)
    assert (len(pairs), pairs.tried, pairs.dropped, pairs.success, len(pairs.misclassified)) == (0, 32, 32, 0.0, 8)
    assert pairs.images.shape == pairs.adversarial_images.shape == (0, 3, 8, 8)
    assert pairs.clean.logits.shape == (0, 11)
    X, y, groups = pairs.stack()
    assert (X.shape, y.shape, groups.shape) == ((0, 11), (0,), (0,))
    pairs.save(tmp_path / "none")
    same(PathPairs.load(tmp_path / "none"), pairs)


def test_where_nothing_is_seen_right_nothing_is_attacked(decoupler, data):
    images = data[0]
    wrong = (decoupler(images).argmax(1) + 1) % 4

    def never(images, labels):
        raise AssertionError("it was attacked")

    with pytest.warns(errors.AttackFailedWarning, match="the network classifies none of these images right, so none"):
        pairs = adversarial_paths(decoupler, [(images, wrong)], never)
    assert (len(pairs), pairs.tried, len(pairs.misclassified)) == (0, 0, 40)
    assert np.isnan(pairs.success)
    assert pairs.images is None


def test_an_attack_without_a_gradient_is_told_to_be_in_vain(decoupler, data):
    with pytest.warns(errors.AttackFailedWarning, match="FGSM fooled the network on none of 32 images; raise epsilon"):
        adversarial_paths(
            decoupler, [data], Attack(FGSM(decoupler, lambda output, target: 0 * output.sum(1)), epsilon=0.1)
        )


# -- files and tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"keep_images": True, "logits": True}], ids=["paths", "all"])
def test_saved_and_loaded(decoupler, data, tmp_path, options):
    pairs = adversarial_paths(decoupler, [data], Attack(attack_on(decoupler), epsilon=EPSILON), **options)
    pairs.save(tmp_path / "pairs.safetensors")
    same(PathPairs.load(tmp_path / "pairs.safetensors"), pairs)
    with pytest.raises(errors.FileFormatError, match="holds a PathPairs; expected a Paths"):
        Paths.load(tmp_path / "pairs.safetensors")


def test_twins_are_of_one_group():
    clean, adversarial = planted(12)
    noise, _ = planted(12, seed=5)
    X, y, groups = stack_pairs(clean, adversarial, noise)
    assert torch.equal(X.bits(), torch.cat([clean.bits(), adversarial.bits(), noise.bits()]))
    assert (y.dtype, y.tolist()) == (np.int64, [0] * 12 + [1] * 12 + [0] * 12)
    assert groups.tolist() == [*range(12)] * 3
    X, y, groups = stack_pairs(clean, adversarial, groups=torch.arange(12) + 100)
    assert (len(X), y.tolist(), groups.tolist()) == (24, [0] * 12 + [1] * 12, [*range(100, 112)] * 2)
    pairs = PathPairs(clean, adversarial, noise, clean[:3], torch.arange(12) * 7, 20, 12)
    assert pairs.stack()[2].tolist() == [*range(0, 84, 7)] * 3
    assert len(pairs.stack(noise=False)[0]) == 24
