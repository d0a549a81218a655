"""Writes the page ``docs/gpu.md`` from the parts' files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vocabpp_jax import models
from vocabpp_jax.schedules.simulation.cost import GPU

from .constants import FITTED, constants
from .gpu_measurements import Measured
from .gpu_parity import METHODS, cases
from .gpu_sizes import WHOLE, Size
from .page_passes import NOT_YET, cells, iterations, passes, stages, table3

SECTIONS = ("parity", "overhead", "kernels", "passes", "iterations", "table3", "stages", "torch", "constants")


def write(path: Path, measured: Measured, size: Size, gpu: GPU) -> None:
    """Replace the page."""
    sections: dict[str, Callable[[], str]] = {
        "parity": lambda: parity(measured),
        "overhead": lambda: overhead(measured),
        "kernels": lambda: kernels(measured, gpu),
        "passes": lambda: passes(measured, size),
        "iterations": lambda: iterations(measured, size, gpu),
        "table3": lambda: table3(measured),
        "stages": lambda: stages(measured, size, gpu),
        "torch": lambda: torch_layers(measured, size),
        "constants": lambda: of_the_model(measured, gpu),
    }
    body = "\n\n".join([head(measured), *(sections[name]() for name in SECTIONS)])
    fill = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
    parts = [
        part if part.startswith(("#", "|", "    ")) else textwrap.fill(part, **fill) for part in body.split("\n\n")
    ]
    path.write_text("\n\n".join(parts) + "\n")


def head(measured: Measured) -> str:
    """What the page is, and what it was measured on."""
    of = next((e for part in ("passes", "overhead", "parity") if (e := measured.environment(part))), {})
    torch = measured.environment("torch").get("torch", NOT_YET)
    driver = (of.get("driver") or NOT_YET).split("  ")
    driver = next((word for word in driver if word[:1].isdigit()), driver[0])
    return (
        "# Measured on one GPU\n\n"
        "What a single GPU can show about a pipeline of many. This command writes this page, the tables in "
        "[results/gpu](../docs/results/gpu) and the constants in the GPU's file:\n\n"
        "    python experiments/one_gpu.py --output docs/results/gpu --docs docs/gpu.md \\\n"
        "        --constants schedules/simulation/gpus/h100-80g.toml\n\n"
        f"Device: {of.get('device', NOT_YET)}, driver {driver}. jax {of.get('jax', NOT_YET)}, Python "
        f"{of.get('python', NOT_YET)}, PyTorch {torch}. Times are medians; one process uses the GPU at a time."
    )


def parity(measured: Measured) -> str:
    """Errors by method, then those of the other comparisons."""
    columns = {"float32": ("float32", "xla"), "bfloat16, cuDNN": ("bfloat16", "cudnn"), "bfloat16": ("bfloat16", "xla")}

    def error(case: dict[str, Any] | None) -> str | None:
        if case is None:
            return None
        verdict = {True: "", False: " **fails**", None: " (no verdict)"}[case.get("holds")]
        return f"{max(case['grad_error'], case['loss_error']):.1e} of {case['tolerance']:.0e}{verdict}"

    def found(**where: Any) -> dict[str, Any] | None:
        plain = {"schedule": "1f1b", "model": "gpt-tiny", "precision": "highest", "documents": False, "seq": 128}
        return next(iter(measured.cases("parity", **(plain | where))), None)

    rows = [
        {"method": m} | {c: error(found(method=m, dtype=d, attention=a)) for c, (d, a) in columns.items()}
        for m in METHODS
    ]
    by_name = {case["case"]: case for case in measured.cases("parity")}
    others = [case.key for case in cases(WHOLE)[len(METHODS) * len(columns) :]]
    return (
        "## Parity\n\nOne stage on the GPU against autodiff of the same model in float32 on the host's CPU: the "
        "relative error of the loss or of the worst gradient, whichever is larger, and the tolerance. In bfloat16 the "
        "tolerance is twice the error of computing in bfloat16 on one device. Float32 products are true float32 here; "
        "where the GPU may round them to TF32, which is jax's default, there is no verdict. Attention is written out "
        "where no kernel is named.\n\n"
        + cells(rows)
        + "\n\n"
        + cells([{"case": name, "error": error(by_name.get(name))} for name in others])
    )


def overhead(measured: Measured) -> str:
    """Loops, steps, and the effect of command buffers on both."""
    names = {"default": "without loops, as compiled", "none": "no command buffers", "loops": "with loops"}
    loops = {case["command_buffers"]: case for case in measured.cases("overhead", kind="loops")}
    rows = [
        {"command buffers": text, "not entered, µs": loops.get(name, {}).get("skipped_us"),
         "entered, µs": loops.get(name, {}).get("entered_us")}
        for name, text in names.items()
    ]  # fmt: skip
    steps = [
        {"model": case["case"].removeprefix("steps, "), "step": name, "ms": row["ms"], "over plain": row["over_plain"]}
        for case in measured.cases("overhead", kind="steps")
        for name, row in case["rows"].items()
    ]
    alone = []
    for case in measured.cases("overhead", kind="steps in a process"):
        ended = case["status"] == 0
        ms = ", ".join(f"{x:.0f}" for x in [case.get("first_ms", 0.0), *case.get("ms", [])])
        outcome = "ended" if ended else f"**did not end** within {case['limit_s']:.0f} s"
        alone.append({"model": case["step"], "with loops in command buffers": outcome, "steps until then, ms": ms})
    nothing = [{"model": None, "with loops in command buffers": None, "steps until then, ms": None}]
    return (
        "## The executor's overhead\n\nEvery pass of the program is inside a loop of zero or one trips. The cost of "
        "such a loop with an almost empty body, by what runs as CUDA graphs:\n\n"
        + cells(rows)
        + "\n\nWhole steps of one stage (p=1), compared with a plain jitted gradient-accumulation step of the same "
        "model. With a sharded vocabulary a pipeline computes more than the plain step: the final norm again in T and "
        "G, and separate softmax statistics.\n\n"
        + cells(steps or [{"model": None, "step": None, "ms": None, "over plain": None}], {"over plain": "+.1%"})
        + "\n\nThe same step with loops in command buffers, in a process of its own:\n\n"
        + cells(alone or nothing)
        + "\n\nLoops therefore stay out of command buffers ([`flags.py`](../vocabpp_jax/pipeline/flags.py)), although "
        "an empty loop is cheaper there. The cost model counts a loop that is not entered as the `overhead` of every "
        "pass; the cost of entering one is part of the pass times below."
    )


def kernels(measured: Measured, gpu: GPU) -> str:
    """Kernel rates that the GPU reaches."""
    found = [case for case in measured.cases("passes") if "per_second" in case]
    rows = [
        {"kernel": c["case"], "µs": c["us"], "a second": f"{c['per_second'] / 1e12:.3g} "
         + ("TB" if c["case"] == "copy" else "TFLOP"),
         "of the data sheet": c["per_second"] / (gpu.memory_bandwidth if c["case"] == "copy" else gpu.peak_flops)}
        for c in found
    ]  # fmt: skip
    empty = [{"kernel": None, "µs": None, "a second": None, "of the data sheet": None}]
    return (
        "## Kernels\n\nA copy of 1 GiB in float32; matrix products in bfloat16, there and back; cuDNN's causal "
        "attention, whose FLOPs count only the causal half.\n\n"
        + cells(rows or empty, {"µs": ".0f", "of the data sheet": ".1%"})
    )


def torch_layers(measured: Measured, size: Size) -> str:
    """PyTorch next to our passes."""
    row = size.stage_row
    seq, count = row.sequences[0], models.named(row.model).layers // row.p
    ours = [measured.layers(row.model, seq, name, count) for name in ("F", "B")]
    rows = []

    def line(label: str, own: float | None, **where: Any) -> None:
        found = {how: next(iter(measured.cases("torch", how=how, **where)), None) for how in ("eager", "compiled")}
        rows.append(
            {"what": label, "ours, ms": own} | {f"PyTorch {how}, ms": c and c["both_ms"] for how, c in found.items()}
        )

    line(f"{count} layers of {row.model}, s={seq}", None if None in ours else 1e3 * sum(ours), what="layers")
    for V in size.torch_vocabularies:
        own = measured.vocabulary(row.model, seq, V, "baseline", V)
        line(f"its head, V={V:,}", own and 1e3 * own["H"], what="head", vocab_size=V)
    return (
        "## PyTorch\n\nForward and backward of the same layers, and of the whole head with its cross entropy, in "
        "bfloat16. PyTorch accumulates gradients in bfloat16 and keeps every activation; our code accumulates them in "
        "float32 and recomputes norms and activation functions.\n\n" + cells(rows)
    )


def of_the_model(measured: Measured, gpu: GPU) -> str:
    """The cost model's constants, and how well they predict the passes."""
    found = constants(measured, gpu)
    values, missed = found if found else ({}, None)
    names = ["matmul_efficiency", "half_size", "attention_efficiency", "traffic_efficiency", "overhead", *FITTED]
    rows = [
        {"constant": f"`{n}`", "from": "least squares" if n in FITTED else "the kernels and loops above",
         "value": f"{values[n]:.3g}" if n in values else None}
        for n in names
    ]  # fmt: skip
    said = f"{missed:.1%}" if missed is not None else NOT_YET
    return (
        "## Constants of the cost model\n\nWritten into [the GPU's file](../schedules/simulation/gpus/h100-80g.toml). "
        f"For passes of a millisecond and more the error is {said} (root mean square). What one GPU cannot show "
        "remains an assumption: the network, and `contention`, how much collectives slow down the passes that overlap "
        "with them.\n\n" + cells(rows)
    )
