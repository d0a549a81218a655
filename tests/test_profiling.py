"""The predicted timeline has a GPU's own times, or the length of what was measured; MFU is where the GPU is known."""

import json
from types import SimpleNamespace

import jax
import pytest

from vocabpp_jax import schedules
from vocabpp_jax.runtime import hardware, profiling
from vocabpp_jax.schedules.simulation.cost import Sizes

SIZES = Sizes(layers=8, hidden=256, seq=128, vocab_size=1000)
A100, H100 = SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB"), SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")


def end(trace):
    return max(event["ts"] + event.get("dur", 0) for event in json.loads(trace)["traceEvents"] if event["ph"] == "X")


def test_gpus_are_known_by_a_word_of_their_kind():
    assert hardware.known_gpu(A100).name == "A100-80G" and hardware.known_gpu(H100).peak_flops > 9e14
    assert hardware.known_gpu(jax.devices()[0]) is None
    assert hardware.known_gpu(SimpleNamespace(device_kind="NVIDIA B100x")) is None


def test_mfu_is_flops_over_what_the_devices_could_do():
    assert hardware.mfu(312e12, 2.0, [A100, A100]) == pytest.approx(0.25)
    assert hardware.mfu(312e12, 2.0, jax.devices()) is None and hardware.peak_memory() is None


def test_a_prediction_is_as_long_as_the_gpu_takes_or_as_was_measured():
    schedule = schedules.build("1f1b", "vocab-2", p=4, m=8)
    known, other = (profiling.predicted_trace(schedule, SIZES, device, 0.5) for device in (A100, jax.devices()[0]))
    assert end(other) == pytest.approx(0.5e6, rel=1e-6) and end(known) != pytest.approx(0.5e6, rel=1e-2)
    assert "cpu is not known" in json.loads(other)["metadata"]["predicted"]


def test_the_trace_is_of_the_steps_asked_for(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with profiling.Profile(tmp_path / "profile", steps=2, after=1) as profile:
        for step in range(5):
            with profile.before(step):
                calls.append(step)
            assert profile.ended() == (step == 2)
    assert calls == [0, "start", 1, 2, "stop", 3, 4]
