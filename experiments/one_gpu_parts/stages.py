"""The real train step of every stage, one after the other, on the one GPU there is: time and memory without the
collectives, which a mocked topology skips.

Every stage runs in a process of its own, so that the allocator's peak is that stage's. The first compiles the program
for all of them, where jax's compilation cache can hold it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .results import Results
from .sizes import Size

_STARTS, _ENDS = 25.0, 90.0  # seconds that a stage needs at least, process and compilation included, and at most


def measure(size: Size, results: Results) -> None:
    """Run every stage of every method. Where there is no GPU, on simulated devices, which do communicate."""
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
    import jax

    from . import mock

    p, stage = case["p"], case["stage"]
    began = time.monotonic()
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_num_cpu_devices", p)
    else:
        mock.pretend(p, stage)

    from vocabpp_jax import Pipeline, make_mesh, models, schedules, train
    from vocabpp_jax.training.optimizer import adamw

    from .command_buffers import command_buffers
    from .timing import ids, noise, steps

    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise ValueError("there is no GPU; set JAX_PLATFORMS=cpu to run the stages on simulated devices")
    config = models.named(case["model"], seq=case["seq"], vocab_size=case["vocab_size"])
    config = dataclasses.replace(config, attention="cudnn" if on_gpu and config.fits_cudnn else "xla")
    schedule = schedules.build("1f1b", case["method"], p=p, m=case["microbatches"])
    mesh = make_mesh(p, devices=sorted(jax.devices(), key=lambda device: device.id)[:p])
    pipe = Pipeline(models.build(config), schedule, mesh, compute_dtype=config.dtype)
    optimizer = adamw(1e-4, 1000, 100, decay_mask=lambda _: pipe.layout.matrices())
    shape, everywhere = (schedule.m, 1, config.seq), train.shardings(pipe, optimizer).step

    def state() -> train.State:
        made = noise(train.shapes(pipe, optimizer))
        return jax.tree.map(lambda x: abs(x) if x.ndim else x, made)  # second moments are not negative

    place = train.shardings(pipe, optimizer)
    tokens = {name: jax.ShapeDtypeStruct(shape, "int32", sharding=everywhere) for name in ("tokens", "labels")}
    given = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), train.shapes(pipe, optimizer), place
    )
    at = time.monotonic()
    lowered = train.make_step(pipe, optimizer).lower(given, tokens)
    program = lowered.compile(compiler_options=command_buffers(case["command_buffers"]) if on_gpu else None)
    compile_s = time.monotonic() - at
    made = jax.jit(state, out_shardings=place)()
    batch = jax.jit(
        lambda: {name: ids(shape, config.vocab_size, n) for n, name in enumerate(tokens)}, out_shardings=everywhere
    )()
    jax.block_until_ready((made, batch))
    before = _peak(mesh)
    held = [made]

    def step() -> Any:
        held[0], metrics = program(held[0], batch)
        return metrics["loss"]

    seconds = steps(step, case["repeats"])
    memory = program.memory_analysis()
    mine = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return case | {
        "mocked": on_gpu,
        "device_index": [int(i) for i, d in enumerate(mesh.devices.flat) if d in mine],
        "step_ms": [1e3 * s for s in seconds],
        "allocator_peak_bytes": _peak(mesh),
        "allocator_peak_before_step_bytes": before,
        "compiler_peak_bytes": memory.peak_memory_in_bytes or None,  # a program from the cache has lost it
        "compiler_temp_bytes": memory.temp_size_in_bytes,
        "compiler_argument_bytes": memory.argument_size_in_bytes,
        "compile_s": compile_s,
        "process_s": time.monotonic() - began,
        "runs": {
            "intervals": sum(segment.intervals for segment in pipe.program.segments),
            "instructions": sum(
                segment.intervals * sum(i.op == "run" for i in segment.body) for segment in pipe.program.segments
            ),
        },
    }


def _peak(mesh: Any) -> int | None:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    print(json.dumps(run_stage(json.loads(sys.argv[1]))))
