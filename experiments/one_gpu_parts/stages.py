"""The real train step of every stage, one after the other, on a single GPU: time and memory without the collectives,
which a mocked topology skips.

Every stage runs in its own process, so that the allocator's peak is that stage's. The first compiles the program for
all of them, if jax's compilation cache can hold it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import mock
from .command_buffers import command_buffers
from .gpu_sizes import Size
from .results import Results

_STARTS, _ENDS = 25.0, 90.0  # minimum and maximum seconds per stage, process start and compilation included


def measure(size: Size, results: Results) -> None:
    """Run every stage of every method. Without a GPU, use simulated devices, which do communicate."""
    row = size.stage_row
    order = size.stages or (row.p - 1, 0, *range(1, row.p - 1))
    wanted = [(method, stage, "default") for stage in order for method in size.stage_methods]
    if size.name == "whole":
        wanted.insert(2, ("vocab-2", order[0], "loops"))
    for method, stage, buffers in wanted:
        case = {
            "model": row.model,
            "p": row.p,
            "seq": row.sequences[0],
            "vocab_size": row.vocabularies[-1],
            "method": method,
            "microbatches": size.stage_microbatches,
            "stage": stage,
            "command_buffers": buffers,
            "repeats": size.repeats,
        }
        name = f"{method}, stage {stage}" + (f", command buffers {buffers}" if buffers != "default" else "")
        results.case(name, lambda c=case: _in_a_process(c, results), needs=_STARTS if size.name != "tiny" else 0)
    results.done()


def _in_a_process(case: dict[str, Any], results: Results) -> dict[str, Any]:
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "one_gpu_parts.stages", json.dumps(case)]
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=min(_ENDS, max(1.0, results.left)),
    )
    if done.returncode:
        raise RuntimeError(f"stage {case['stage']} ended with status {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_stage(case: dict[str, Any]) -> dict[str, Any]:
    """Compile and time the step of one stage in this process."""
    began = time.monotonic()
    mesh = _mesh(case["p"], case["stage"])
    import jax

    from .timing import steps

    pipe, optimizer = build(case, mesh)
    at = time.monotonic()
    lowered, place = lower_step(pipe, optimizer, case["seq"])
    buffers = command_buffers(case["command_buffers"]) if jax.default_backend() == "gpu" else {}
    program = lowered.compile(compiler_options=buffers)
    compile_s = time.monotonic() - at
    held, batch = _data(pipe, optimizer, case, place)
    before = _peak()

    def step() -> Any:
        nonlocal held
        held, metrics = program(held, batch)
        return metrics["loss"]

    seconds = steps(step, case["repeats"])
    memory, segments = program.memory_analysis(), pipe.program.segments
    mine = [n for n, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    return case | {
        "mocked": jax.default_backend() == "gpu",
        "device_index": mine,
        "step_ms": [1e3 * s for s in seconds],
        "allocator_peak_bytes": _peak(),
        "allocator_peak_before_step_bytes": before,
        "compiler_peak_bytes": memory.peak_memory_in_bytes or None,  # lost for a program from the cache
        "compiler_temp_bytes": memory.temp_size_in_bytes,
        "compiler_argument_bytes": memory.argument_size_in_bytes,
        "compile_s": compile_s,
        "process_s": time.monotonic() - began,
        "runs": {
            "intervals": sum(segment.intervals for segment in segments),
            "instructions": sum(s.intervals * sum(i.op == "run" for i in s.body) for s in segments),
        },
    }


def _mesh(p: int, stage: int) -> Any:
    """A mesh of p devices: simulated on a CPU, otherwise the one GPU as number ``stage`` of p. Call this before jax is
    asked for a device."""
    import jax

    if os.environ.get("JAX_PLATFORMS") != "cpu":
        mock.pretend(p, stage)
        if jax.default_backend() != "gpu":
            raise ValueError("there is no GPU; set JAX_PLATFORMS=cpu to run the stages on simulated devices")
    elif "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", p)
    from vocabpp_jax import make_mesh

    return make_mesh(p, devices=sorted(jax.devices(), key=lambda device: device.id)[:p])


def build(case: dict[str, Any], mesh: Any) -> tuple[Any, Any]:
    """The pipeline of a case, and its optimizer."""
    from vocabpp_jax import Pipeline, models, schedules
    from vocabpp_jax.training import adamw

    from .gpu_sizes import as_run_on

    config = models.named(case["model"], seq=case["seq"], vocab_size=case["vocab_size"])
    config = as_run_on(mesh.devices.flat[0], config)
    schedule = schedules.build("1f1b", case["method"], p=case["p"], m=case["microbatches"])
    pipe = Pipeline(models.build(config), schedule, mesh, compute_dtype=config.dtype)
    return pipe, adamw(1e-4, 1000, 100)


def lower_step(pipe: Any, optimizer: Any, seq: int) -> tuple[Any, Any]:
    """The lowered train step, and the shardings of its state."""
    import jax

    from vocabpp_jax import train

    place = train.shardings(pipe, optimizer)
    shape = (pipe.schedule.m, 1, seq)
    tokens = {name: jax.ShapeDtypeStruct(shape, "int32", sharding=place.step) for name in ("tokens", "labels")}
    shapes = train.shapes(pipe, optimizer)
    given = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, place)
    return train.make_step(pipe, optimizer).lower(given, tokens), place


def _data(pipe: Any, optimizer: Any, case: dict[str, Any], place: Any) -> tuple[Any, Any]:
    """A pseudo-random state and batch, created in place: nothing can be sent to a device that is not there."""
    import jax

    from vocabpp_jax import train

    from .timing import ids, noise

    def state() -> Any:
        made = noise(train.shapes(pipe, optimizer))
        return jax.tree.map(lambda x: abs(x) if x.ndim else x, made)  # second moments are not negative

    def batch() -> dict[str, Any]:
        shape = (pipe.schedule.m, 1, case["seq"])
        return {name: ids(shape, case["vocab_size"], n) for n, name in enumerate(("tokens", "labels"))}

    return jax.block_until_ready((jax.jit(state, out_shardings=place)(), jax.jit(batch, out_shardings=place.step)()))


def _peak() -> int | None:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    print(json.dumps(run_stage(json.loads(sys.argv[1]))))
