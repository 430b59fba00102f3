"""Saved state in the field: hostile files, full disks, modes, links, threads, killed runs, numbers from numpy."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from shared import started_gate
from torch import nn
from torch.utils.data import DataLoader

from captum_classfilters import assets
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.core.errors import ClassFiltersError, FileFormatError, OptionError
from captum_classfilters.core.files import read, replacing, write
from captum_classfilters.core.training import Checkpoint, Task, Training, get_random
from captum_classfilters.decoupling import PathDecoupler, Paths
from captum_classfilters.detection.pairs import PathPairs
from captum_classfilters.gating import LabelSensitiveGate, LabelSensitiveTraining
from captum_classfilters.gating.gate import GatePenalty
from captum_classfilters.gating.label_sensitive import GateSchedule
from captum_classfilters.heads.moments import HeadMoments
from captum_classfilters.heads.recover import recover
from captum_classfilters.splitting.ald_tree import ALDTree
from captum_classfilters.splitting.splits import split_weights

# -- files of every kind -----------------------------------------------------------------------------------------------


def gated():
    torch.manual_seed(0)
    return PathDecoupler(
        nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )
    ).eval()  # fmt: skip


DECOUPLER = gated()


def save_filters(path):
    scores = torch.rand(3, 4, dtype=torch.float64)
    sums = {"total": scores, "squares": scores}
    names = ("a", "b", "c")
    ClassFilters(scores, scores, torch.tensor([1, 2, 0]), "m", "fc", names, {"x": 1}, "correlation", sums).save(path)


def save_moments(path):
    HeadMoments(torch.rand(3).double(), torch.rand(3, 3).double(), 7, "fc").save(path)


def save_tree(path):
    weights = torch.tensor([[-3.0, -1.0, 1.0, 2.0, 3.0, 8.0]])
    ALDTree(split_weights(weights, min_size=3, fit="mle"), 0).save(path)


def some_paths():
    return DECOUPLER.paths([(torch.rand(4, 1, 9, 9), torch.arange(4) % 3)], logits=True)


def save_pairs(path):
    paths, images = some_paths(), torch.rand(4, 1, 9, 9)
    PathPairs(paths, paths, paths, paths[:0], torch.arange(4), 6, 4, images, images, images).save(path)


def save_network(path):
    assets.save_network(assets.SmallResNet(8, 3, widths=(2, 2, 2)), path, {"seed": 0})


def save_images(path):
    sample = assets.ImageSample(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.arange(5) % 2, ("a", "b"))
    assets.save_images(path, sample, sample)


def load_images(path):
    here = assets._HERE
    assets._HERE = path.parent
    try:
        os.replace(path, path.parent / "fashion_mnist_sample.safetensors")
        return assets.load_images()
    finally:
        assets._HERE = here


KINDS = {
    "ClassFilters": (save_filters, ClassFilters.load),
    "HeadMoments": (save_moments, HeadMoments.load),
    "ALDTree": (save_tree, ALDTree.load),
    "gate": (lambda path: LabelSensitiveGate(3, 4).save(path), LabelSensitiveGate.load),
    "Paths": (lambda path: some_paths().save(path), Paths.load),
    "PathPairs": (save_pairs, PathPairs.load),
    "PathDecoupler": (DECOUPLER.save, lambda path: gated().load(path)),
    "network": (save_network, assets.load_network),
    "images": (save_images, load_images),
}


def use(thing):
    """What a loaded thing is loaded for must work as well."""
    if isinstance(thing, ClassFilters):
        thing.top(1), thing.overlap(1)
    elif isinstance(thing, HeadMoments):
        thing.covariance.sum()
    elif isinstance(thing, ALDTree):
        str(thing), thing.terminal("positive")
    elif isinstance(thing, Paths):
        thing.bits(), thing.macs(), thing.states()


VALUES = [None, True, -1, 0, 0.5, 10**8, 10**30, "x", "y" * 10**6, [], {}, [[]], [10**8], ["a", "a"], float("nan")]


def mutated(tensors, header, draw):
    """A well-formed file of wrong contents: one entry of the header, or one tensor, is another."""
    header = json.loads(json.dumps(header))
    tensors = dict(tensors)
    if draw.random() < 0.7:
        places = [(header, "meta")]
        for holder, key in places:
            inner = holder[key]
            entries = inner.keys() if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
            places += [(inner, entry) for entry in entries]
        holder, key = draw.choice(places)
        if isinstance(holder, dict) and draw.random() < 0.3:
            del holder[key]
        else:
            holder[key] = draw.choice(VALUES)
    else:
        name = draw.choice(sorted(tensors))
        value = tensors.pop(name)
        how = draw.randrange(6)
        if how == 1:
            tensors[name] = value.reshape(-1)[:-1].clone()
        elif how == 2:
            tensors[name] = value[None]
        elif how == 3:
            tensors[name] = value.to(draw.choice([torch.bool, torch.float16, torch.complex64, torch.int8]))
        elif how == 4:
            tensors[name] = torch.full_like(value, torch.nan if value.is_floating_point() else 77)
        elif how == 5:
            tensors["y" * 10**5] = value
    return tensors, header


def attack(kind, tmp_path, seed, count):
    """Save, change and load a file of a kind many times: nothing but the package's own short errors may come."""
    save, load = KINDS[kind]
    draw, path = random.Random(seed), tmp_path / "file.safetensors"
    save(path)
    whole = path.read_bytes()
    # copies: the file is written over, and loaded tensors lie in it
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    header = json.loads(
        json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["captum_classfilters"]
    )
    messages = []
    for turn in range(count):
        if turn % 3 == 0:
            raw = bytearray(whole)
            for _ in range(draw.choice([1, 1, 4, 30])):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            path.write_bytes(raw[: draw.choice([len(raw), draw.randrange(len(raw))])])
        else:
            other, about = mutated(tensors, header, draw)
            save_file(other, path, {"captum_classfilters": json.dumps(about)})
        try:
            use(load(path))
        except ClassFiltersError as error:
            messages.append(str(error))
    assert max(map(len, messages)) < 1500 + len(str(path))
    return len(messages)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_refused_shortly_or_work(kind, tmp_path):
    assert attack(kind, tmp_path, seed=17, count=60) >= 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_changed_files_are_refused_shortly_or_work(kind, tmp_path):
    assert attack(kind, tmp_path, seed=18, count=3000) >= 1000


