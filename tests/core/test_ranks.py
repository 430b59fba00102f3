"""Two real processes over gloo find together what one finds alone, and none waits for the dead."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_workers import K1S, SELECTORS, batches, model, shard

import captum_classfilters
from captum_classfilters import ClassFilters, HeadMoments, InfluentialFeatures
from captum_classfilters.core.errors import OptionError

WORKERS = Path(__file__).with_name("rank_workers.py")
RANKS = (0, 1)


def environment(**more):
    root = str(Path(captum_classfilters.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder into which two ranks under torchrun wrote all they found."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(WORKERS), "main", str(folder)], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def method():
    return InfluentialFeatures(model())


def assert_same_tables(actual, expected):
    for name in ("scores", "mass", "counts"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0)
    assert torch.equal(actual.top(3), expected.top(3))
    for name in ("method", "layer", "class_names", "meta"):
        assert getattr(actual, name) == getattr(expected, name)


def assert_same_moments(actual, expected):
    for name in ("total", "second"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=0)
    assert (actual.count, actual.layer) == (expected.count, expected.layer)


def table(results, name, rank):
    return ClassFilters.load(results / f"{name} {rank}.safetensors")


def moments(results, name, rank):
    return HeadMoments.load(results / f"{name} {rank}.safetensors")


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_has_the_tables_of_one_pass_over_everything(rank, results, method):
    for name, expected in method.attribute(batches(), selector=SELECTORS).items():
        assert_same_tables(table(results, name, rank), expected)
    for k1, expected in method.attribute(batches(), k1=K1S).items():
        assert_same_tables(table(results, f"k1={k1}", rank), expected)
    assert_same_moments(moments(results, "moments", rank), HeadMoments.collect(model(), batches()))


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_without_samples_gets_the_tables_of_the_others(rank, results, method):
    assert_same_tables(table(results, "empty shard", rank), method.attribute(batches()))
    signed = method.attribute(batches(), selector="weight", importance="signed")
    assert_same_tables(table(results, "empty shard, static", rank), signed)
    assert_same_moments(moments(results, "empty shard, moments", rank), HeadMoments.collect(model(), batches()))


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_may_stay_by_itself(rank, results, method):
    for name in ("local", "own group"):
        assert_same_tables(table(results, name, rank), method.attribute(shard(rank)))
    assert_same_moments(moments(results, "local moments", rank), HeadMoments.collect(model(), shard(rank)))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["both empty", "both empty, moments"])
def test_without_any_sample_all_ranks_say_so(name, rank, results):
    kind, message = (results / f"{name} {rank}.txt").read_text().split("\n")
    assert kind == "EmptyLoaderError"
    assert "the loaders of all ranks gave no sample" in message
    assert not (results / f"{name} {rank}.safetensors").exists()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("k1 differs", "'k1': 2"),
        ("number of tables differs", "margin"),
        ("names differ", "('a', 'b', 'c', 'e')"),
        ("weights differ", "'weight'"),
        ("heads differ", "(7, 7)"),
    ],
)
def test_ranks_that_differ_are_refused_everywhere_and_keep_their_own(name, told, rank, results, method):
    kind, message = (results / f"{name} {rank}.txt").read_text().split("\n")
    assert kind == "MergeError"
    assert "the ranks do not pass over the same network with the same options: rank 1 has" in message
    assert told in message
    if name == "heads differ":
        assert moments(results, name, rank).num_features == 6 + rank
    else:
        own = table(results, name, rank)
        assert torch.equal(own.counts, method.attribute(shard(rank)).counts)


@pytest.mark.parametrize("rank", RANKS)
def test_what_was_stopped_and_resumed_on_all_ranks_is_one_pass(rank, results, method):
    assert_same_tables(table(results, "resumed", rank), method.attribute(batches()))


def test_a_rank_that_dies_ends_the_other_with_what_it_found(tmp_path, method):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKERS), "dying", str(tmp_path)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in RANKS
    ]
    try:
        codes = [process.wait(timeout=180) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 1]
    waited, message = (tmp_path / "error.txt").read_text().split("\n", 1)
    assert float(waited) < 60
    assert "another rank ended early or did not come in time" in message
    assert "save it, pass over the lost shard again, and merge the two" in message
    partial = ClassFilters.load(tmp_path / "partial.safetensors")
    assert_same_tables(partial, method.attribute(shard(0)))
    assert_same_tables(ClassFilters.merge(partial, method.attribute(shard(1))), method.attribute(batches()))


@pytest.mark.parametrize(
    ("asked", "message"),
    [(True, "torch.distributed has not been started; call init_process_group first"), ("gloo", "got str")],
)
def test_ranks_that_are_not_there_are_refused_before_the_pass(asked, message, method):
    loader = iter(batches())
    for call in (
        lambda: method.attribute(loader, distributed=asked),
        lambda: HeadMoments.collect(model(), loader, distributed=asked),
    ):
        with pytest.raises(OptionError, match=message):
            call()
    assert len(list(loader)) == len(batches())
