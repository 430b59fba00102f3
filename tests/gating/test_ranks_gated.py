"""Two real processes over gloo train a network and its gate as one does that sees everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gated_workers import SCHEMES, steps
from gating_loop import assert_states_equal

import captum_classfilters

WORKERS = Path(__file__).with_name("gated_workers.py")
RANKS = (0, 1)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two ranks under torchrun found."""
    folder = tmp_path_factory.mktemp("gated_ranks")
    root = str(Path(captum_classfilters.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(WORKERS), "ranks", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in RANKS]


@pytest.mark.parametrize("accumulated", ["", ", micro"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_agree_and_do_what_one_process_does_with_everything(scheme, accumulated, results):
    first, second = (found[scheme + accumulated] for found in results)
    assert_states_equal(second, first)
    alone, begun = steps(scheme), steps("plain")["gate"]
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone["gate"], begun) == (scheme == "plain")


def test_ranks_that_begin_with_different_gates_have_rank_0_s(results):
    first, second = (found["gates differ"] for found in results)
    assert_states_equal(second, first)
    torch.testing.assert_close(first["gate"], steps("gated")["gate"], rtol=1e-5, atol=1e-5)
    assert float((steps("gated", gate_seed=1)["gate"] - first["gate"]).abs().max()) > 0.1


@pytest.mark.parametrize("rank", RANKS)
def test_nan_on_one_rank_stops_both(rank, results):
    for epoch, message in enumerate(results[rank]["nan"]):
        told = "the loss is nan" if rank else "the loss of another rank is NaN or infinite"
        assert f"{told} in epoch {epoch}, step 0; no step was taken" in message


@pytest.mark.parametrize("rank", RANKS)
def test_a_resumed_fit_is_an_unbroken_one_on_every_rank(rank, results):
    assert results[rank]["at the stop"] == 2
    expected, found = results[rank]["unbroken"], results[rank]["resumed"]
    assert_states_equal(found["network"], expected["network"])
    assert_states_equal(found["gate"], expected["gate"])
    assert found["history"] == expected["history"]
    assert len(found["history"]) == 4
    assert torch.equal(found["draw"], expected["draw"])


def test_ranks_draw_numbers_of_their_own_and_share_the_gate(results):
    first, second = (found["resumed"] for found in results)
    assert torch.equal(first["gate"]["weight"], second["gate"]["weight"])
    assert not torch.equal(first["draw"], second["draw"])


@pytest.mark.parametrize("rank", RANKS)
def test_a_checkpoint_that_some_ranks_do_not_see_is_refused_by_all(rank, results):
    message = results[rank]["not shared"]
    assert message.startswith("FileFormatError: ")
    assert "only ranks [1] of 2 see" in message
    assert "put it where all of them can read it" in message