def changed(kind, path, change, names=None):
    """A saved file with some entries of its meta changed."""
    KINDS[kind][0](path)
    whole = path.read_bytes()
    outer = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]["captum_classfilters"]
    header = json.loads(outer)
    header["meta"] |= change
    save_file(load_file(path) | (names or {}), path, {"captum_classfilters": json.dumps(header)})


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Paths", {"channels": [10**8]}),
        ("Paths", {"layers": ["a"], "channels": [10**8]}),
        ("PathPairs", {"channels": [10**8, 1]}),
        ("network", {"config": {"depth": 6 * 10**7 + 2, "num_classes": 3, "mean": [0.0], "std": [1.0]}}),
        ("network", {"config": {"depth": 8, "num_classes": 10**6, "mean": [0.0], "std": [1.0], "widths": [2**20] * 3}}),
        ("images", {"image_shape": [1, 60000, 60000]}),
        ("HeadMoments", {"count": -3}),
        ("HeadMoments", {"count": 1.5}),
        ("HeadMoments", {"layer": 7}),
        ("gate", {"layer": ["fc"]}),
        ("gate", {"trained": "yes"}),
        ("ClassFilters", {"class_names": [1, 2, 3]}),
    ],
)
def test_wrong_contents_are_refused_before_memory_is_taken(kind, change, tmp_path):
    path = tmp_path / "file.safetensors"
    changed(kind, path, change)
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(FileFormatError, match="save it again"):
            KINDS[kind][1](path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
        assert time.process_time() - begin < 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("counts", [torch.tensor([-1, 0, 1]), torch.tensor([0.5, 1, 1])])
def test_counts_of_a_gate_are_counts(counts, tmp_path):
    changed("gate", tmp_path / "gate", {}, {"counts": counts})
    with pytest.raises(FileFormatError, match="counts"):
        LabelSensitiveGate.load(tmp_path / "gate")


def test_empty_paths_of_many_channels_are_refused(tmp_path):
    # no byte of the file speaks against it, and every table of it would take gigabytes
    changed("Paths", tmp_path / "paths", {"layers": ["a"], "channels": [10**8]})
    tensors = {name: value[:0] for name, value in load_file(tmp_path / "paths").items()}
    tensors |= {"codes": torch.zeros(0, 10**8 // 8, dtype=torch.uint8), "logits": torch.zeros(0, 10**8)}
    _, meta = read(tmp_path / "paths", kind="Paths", version=1)
    write(tmp_path / "paths", tensors, kind="Paths", version=1, meta=meta)
    with pytest.raises(FileFormatError, match="channels"):
        Paths.load(tmp_path / "paths")


@pytest.mark.parametrize("header", ["[" * 100_000, '{"kind": ' * 100_000, "9" * 100_000, '{"kind": [], "version": 1}'])
def test_headers_that_a_reader_of_json_cannot_read(header, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "file", {"captum_classfilters": header})
    with pytest.raises(FileFormatError, match="broken captum_classfilters header") as caught:
        read(tmp_path / "file", kind="Paths", version=1)
    assert len(str(caught.value)) < 1000


def test_a_network_is_loaded_without_a_draw_from_torchs_generator(tmp_path):
    save_network(tmp_path / "net")
    before = torch.get_rng_state()
    assets.load_network(tmp_path / "net")
    assert torch.equal(before, torch.get_rng_state())


# -- writing -----------------------------------------------------------------------------------------------------------


def save(path):
    write(path, {"a": torch.zeros(3)}, kind="Table", version=1, meta={})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_the_older_file_s_mode_stays(tmp_path):
    path = tmp_path / "file"
    save(path)
    for mode in (0o600, 0o640):
        path.chmod(mode)
        save(path)
        assert path.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_the_umask_is_never_set(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set, which other threads see"))
    save(tmp_path / "file")


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    save(link)
    assert link.is_symlink()
    assert read(target, kind="Table", version=1)[1] == {}
    assert os.listdir(tmp_path / "far") == ["target"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "file[1]"
    script = (
        "import sys, time; from captum_classfilters.core.files import replacing\n"
        "with replacing(sys.argv[1]) as beside: print('here', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        save(path)
        assert len(list(tmp_path.glob("*.part"))) == 1
        other.send_signal(signal.SIGKILL)
        other.wait()
        save(path)
        assert os.listdir(tmp_path) == [path.name]
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_file_and_folder_are_on_the_disk_around_the_rename(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    save(tmp_path / "file")
    assert events == ["fsync", "replace", "fsync"]


def test_threads_write_one_file_and_it_is_whole(tmp_path):
    failures = []

    def often():
        try:
            for _ in range(20):
                save(tmp_path / "file")
                read(tmp_path / "file", kind="Table", version=1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("error", "number"),
    [(SafetensorError("Error: No space left on device (os error 28)"), 28), (RuntimeError("unexpected pos 64"), 5)],
)
def test_a_full_disk_is_an_os_error_that_names_the_file(error, number, tmp_path):
    with pytest.raises(OSError, match="could not be written") as caught, replacing(tmp_path / "file.pt"):
        raise error
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "file.pt"))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_torch_on_a_full_disk_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="could not be written"), replacing(tmp_path / "file.pt"):
        torch.save({"a": torch.zeros(10**5)}, "/dev/full")


# -- trainings ---------------------------------------------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def batches(size=4, samples=16):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(samples, 1, 6, 6, generator=generator)
    return list(zip(images.split(size), (torch.arange(samples) % 3).split(size), strict=True))


def loader_of(size, samples=16, seed=None):
    images, labels = zip(*batches(1, samples), strict=True)
    data = [(image[0], int(label)) for image, label in zip(images, labels, strict=True)]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data, size, shuffle=True, generator=generator)


def weights(network):
    return torch.cat([value.double().flatten() for value in network.state_dict().values()])


@pytest.mark.parametrize("options", [{"lr": np.float64(1e-3)}, {"lr": np.float32(1e-3)}, {"seed": np.int64(3)}])
def test_numbers_of_numpy_go_through_the_checkpoint_of_recover(options, tmp_path):
    for epochs in (1, 2):
        resumed = recover(net(), batches(), epochs, checkpoint=tmp_path / "c.pt", **options)
    plain = {name: value.item() for name, value in options.items()}
    assert torch.equal(weights(resumed), weights(recover(net(), batches(), 2, **plain)))


def own_optimizer(network, gate, number):
    groups = [{"params": network.parameters(), "momentum": number(0.5)}, gate.parameter_group(number(0.1))]
    optimizer = torch.optim.SGD(groups, lr=number(0.1))
    inner = [torch.optim.lr_scheduler.LinearLR(optimizer, number(0.5), total_iters=3) for _ in range(2)]
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, inner, [2])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [np.float64, np.float32])
def test_numbers_of_numpy_go_through_the_checkpoint_of_fit(number, tmp_path):
    def fit(epochs, path, number):
        network = net()
        gate = started_gate(3, 4, seed=2)
        optimizer, scheduler = own_optimizer(network, gate, number)
        schedule, penalty = GateSchedule(np.int64(3), warmup=np.int32(0)), GatePenalty(sparsity=number(0.25))
        training = LabelSensitiveTraining(network, gate, schedule=schedule, penalty=penalty, weight=number(1))
        training.fit(batches(), epochs, optimizer=optimizer, scheduler=scheduler, checkpoint=path)
        return torch.cat([weights(network), weights(gate)])

    fit(2, tmp_path / "c.pt", number)
    resumed = fit(4, tmp_path / "c.pt", number)
    torch.testing.assert_close(resumed, fit(4, tmp_path / "other.pt", number), rtol=0, atol=0)


class Nothing(Task):
    def loss(self, inputs, labels, epoch, place):
        return inputs[0].sum()


def test_what_no_checkpoint_can_keep_is_refused_at_once(tmp_path):
    network = net()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    optimizer.param_groups[0]["note"] = np.zeros(3)
    with pytest.raises(OptionError, match="holds what no checkpoint can keep"):
        Training(network, Nothing(), [optimizer], checkpoint=Checkpoint(tmp_path / "c.pt"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [RuntimeError("unexpected pos 64 vs 0"), OSError(28, "no space left"), ValueError()])
def test_ctrl_c_on_a_full_disk_keeps_the_trained_network(error, tmp_path, monkeypatch):
    def full(state, file):
        raise error

    def interrupted():
        yield batches()[0]
        monkeypatch.setattr(torch, "save", full)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        recover(net(), interrupted(), 1, checkpoint=tmp_path / "c.pt")
    assert not torch.equal(weights(caught.value.partial_result), weights(net()))


def test_a_second_ctrl_c_while_saving_keeps_the_trained_network(tmp_path, monkeypatch):
    def twice(state, file):
        raise KeyboardInterrupt

    def interrupted():
        yield batches()[0]
        monkeypatch.setattr(torch, "save", twice)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        recover(net(), interrupted(), 1, checkpoint=tmp_path / "c.pt")
    assert not torch.equal(weights(caught.value.partial_result), weights(net()))


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (lambda: loader_of(4), lambda: loader_of(8), "batch_size was 4, is 8"),
        (lambda: loader_of(4), lambda: loader_of(4, seed=1), "has 1 generators"),
    ],
)
def test_another_loader_is_refused(first, second, what, tmp_path):
    recover(net(), first(), 1, checkpoint=tmp_path / "c.pt")
    with pytest.raises(FileFormatError, match=what):
        recover(net(), second(), 2, checkpoint=tmp_path / "c.pt")


