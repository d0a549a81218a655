"""Steps that are not finite change nothing and are counted; signals, hangs and deaths end in a sentence."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
from test_canonical import KEY, batch, setup

from vocabpp_jax import train
from vocabpp_jax.runtime import faults


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    pipe, _, _ = setup("1f1b", "baseline", 1)
    optimizer = optax.adamw(1e-2)
    state, step = train.init_state(pipe, optimizer, KEY), train.make_step(pipe, optimizer)
    state, _ = step(state, batch(0))
    before = jax.device_get((state.params, state.optimizer))
    good = batch(1)
    for times, mask in enumerate((np.nan, np.inf), start=1):
        state, measured = step(state, good | {"mask": np.full(good["tokens"].shape, mask, np.float32)})
        assert not np.isfinite(float(measured["loss"])) and int(measured["skipped"]) == times == int(state.skipped)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.optimizer)), before)
    state, measured = step(state, good | {"mask": np.ones(good["tokens"].shape, np.float32)})
    assert int(state.step) == 4 and int(state.skipped) == 2 and np.isfinite(float(measured["loss"]))
    assert not np.array_equal(state.params["embed"]["tokens"], before[0]["embed"]["tokens"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with faults.Termination() as termination:
        assert termination.requested(1) is None
        os.kill(os.getpid(), number)
        assert termination.requested(2) == number.name
    assert signal.getsignal(number) is before


def run(body):
    """A process of its own, which does not need JAX's devices."""
    code = f"import time, os, signal\nfrom vocabpp_jax.runtime import faults\n{body}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_a_second_signal_ends_the_process():
    ended = run("with faults.Termination():\n for _ in 'ab': os.kill(os.getpid(), signal.SIGTERM)\n print('alive')")
    assert ended.returncode == -signal.SIGTERM and not ended.stdout


def test_a_hang_ends_in_a_sentence_and_progress_does_not():
    start = time.monotonic()
    ended = run(
        "with faults.Watchdog(0.6) as watchdog:\n"
        " for step in range(8): time.sleep(0.2); watchdog.alive(step)\n"
        " print('going', flush=True)\n time.sleep(100)"
    )
    assert ended.returncode == 1 and ended.stdout == "going\n" and time.monotonic() - start < 60
    assert ended.stderr.startswith("error: no step has ended for 0.6 seconds after step 7;")


def test_last_words_are_said_by_those_who_are_killed_only():
    killed = run("with faults.LastWords('it is over'): os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL and killed.stderr == "error: it is over\n"
    assert run("with faults.LastWords('it is over'): pass").stderr == ""
    assert "it is over" not in run("with faults.LastWords('it is over'): raise KeyError").stderr


@pytest.mark.parametrize(
    "problem, expected",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError('OUT_OF_RANGE: "/a/b": Failed to write: No space left [os_error_code=28]'), "No space left"),
        (RuntimeError("first line\nsecond"), "first line"),
        (KeyError(), "KeyError"),
    ],
)
def test_reasons_are_short(problem, expected):
    assert faults.reason(problem) == expected


def test_a_lost_peer_is_recognised_by_what_caused_the_error(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def caused_by(cause):
        try:
            raise faults.Stop("a checkpoint cannot be written to /data/gloo") from cause
        except faults.Stop as problem:
            return faults.lost_peer(problem)

    said = caused_by(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nmore"))
    assert said == "process 0 of 2: another process is gone (UNKNOWN: Gloo AllGather failed: Connection reset by peer)"
    assert caused_by(ConnectionResetError(104, "Connection reset by peer")) is not None
    assert caused_by(OSError(28, "No space left on device", "/data/gloo/1")) is None
    assert caused_by(KeyError("n")) is None
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert caused_by(ConnectionResetError(104, "Connection reset by peer")) is None  # no peer that could be lost


NCCL = "INTERNAL: NCCL operation ncclCommInitRankConfig(&comm, nranks, comm_id, rank, &config) failed: {} (run with "
NCCL += "NCCL_DEBUG=WARN for details). Last NCCL warning(error) log entry (may be unrelated) '{}'."


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (NCCL.format("unhandled cuda error", "Cuda failure 2 'out of memory'"), "memory of NCCL"),
        (NCCL.format("unhandled cuda error", "Failed to CUDA calloc 536870912 bytes"), "memory of NCCL"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.", "memory"),
        ("INTERNAL: CUDA error: Failed to allocate 4 GiB: CUDA_ERROR_OUT_OF_MEMORY: out of memory", "memory"),
        (NCCL.format("unhandled cuda error", "Cuda failure 700 'an illegal memory access'"), None),
        (NCCL.format("invalid usage", "Duplicate GPU detected"), None),
        (NCCL.format("remote process exited or there was a network error", "socketProgress: closed"), "peer"),
        (NCCL.format("unhandled system error", "socketPollConnect: connect returned"), "peer"),
        ("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [10.0.0.2]:4321", "peer"),
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)", "peer"),
        ("INVALID_ARGUMENT: shapes do not match", None),
    ],
)
def test_an_error_says_whether_memory_another_process_or_neither_is_gone(monkeypatch, problem, kind):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    memory, peer = faults.out_of_memory(RuntimeError(problem)), faults.lost_peer(RuntimeError(problem))
    assert bool(memory) == (kind or "").startswith("memory") and bool(peer) == (kind == "peer")
    if memory:
        assert memory.startswith("process 0 of 2: a device is out of memory (") and "\n" not in memory
        assert ("XLA_PYTHON_CLIENT_MEM_FRACTION" in memory) == kind.endswith("NCCL")


def test_a_watchdog_without_a_limit_watches_nothing_and_a_wrong_limit_is_refused():
    with faults.Watchdog(None):
        pass
    with pytest.raises(ValueError, match="hang_timeout is 0"):
        faults.Watchdog(0)
