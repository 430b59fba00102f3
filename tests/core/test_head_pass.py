"""`HeadPass`: the head is found once, a cached pass is the pass itself, and what does not fit is refused."""

import pytest
import torch
from torch import nn

from captum_classfilters import HeadPass
from captum_classfilters.core import head_pass as module
from captum_classfilters.core.errors import EmptyLoaderError, HeadError, LabelError, OptionError

SIZES = (4, 4, 3)


@pytest.fixture
def loader(images):
    """Three batches with labels."""
    return [(images(size, seed=seed), torch.arange(size) % 4) for seed, size in enumerate(SIZES)]


def read(head_pass, **options):
    with head_pass.batches(**options) as stream:
        return list(stream)


@pytest.fixture
def searches(monkeypatch):
    """How often the head was looked for."""
    found = []

    class Counted(module.HeadSearch):
        def __init__(self, *args):
            found.append(1)
            super().__init__(*args)

    monkeypatch.setattr(module, "HeadSearch", Counted)
    return found


@pytest.fixture
def counted_cnn(small_cnn):
    """A network that knows how many images it has seen."""
    model = small_cnn()
    model.seen = 0

    def count(_, args):
        model.seen += len(args[0])

    model.conv1.register_forward_pre_hook(count)
    return model


@pytest.mark.parametrize("need_maps", [False, True])
def test_it_may_be_read_many_times_and_finds_its_head_once(small_cnn, loader, searches, need_maps):
    model = small_cnn()
    head_pass = HeadPass(model, loader)
    first, second = read(head_pass, need_maps=need_maps), read(head_pass, need_maps=need_maps)
    assert len(searches) == 1
    assert first[0].head is second[-1].head is head_pass.head
    with torch.no_grad():
        for a, b, (x, y) in zip(first, second, loader, strict=True):
            torch.testing.assert_close(a.features, model.penultimate(x))
            torch.testing.assert_close(a.logits, model(x))
            for what in ("features", "logits", "labels"):
                assert torch.equal(getattr(a, what), getattr(b, what))
            assert torch.equal(a.labels, y)
            assert (a.maps is not None) is (b.maps is not None) is need_maps
            if need_maps:
                torch.testing.assert_close(a.maps.mean((2, 3)), a.features)
                assert torch.equal(a.maps, b.maps)


def test_asking_for_the_head_runs_one_batch_and_a_pass_none_for_it(counted_cnn, loader, searches):
    head_pass = HeadPass(counted_cnn, loader)
    assert (head_pass.head.name, head_pass.head.num_features) == ("fc", 6)
    assert counted_cnn.seen == SIZES[0]
    read(head_pass)
    assert head_pass.head.num_classes == 4
    assert counted_cnn.seen == SIZES[0] + sum(SIZES)
    assert len(searches) == 1


def test_the_head_may_be_asked_for_without_labels(small_cnn, images):
    assert HeadPass(small_cnn(), [images(5)]).head.num_classes == 4


def test_weights_that_change_between_passes_are_read_anew(small_cnn, loader):
    model = small_cnn()
    head_pass = HeadPass(model, loader)
    before = read(head_pass)[0].head.weight.clone()
    with torch.no_grad():
        model.fc.weight.mul_(2)
    assert torch.equal(read(head_pass)[0].head.weight, 2 * before)


def test_a_cached_pass_is_the_pass_without_the_network(counted_cnn, loader):
    head_pass = HeadPass(counted_cnn, loader, class_names=tuple("abcd"))
    cached = head_pass.cached()
    assert counted_cnn.seen == sum(SIZES)
    expected = read(head_pass)
    for _ in range(2):
        for a, b in zip(read(cached), expected, strict=True):
            for what in ("features", "logits", "labels", "largest"):
                torch.testing.assert_close(getattr(a, what), getattr(b, what), rtol=0, atol=0)
            assert (a.inputs, a.extras, a.maps) == ((), (), None)  # no images are kept
    assert counted_cnn.seen == 2 * sum(SIZES)
    assert cached.head is head_pass.head
    assert (cached.class_names, cached.model, cached.loader) == (tuple("abcd"), counted_cnn, loader)
    assert cached.cached() is cached
    assert isinstance(cached, HeadPass)


