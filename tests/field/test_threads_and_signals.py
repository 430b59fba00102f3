"""Several threads, interrupts at any line, several ranks: nothing is mixed up, nothing is left behind."""

import sys
import threading
import warnings

import pytest
import torch
from contract import Snapshot
from torch import nn

from captum_classfilters import InfluentialFeatures, PathDecoupler, aggregate
from captum_classfilters.core import borrow, calls
from captum_classfilters.core.borrow import borrowed
from captum_classfilters.core.errors import MergeError, UnseenClassWarning


def network(train=False):
    torch.manual_seed(0)
    trunk = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*trunk, nn.Linear(8, 4)).train(train)


def deep():
    """With a convolution to gate."""
    convs = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    return nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def batches(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(count)]


def together(*tasks):
    """Run functions in threads that start at once; what they return, or raise."""
    barrier, results = threading.Barrier(len(tasks)), [None] * len(tasks)

    def run(index, task):
        barrier.wait()
        try:
            results[index] = task()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("train", [False, True], ids=["eval mode", "train mode"])
def test_two_threads_with_one_model_give_the_tables_of_one(train):
    model = network(train)
    expected = [InfluentialFeatures(network(train)).attribute(batches(seed=seed)) for seed in (1, 2)]
    before = Snapshot.of(model)

    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                threading.Event().wait(0.002)  # lets the other thread come in between
                yield batch

    for _ in range(3):
        found = together(*(lambda s=s: InfluentialFeatures(model).attribute(Slow(batches(seed=s))) for s in (1, 2)))
        for table, right in zip(found, expected, strict=True):
            assert torch.equal(table.scores, right.scores)
    Snapshot.of(model).assert_same(before)


def test_a_thread_may_borrow_what_it_has_borrowed_and_others_wait_their_turn():
    model, order = network(), []
    inside = threading.Event()

    def second():
        inside.wait()
        with borrowed(model[0]):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with borrowed(model), borrowed(model):
        inside.set()
        threading.Event().wait(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# -- tracing -----------------------------------------------------------------------------------------------------------


def test_other_threads_run_their_models_while_one_is_traced(monkeypatch):
    other, images = network(), batches(1)[0][0]
    expected, stop, wrong = other(images), threading.Event(), []

    def serve():
        while not stop.is_set():
            try:
                if not torch.equal(other(images), expected):
                    wrong.append("another answer")
            except Exception as error:
                wrong.append(repr(error))

    server = threading.Thread(target=serve)
    server.start()
    try:
        for _ in range(15):
            PathDecoupler(deep())
    finally:
        stop.set()
        server.join()
    assert wrong == []


def test_two_threads_that_trace_leave_torch_as_it_was():
    call, get = nn.Module.__call__, nn.Module.__getattr__
    results = together(*(lambda: [PathDecoupler(deep()) for _ in range(5)] for _ in range(2)))
    assert [len(result) for result in results] == [5, 5]
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is get


def test_an_interrupt_while_a_model_is_traced_leaves_torch_as_it_was(monkeypatch):
    call, join = nn.Module.__call__, threading.Thread.join

    def interrupted(thread, *args):
        monkeypatch.setattr(threading.Thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PathDecoupler(deep())
    assert nn.Module.__call__ is call
    assert not calls._TRACING.locked()


def test_a_model_that_cannot_be_traced_is_refused_as_before():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(Exception, match="cannot be traced"):
        PathDecoupler(Branching())


# -- interrupts at every line ------------------------------------------------------------------------------------------


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that runs in one file."""

    def __init__(self, at, file):
        self.at, self.file, self.lines = at, file, 0

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != self.file:
            return None
        return self.line

    def line(self, frame, event, arg):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self.line


def interrupted_at(at, call):
    """How many lines ran, and whether the interrupt came out."""
    watch, before = Interrupt(at, borrow.__file__), sys.gettrace()
    sys.settrace(watch)
    try:
        call()
    except KeyboardInterrupt:
        return watch.lines, True
    finally:
        sys.settrace(before)
    return watch.lines, False


def test_an_interrupt_at_any_line_that_sets_or_removes_a_hook_leaves_none_behind():
    model, images = network(train=True), batches(1)[0][0]
    model[1].eval()
    before = Snapshot.of(model)

    def call():
        with borrowed(model) as borrow_:
            remove = borrow_.after(model[0], lambda *_: None)
            borrow_.before(model[5], lambda *_: None)
            model(images)
            remove()

    at, came_out = 1, 0
    while True:
        lines, raised = interrupted_at(at, call)
        if lines < at:
            break
        came_out += raised
        Snapshot.of(model).assert_same(before)
        assert not borrow._OWNERS._held, f"line {at} left the model borrowed"
        at += 1
    assert came_out > 40


def test_an_aggregation_that_is_interrupted_within_a_batch_has_whole_batches():
    from captum.attr import LayerActivation

    from captum_classfilters.core import class_sums

    model = network()
    attribution = LayerActivation(model, model[3])
    whole = aggregate(attribution, batches(2))
    add, calls_ = class_sums.ClassSums.add, []

    def interrupted(self, *args):
        calls_.append(1)
        if len(calls_) == 3:
            raise KeyboardInterrupt
        add(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_sums.ClassSums, "add", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            aggregate(attribution, batches(4))
    part = caught.value.partial_result
    assert torch.equal(part.counts, whole.counts)
    assert torch.equal(part.scores, whole.scores)


# -- randomness and warnings -------------------------------------------------------------------------------------------


def test_a_generator_of_ones_own_leaves_that_of_torch_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (PathDecoupler(deep(), generator=torch.Generator().manual_seed(5)) for _ in range(2))
    torch.set_rng_state(state)
    deep()
    deep()
    expected = torch.rand(3)
    torch.set_rng_state(state)
    for _ in range(2):
        PathDecoupler(deep(), generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.rand(3), expected)
    for a, b in zip(first.controllers.parameters(), second.controllers.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_warning_that_is_an_error_does_not_lose_the_finished_pass():
    loader = [(images, labels % 3) for images, labels in batches()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = InfluentialFeatures(network()).attribute(loader)
    with pytest.raises(UnseenClassWarning) as caught:
        InfluentialFeatures(network()).attribute(loader)
    assert torch.equal(caught.value.partial_result.scores, expected.scores)


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_with_other_weights_are_refused_and_the_message_is_short(monkeypatch):
    from captum_classfilters.core import ranks

    tables = {"scores": torch.ones(2, 3)}
    told = []

    def gather(result, mine, group):
        told.append(mine)
        result[:] = [told[0], told[-1]]

    monkeypatch.setattr(ranks.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(ranks.dist, "all_gather_object", gather)
    monkeypatch.setattr(ranks.dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda *args: None)
    sums, about = ranks.sum_over(None, tables, "histogram", network=network())
    assert (about, sums["scores"].sum().item()) == ("histogram", 6)
    other = network()
    with torch.no_grad():
        other[0].weight.add_(1e-3)
    with pytest.raises(
        MergeError, match=r"the networks of the ranks have different weights .* load the same checkpoint"
    ):
        ranks.sum_over(None, tables, "histogram", network=other)
    names = tuple(f"class {number}" * 20 for number in range(1000))
    with pytest.raises(MergeError) as caught:
        ranks.sum_over(None, tables, names, network=network())
    assert len(str(caught.value)) < 1500
