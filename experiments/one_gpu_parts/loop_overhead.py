"""The executor's overhead over a plain step on a GPU, and the effect of command buffers on it.

Every pass is inside a loop of zero or one trips whose predicate the host reads. ``loops`` times only that: a scan with
many such loops per interval around next to no work. ``steps`` times real steps of one stage next to a plain
gradient-accumulation step of the same model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from comparators import COMPARATORS, EVEN_SHARE
from comparators.contender import Contender, Ours
from vocabpp_jax import Pipeline, make_mesh, models, schedules
from vocabpp_jax.models import GPTConfig
from vocabpp_jax.pipeline.buffers import run_if
from vocabpp_jax.pipeline.flags import compiler_options
from vocabpp_jax.pipeline.mesh import GPU_PLATFORMS

from .command_buffers import SETTINGS, command_buffers
from .gpu_sizes import Size, as_run_on
from .results import Results
from .timing import Compiler, ids, in_turns, middle, noise, seconds, steps

PLAIN = "plain step"
INTERVALS, MANY = 100, 13  # intervals of the scan that has only loops, and loops per interval; compared with one loop


def measure(size: Size, results: Results) -> None:
    """Time the loops alone, then steps. Everything is compiled first, since compiling disturbs timing."""
    settings = list(SETTINGS) if jax.default_backend() == "gpu" else ["default"]
    with Compiler() as compiler:
        loops = {
            (name, count): compiler.submit(lambda s=name, n=count: _loops(n, s))
            for name in settings
            for count in (1, MANY)
        }
        wanted = [(step, name) for step in size.steps for name in contenders(settings)]
        compiling = {
            (s[0], name): compiler.submit(lambda s=s, n=name: compiled_step(*s[1:], n, jax.devices()[0]))
            for s, name in wanted
        }
        wait([*loops.values(), *compiling.values()], max(1.0, results.left - 10))
        for name in settings:
            few, many = loops[name, 1], loops[name, MANY]
            results.case(f"loops, command buffers {name}", lambda f=few, m=many, n=name: _alone(f, m, n, size.repeats))
        for step in size.steps:
            mine = {name: compiling[step[0], name] for name in contenders(settings)}
            results.case(f"steps, {step[0]}", lambda s=step, c=mine: _steps(s, c, size.repeats, results), needs=5)
        for step in size.steps if "loops" in settings else ():
            name = f"steps, {step[0]}, command buffers loops"
            results.case(name, lambda s=step: _in_a_process(s, size.repeats, results), needs=15)
    results.done()


# --- loops alone -----------------------------------------------------------------------------------------------------


def _loops(count: int, setting: str) -> Any:
    """``table [intervals, count] -> number``: every interval enters the loops whose entry is not negative."""

    def interval(state: dict, row: jax.Array) -> tuple[dict, None]:
        for k in range(count):
            state = run_if(row[k] >= 0, state, ("x",), lambda s: s | {"x": s["x"] * 1.0001 + 1})
        return state, None

    def run(table: jax.Array) -> jax.Array:
        state = {"clock": jnp.zeros((), jnp.int32), "x": jnp.zeros((8, 128), jnp.float32)}
        return lax.scan(interval, state, table)[0]["x"].sum()

    shape = jax.ShapeDtypeStruct((INTERVALS, count), jnp.int32)
    return jax.jit(run, compiler_options=command_buffers(setting)).lower(shape).compile()


def _alone(few: Any, many: Any, name: str, repeats: int) -> dict[str, Any]:
    """Microseconds that one more loop adds to an interval, entered and not entered."""
    (one, _), (several, _) = few.result(1), many.result(1)
    found: dict[str, Any] = {"kind": "loops", "command_buffers": name}
    for what, entry in (("skipped_us", -1), ("entered_us", 0)):
        tables = [jnp.full((INTERVALS, n), entry, jnp.int32) for n in (1, MANY)]
        a = middle(steps(lambda t=tables[0]: one(t), 3 * repeats))
        b = middle(steps(lambda t=tables[1]: several(t), 3 * repeats))
        found[what] = 1e6 * (b - a) / (INTERVALS * (MANY - 1))
        found[what.replace("us", "interval_of_one_us")] = 1e6 * a / INTERVALS
    return found


# --- steps -----------------------------------------------------------------------------------------------------------


def contenders(settings: list[str]) -> list[str]:
    """The plain step, and pipelines by method and command buffers."""
    return [PLAIN, "baseline, default", *(f"vocab-2, {name}" for name in settings)]


def compiled_step(shape: dict[str, int], m: int, name: str, device: jax.Device) -> tuple[Contender, Any, int]:
    """A contender, its compiled loss and gradients, and the number of pass instructions in a step."""
    mesh = make_mesh(1, devices=[device])
    dtype = "bfloat16" if device.platform in GPU_PLATFORMS else "float32"
    model = models.build(as_run_on(device, GPTConfig(**shape, dtype=dtype)))
    count, options = 0, {}
    if name == PLAIN:
        contender: Contender = COMPARATORS[EVEN_SHARE](model, mesh, m, dtype)
    else:
        method, _, setting = name.partition(", ")
        pipe = Pipeline(model, schedules.build("1f1b", method, p=1, m=m), mesh, compute_dtype=dtype)
        contender = Ours(pipe)
        options = compiler_options(mesh) | command_buffers(setting)
        count = sum(s.intervals * sum(i.op == "run" for i in s.body) for s in pipe.program.segments)
    shapes = jax.eval_shape(contender.pack, model.param_shapes())
    tokens = jax.ShapeDtypeStruct((m, 1, shape["seq"]), jnp.int32)
    run = jax.jit(contender.value_and_grad, compiler_options=options)
    return contender, run.lower(shapes, {"tokens": tokens, "labels": tokens}).compile(), count


def _runner(contender: Contender, program: Any, shape: dict[str, int], m: int) -> Callable[[], Any]:
    model = contender.pipe.model if isinstance(contender, Ours) else contender.model
    params = jax.jit(lambda: noise(jax.eval_shape(contender.pack, model.param_shapes())))()
    batch = {name: ids((m, 1, shape["seq"]), shape["vocab_size"], n) for n, name in enumerate(("tokens", "labels"))}
    return lambda: program(params, batch)


def _loss(run: Callable[[], Any]) -> float:
    return float(np.sum(np.asarray(run()[0], np.float64)))


def _steps(step: tuple, compiling: dict[str, Future], repeats: int, results: Results) -> dict[str, Any]:
    """Milliseconds of every contender, timed in turns; what each adds to the plain step, in total and per instruction.
    Those with loops in command buffers are timed elsewhere."""
    label, shape, m = step
    runs, counts = {}, {}
    for name, future in compiling.items():
        if not name.endswith("loops"):
            (contender, program, counts[name]), compile_s = future.result(1)
            runs[name] = _runner(contender, program, shape, m)
            results.say(f"{label}, {name}: compiled in {compile_s:.0f} s")
    took = {name: 1e3 * middle(times) for name, times in in_turns(runs, 3 * repeats).items()}
    rows = {
        name: {"ms": ms, "over_plain": ms / took[PLAIN] - 1, "instructions": counts[name]}
        | ({"us_per_instruction": 1e3 * (ms - took[PLAIN]) / counts[name]} if counts[name] else {})
        for name, ms in took.items()
    }
    losses = {name: _loss(run) for name, run in runs.items()}
    return {"kind": "steps", "shape": shape, "microbatches": m, "rows": rows, "losses": losses}


def _in_a_process(step: tuple, repeats: int, results: Results) -> dict[str, Any]:
    """A step with its loops in command buffers, in its own process, so that a hang ends with that process."""
    label, shape, m = step
    command = [
        sys.executable,
        "-m",
        "one_gpu_parts.loop_overhead",
        json.dumps([shape, m, "vocab-2, loops", 3 * repeats]),
    ]
    limit = min(25.0, max(1.0, results.left - 5))
    found: dict[str, Any] = {"kind": "steps in a process", "step": label, "limit_s": limit}
    with tempfile.TemporaryFile(mode="w+") as out, tempfile.TemporaryFile(mode="w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=Path(__file__).parent.parent)
        try:
            found["status"] = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            found["status"] = "did not end"
        for file in (out, err):
            file.seek(0)
        for line in out.read().splitlines():
            said = json.loads(line)
            found |= said if "ms" not in said else {"ms": [*found.get("ms", []), said["ms"]]}
        if found["status"]:
            found["stderr"] = err.read()[-2000:]
    return found


def main() -> None:
    shape, m, name, repeats = json.loads(sys.argv[1])
    began = time.monotonic()
    contender, program, count = compiled_step(shape, m, name, jax.devices()[0])
    print(json.dumps({"compile_s": time.monotonic() - began, "instructions": count}), flush=True)
    run = _runner(contender, program, shape, m)
    for number in range(repeats + 1):
        took = seconds(run)
        print(json.dumps({"ms": 1e3 * took} if number else {"first_ms": 1e3 * took}), flush=True)
    print(json.dumps({"loss": _loss(run)}), flush=True)


if __name__ == "__main__":
    main()
