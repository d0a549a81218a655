"""A trace of a few steps, and the simulator's predicted timeline to compare it with."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

import jax

from ..schedules import lower, simulate
from ..schedules.schedule import Schedule
from ..schedules.simulation import formats
from ..schedules.simulation.cost import GPU, Cost, Sizes, load_gpu
from .hardware import known_gpu

STANDIN = "a100-80g"
"""The GPU whose relative pass times stand in for unknown hardware."""


class Profile:
    """Traces ``steps`` steps into a folder, starting after ``after`` steps of this process: the first ones compile.

    Inside the block, call :meth:`before` and :meth:`ended` around every step. The folder gets ``plugins/profile/...``
    with a trace for ui.perfetto.dev and TensorBoard.
    """

    def __init__(self, folder: Path, steps: int | None, after: int = 3):
        self.folder, self._steps, self._after = folder, steps or 0, after
        self._seen, self._on = 0, False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._on:
            self._on = False
            jax.profiler.stop_trace()

    def before(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """The context to run the step in."""
        self._seen += 1
        if self._steps and self._seen == self._after + 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
            self._on = True
        return jax.profiler.StepTraceAnnotation("step", step_num=step)

    def ended(self) -> bool:
        """Call when a step has ended and its results are ready; True if the trace has just been written."""
        if not (self._on and self._seen == self._after + self._steps):
            return False
        self._on = False
        jax.profiler.stop_trace()
        return True


def predicted_trace(schedule: Schedule, sizes: Sizes, device: jax.Device, step_seconds: float | None = None) -> str:
    """The predicted timeline of one iteration, as a trace for ui.perfetto.dev.

    Pass times are the cost model's for the GPU. For unknown hardware, the times of :data:`STANDIN` are scaled so that
    the total is ``step_seconds``; the trace says so in ``metadata``.
    """
    known = known_gpu(device)
    gpu: GPU = known or load_gpu(STANDIN)
    durations = Cost(sizes, gpu).durations(schedule)
    timeline = simulate(lower(schedule), durations)
    scale = 1.0 if known or not step_seconds else step_seconds / timeline.makespan
    trace = json.loads(formats.to_trace(timeline, microseconds=1e6 * scale))
    measured = "" if known else f"; {device.device_kind} is not known: its pass times are scaled to the measured step"
    trace["metadata"] = {"predicted": f"{schedule.name} {schedule.method} on {gpu.name}{measured}"}
    return json.dumps(trace)