def test_the_loader_s_own_generator_goes_on_from_where_it_was(tmp_path):
    recover(net(), loader_of(4, seed=1), 1, checkpoint=tmp_path / "c.pt")
    resumed = recover(net(), loader_of(4, seed=99), 2, checkpoint=tmp_path / "c.pt")
    assert torch.equal(weights(resumed), weights(recover(net(), loader_of(4, seed=1), 2)))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["ranks"][0]["latest"].update(numpy=None),
        lambda state: state["ranks"][0].update(samples="y" * 10**6),
        lambda state: state["options"].update(period="y" * 10**6),
        lambda state: state.update(kind="y" * 10**6),
        lambda state: state["network"].update({"y" * 10**6: torch.zeros(1)}),
        lambda state: state.update(epoch=-1),
    ],
)
def test_a_refused_checkpoint_changes_nothing_and_says_little(change, tmp_path):
    def make():
        network, gate = net(), started_gate(3, 4, seed=2)
        return network, gate, LabelSensitiveTraining(network, gate)

    make()[2].fit(batches(), 2, checkpoint=tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "c.pt")
    network, gate, training = make()
    # other states than those of the checkpoint
    torch.manual_seed(123)
    before = [*get_random(torch.device("cpu"), None).values(), weights(network), weights(gate), gate.layer]
    with pytest.raises(FileFormatError, match="is not a whole checkpoint") as caught:
        training.fit(batches(), 2, checkpoint=tmp_path / "c.pt")
    assert len(str(caught.value)) < 1200 + len(str(tmp_path))
    after = [*get_random(torch.device("cpu"), None).values(), weights(network), weights(gate), gate.layer]
    assert repr(before) == repr(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if isinstance(a, torch.Tensor))


def test_changed_checkpoints_are_refused_shortly_or_work(tmp_path):
    path, draw, messages = tmp_path / "c.pt", random.Random(19), []
    recover(net(), batches(), 1, checkpoint=path)
    whole = path.read_bytes()
    for _ in range(60):
        raw = bytearray(whole)
        for _ in range(draw.choice([1, 4, 30])):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        path.write_bytes(raw[: draw.choice([len(raw), draw.randrange(len(raw))])])
        try:
            recover(net(), batches(), 1, checkpoint=path)
        except ClassFiltersError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert max(map(len, messages)) < 1500 + len(str(path))