def test_a_cached_pass_of_an_iterator_may_be_read_twice(small_cnn, loader):
    cached = HeadPass(small_cnn(), iter(loader)).cached()
    assert [len(read(cached)) for _ in range(2)] == [3, 3]


def test_a_cached_pass_without_labels_serves_those_who_need_none(small_cnn, images):
    cached = HeadPass(small_cnn(), [images(5)]).cached(need_labels=False)
    (batch,) = read(cached, need_labels=False)
    assert batch.labels is None
    with pytest.raises(OptionError, match="the cached pass has no labels"):
        read(cached)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"need_maps": True},
            HeadError,
            "a cached pass keeps no feature maps; pass the HeadPass that it was made from",
        ),
        ({"num_classes": 5}, OptionError, "num_classes=5, but the head has 4 outputs"),
    ],
)
def test_a_cached_pass_refuses_what_it_does_not_keep(small_cnn, loader, options, error, message):
    with pytest.raises(error, match=message):
        read(HeadPass(small_cnn(), loader).cached(), **options)


def test_of_takes_a_head_pass_or_a_model_and_a_loader(small_cnn, loader):
    model = small_cnn()
    head_pass = HeadPass(model, loader)
    assert HeadPass.of(head_pass) is head_pass
    made = HeadPass.of(model, loader, "fc")
    assert (made.model, made.loader, made.layer) == (model, loader, "fc")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda own, model, loader: (own, loader), "a HeadPass has its own loader and layer; leave loader="),
        (lambda own, model, loader: (own, None, "fc"), "a HeadPass has its own loader and layer"),
        (lambda own, model, loader: (own.cached(), loader), "a HeadPass has its own loader and layer"),
        (lambda own, model, loader: (model,), "a loader is missing: pass the model and a loader"),
        (lambda own, model, loader: (model, 5), "expected a DataLoader or an iterable of batches, got int"),
        (lambda own, model, loader: ("resnet", loader), "must be an nn.Module or a function, got str"),
    ],
)
def test_of_refuses_two_loaders_and_none(small_cnn, loader, arguments, message):
    model = small_cnn()
    with pytest.raises(OptionError, match=message):
        HeadPass.of(*arguments(HeadPass(model, loader), model, loader))


def test_an_iterator_is_empty_the_second_time_and_the_error_says_so(small_cnn, loader):
    head_pass = HeadPass(small_cnn(), iter(loader))
    assert len(read(head_pass)) == 3
    with pytest.raises(EmptyLoaderError, match="An iterator that was read before is empty: pass the loader itself"):
        read(head_pass)


def test_a_function_needs_its_layer(small_cnn, loader):
    model = small_cnn()
    with pytest.raises(HeadError, match="a bare function does not show its layers"):
        HeadPass(lambda x: model(x), loader)
    assert HeadPass(lambda x: model(x), loader, layer=model.fc).head.num_features == 6


def test_labels_are_checked_in_every_batch(small_cnn, loader):
    with pytest.raises(LabelError, match=r"\[0, 4\), got 4 in batch 1"):
        read(HeadPass(small_cnn(), [loader[0], (loader[1][0], loader[1][1] + 1)]))


def test_a_layer_that_is_skipped_in_a_later_pass_is_an_error(small_cnn, images):
    model = small_cnn()

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return x.new_zeros(len(x), 4) if float(x.sum()) == 0 else self.inner(x)

    head_pass = HeadPass(Skips().eval(), [images(3), torch.zeros(2, 3, 8, 8)])
    with pytest.raises(HeadError, match=r"layer inner.fc did not run in batch 1; it must run once"):
        read(head_pass, need_labels=False)
