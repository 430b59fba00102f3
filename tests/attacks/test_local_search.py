"""The local-search attack against a plain loop, and on networks whose weak pixel is known."""

import pytest
import torch
from contract import Snapshot
from torch import nn

from captum_classfilters.attacks import LocalSearch, SearchSettings
from captum_classfilters.attacks.local_search import cyclic, pert
from captum_classfilters.attacks.oracle import check_images, in_top
from captum_classfilters.core.errors import LabelError, OptionError, ShapeError

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Weighing(nn.Module):
    """Class 1 where one pixel is darker than a quarter, else class 0; and a silent class."""

    def __init__(self, row, column):
        super().__init__()
        self.row, self.column = row, column
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        dark = self.scale * (0.25 - x[:, :, self.row, self.column].mean(1))
        return torch.stack([torch.zeros_like(dark), dark, dark - 50], dim=1)


class Constant(nn.Module):
    def forward(self, x):
        return torch.tensor([2.0, 1.0, 0.0]).expand(len(x), 3)


def wavering(colours, seed=0):
    """A network of 4 classes for images of 8 x 10, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(colours * 80, 12), nn.Tanh(), nn.Linear(12, 4), nn.Dropout(0.5))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def seeded_images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def undecided(model, colours, count=8, dtype=torch.float32):
    """Of many images those that the network is least sure of, and what it takes them for."""
    images = seeded_images(5 * count, colours, 8, 10, dtype=dtype)
    best = model(images).detach().topk(2)
    order = (best.values[:, 0] - best.values[:, 1]).argsort()[:count]
    return images[order], best.indices[order, 0]


# -- against a loop ----------------------------------------------------------------------------------------------------


def plain_search(model, image, label, candidates, *, p, r, d, t, rounds, rest, k):
    """Algorithm LocSearchAdv on one image in [-1/2, 1/2], one pixel at a time; the image found, or None, and rounds."""
    image = image.clone()
    _, height, width = image.shape
    resting = {}

    def probabilities(centred):
        return model(centred[None] + 0.5)[0].softmax(0).tolist()

    for done in range(1, rounds + 1):
        awake = [place for place in candidates if resting.get(place, 0) < done]
        scores = []
        for row, column in awake or candidates:
            trial = image.clone()
            for colour in range(len(trial)):
                value = float(trial[colour, row, column])
                trial[colour, row, column] = p * ((value > 0) - (value < 0))
            scores.append((probabilities(trial)[label], row, column))
        best = [(row, column) for _, row, column in sorted(scores)[:t]]
        for row, column in best:
            for colour in range(len(image)):
                value = r * float(image[colour, row, column])
                image[colour, row, column] = value + 1 if value < -0.5 else value - 1 if value > 0.5 else value
            resting[row, column] = done + rest
        now = probabilities(image)
        if label not in sorted(range(len(now)), key=lambda other: -now[other])[:k]:
            return image, done
        candidates = {
            (x, y)
            for row, column in best
            for x in range(max(0, row - d), min(height, row + d + 1))
            for y in range(max(0, column - d), min(width, column + d + 1))
        }
    return None, rounds


@pytest.mark.parametrize(("k", "colours", "rest", "seed"), [(1, 1, 3, 1), (1, 3, 2, 0), (2, 3, 3, 3)])
def test_it_is_the_papers_algorithm(k, colours, rest, seed):
    model = wavering(colours, seed).double()
    images, labels = undecided(model, colours, dtype=torch.float64)
    options = {"rounds": 12, "k": k}
    model.train()
    settings = SearchSettings(pert=2.0, radius=1, pixels=3, rest=rest)
    generator = torch.Generator().manual_seed(5)
    attack = LocalSearch(model, settings=settings, batch_size=7, generator=generator, **options)
    found = attack(images, labels)
    model.eval()
    start = torch.rand(8, 80, generator=torch.Generator().manual_seed(5), dtype=torch.float64).argsort(1)[:, -8:]
    ends = []
    for image, label, places, got in zip(images, labels.tolist(), start.tolist(), found, strict=True):
        candidates = {divmod(place, 10) for place in places}
        with torch.no_grad():
            expected, rounds = plain_search(
                model, image - 0.5, label, candidates, p=2.0, r=1.5, d=1, t=3, rest=rest, **options
            )
        ends.append(None if expected is None else rounds)
        torch.testing.assert_close(got, image if expected is None else expected + 0.5, rtol=0, atol=1e-12)
    # the case holds what is to be compared: failures, and a search longer than a pixel's rest
    assert None in ends
    assert any(rounds is not None and rounds > rest for rounds in ends)


def test_the_steps_of_the_paper():
    values = torch.tensor([-0.5, -0.4, -0.2, 0.0, 0.2, 0.4, 0.5], dtype=torch.float64)
    torch.testing.assert_close(cyclic(values, 1.5), values.new_tensor([0.25, 0.4, -0.3, 0.0, 0.3, -0.4, -0.25]))
    assert pert(values, 3.0).tolist() == [-3, -3, -3, 0, 3, 3, 3]


def test_equal_logits_are_ranked_as_argmax_ranks_them():
    logits = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    assert in_top(logits, torch.tensor([0, 1, 2])).tolist() == [True, False, False]
    assert in_top(logits, torch.tensor([0, 1, 2]), 2).tolist() == [True, True, False]


# -- known answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("colours", [1, 3])
def test_it_walks_to_the_one_pixel_that_counts(colours, device):
    model = Weighing(9, 2).to(device)
    images = torch.full((4, colours, 12, 12), 0.3, device=device)
    labels = torch.zeros(4, dtype=torch.int64)
    found = LocalSearch(model, settings=SearchSettings(radius=5), rounds=40)(images, labels)
    assert found.device == images.device
    # 0.2 below the middle, times 3/2
    torch.testing.assert_close(found[:, :, 9, 2], torch.full((4, colours), 0.2, device=device))
    assert (model(found).argmax(1) == 1).all()
    touched = (found != images).any(1).flatten(1).sum(1)
    assert (touched <= 5 * 40).all()


def test_a_network_that_sees_nothing_is_not_fooled_and_the_wrong_are_left_alone():
    images = seeded_images(3, 1, 10, 10)
    assert torch.equal(LocalSearch(Constant(), rounds=3)(images, torch.tensor([0, 1, 0])), images)
    asked = []
    model = Weighing(0, 0)
    model.register_forward_hook(lambda module, args, output: asked.append(len(args[0])))
    dark = torch.full((2, 1, 10, 10), 0.3)
    assert torch.equal(LocalSearch(model)(dark, torch.tensor([1, 2])), dark)
    assert asked == [2]
    assert LocalSearch(model)(dark[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 1, 10, 10)


def test_only_so_many_candidates_are_asked_for():
    asked = []

    def network(x):
        asked.append(len(x))
        return Constant()(x)

    image = seeded_images(1, 1, 20, 20)
    LocalSearch(network, rounds=4, candidates=12)(image, torch.tensor([0]))
    assert asked == [1, *[12, 1] * 4]
    asked.clear()
    LocalSearch(network, rounds=2, settings=SearchSettings(radius=1, pixels=1))(image, torch.tensor([0]))
    assert asked[:3] == [1, 40, 1]
    assert 3 <= asked[3] <= 8


def test_a_changed_pixel_rests_until_all_do():
    asked = []

    def network(x):
        asked.append(len(x))
        return Constant()(x)

    LocalSearch(network, rounds=6)(seeded_images(1, 1, 4, 4), torch.tensor([0]))
    # one of sixteen at the start; then five fewer in each round, until none is left and all are asked about
    assert asked == [1, *[1, 1], *[15, 1], *[10, 1], *[5, 1], *[16, 1], *[16, 1]]


@pytest.mark.parametrize("form", [lambda logits: (logits, None), lambda logits: {"logits": logits}])
def test_logits_are_read_from_whatever_the_network_returns_them_in(form):
    model = wavering(1)
    images, labels = undecided(model, 1)
    expected = LocalSearch(model, rounds=3)(images, labels)
    assert not torch.equal(expected, images)
    assert torch.equal(LocalSearch(lambda x: form(model(x)), rounds=3)(images, labels), expected)


def test_the_range_of_the_images_makes_no_difference():
    model = wavering(3)
    images, labels = undecided(model, 3)
    options = {"rounds": 6, "settings": SearchSettings(pert=3.0)}
    expected = LocalSearch(model, **options)(images, labels)
    wide = LocalSearch(lambda x: model((x + 2) / 5), (-2.0, 3.0), **options)(images * 5 - 2, labels)
    assert not torch.equal(expected, images)
    torch.testing.assert_close((wide + 2) / 5, expected, atol=1e-5, rtol=0)
    assert wide.min() >= -2
    assert wide.max() <= 3


def test_the_same_generator_gives_the_same_images_and_only_it_is_used():
    model = wavering(3)
    images, labels = undecided(model, 3)

    def found(**options):
        return LocalSearch(model, rounds=4, settings=SearchSettings(pert=3.0), candidates=20, **options)(images, labels)

    first = found(generator=torch.Generator().manual_seed(3))
    assert torch.equal(found(generator=torch.Generator().manual_seed(3), batch_size=11), first)
    assert not torch.equal(found(generator=torch.Generator().manual_seed(4)), first)
    assert torch.equal(found(), found())


def test_the_model_and_the_images_are_given_back(small_cnn):
    model = small_cnn().train()
    model.bn1.eval()
    images = seeded_images(4, 3, 10, 10).requires_grad_()
    kept = images.detach().clone()
    labels = torch.tensor([0, 1, 2, 3])
    before = Snapshot.of(model)
    found = LocalSearch(model, rounds=3)(images, labels)
    Snapshot.of(model).assert_same(before)
    assert not found.requires_grad
    assert torch.equal(images.detach(), kept)
    with pytest.raises(LabelError):
        LocalSearch(model)(images, labels + 1)
    Snapshot.of(model).assert_same(before)


# -- refused -----------------------------------------------------------------------------------------------------------


def test_it_refuses_what_it_cannot_attack():
    images, labels = torch.zeros(2, 1, 6, 6), torch.tensor([1, 1])
    attack = LocalSearch(Weighing(0, 0))
    with pytest.raises(OptionError, match=r"images must lie in \[0.0, 1.0\], got values from 0 to 1.5; pass bounds="):
        attack(images.index_fill(3, torch.tensor([2]), 1.5), labels)
    with pytest.raises(OptionError, match="got values from nan"):
        attack(images * torch.nan, labels)
    assert torch.equal(attack(images - 1e-7, labels * 0), images - 1e-7)
    with pytest.raises(ShapeError, match=r"images must be floats of shape \(N, colours, H, W\), got torch.uint8"):
        attack(images.byte(), labels)
    with pytest.raises(ShapeError, match=r"got torch.float32 of shape \(1, 6, 6\)"):
        attack(images[0], labels)
    with pytest.raises(LabelError, match=r"labels must have shape \(2,\)"):
        attack(images, labels[:1])
    with pytest.raises(LabelError, match=r"labels must lie in \[0, 3\), got 3"):
        attack(images, labels + 2)
    with pytest.raises(OptionError, match="k must be smaller than the number of classes, 3; got 3"):
        LocalSearch(Weighing(0, 0), k=3)(images, labels)
    with pytest.raises(ShapeError, match=r"the model must give logits of shape \(2, C\)"):
        LocalSearch(nn.Identity())(images, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": (1.0, 1.0)}, r"bounds must be \(smallest, largest\) .* got \(1.0, 1.0\)"),
        ({"bounds": (0.0, float("nan"))}, "the first below the second, got"),
        ({"bounds": 1.0}, r"bounds must be the smallest and the largest value of a pixel, as \(0.0, 1.0\), got 1.0"),
        ({"bounds": (0.0, 0.5, 1.0)}, "bounds must be the smallest and the largest"),
        ({"rounds": 2.5}, "rounds must be an integer"),
        ({"candidates": 0}, "candidates must be"),
        ({"settings": {"pert": 1.0}}, r"settings must be SearchSettings\(...\), got dict"),
    ],
)
def test_it_refuses_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        LocalSearch(Constant(), **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixels": 0}, "pixels must be an integer of at least 1; got 0"),
        ({"radius": -1}, "radius must be an integer of at least 0"),
        ({"rest": -1}, "rest must be an integer of at least 0"),
        ({"cyclic": 2.1}, r"cyclic must be a number in \[0, 2\]"),
        ({"pert": 0.0}, "pert must be a finite number above 0"),
    ],
)
def test_it_refuses_settings_out_of_range(settings, message):
    with pytest.raises(OptionError, match=message):
        SearchSettings(**settings)


def test_it_refuses_what_is_not_a_network():
    with pytest.raises(OptionError, match="or a function, got str"):
        LocalSearch("model")(torch.zeros(1, 1, 2, 2), torch.tensor([0]))


@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [(torch.float32, (-123.68, 151.061)), (torch.bfloat16, (-0.3, 0.3)), (torch.float16, (0.0, 1.0))],
)
def test_rounding_to_the_images_dtype_is_not_out_of_range(dtype, bounds):
    images = torch.tensor(bounds).to(dtype).reshape(1, 1, 1, 2)
    check_images(images, bounds)
    with pytest.raises(OptionError, match="must lie in"):
        check_images(images * 1.05 + 0.05, bounds)
