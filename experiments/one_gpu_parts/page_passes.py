"""The page's tables of passes, and what follows from them: iterations, Table 3, stages."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from reports.markdown import table
from vocabpp_jax import models
from vocabpp_jax.schedules import lower
from vocabpp_jax.schedules.simulation.cost import GPU, Cost
from vocabpp_jax.schedules.simulation.simulator import GPU as ON_GPUS
from vocabpp_jax.schedules.simulation.simulator import simulate

from .gpu_measurements import Measured, schedule_of
from .gpu_sizes import Size
from .pass_times import cases

NOT_YET = "not measured yet"
PUBLISHED = Path(__file__).parents[2] / "docs" / "paper"
MICROBATCHES = 128  # of the predicted iterations, as published


def cells(rows: list[dict[str, Any]], formats: dict[str, str] | None = None) -> str:
    """A table in which a cell without a value says that it was not measured."""
    return table([{k: NOT_YET if v is None else v for k, v in row.items()} for row in rows], formats)


def passes(measured: Measured, size: Size) -> str:
    """Times of all passes: layers, then vocabulary."""
    found = {case["case"]: case["us"] for case in measured.cases("passes")}
    layers, vocabulary = [], []
    for case in cases(size):
        us = found.get(case.key, {})
        where = {"model": case.model, "s": case.seq}
        if case.names == ("F", "B", "W"):
            split = case.schedule != "1f1b"
            row = where | {"layers": case.layers, "backward": "split" if split else "whole"}
            layers.append(row | {n: us.get(n) if split or n != "W" else "–" for n in case.names})
        else:
            row = where | {"method": case.method, "V": case.vocab_size, "rows": case.rows}
            there = ("IF", "H", "IB") if case.method == "baseline" else ("IF", "S", "T", "G", "IB")
            there += {"vocab-2": ("C1",), "vocab-naive": ("S1", "S2")}.get(case.method, ())
            absent = {"S"} if case.method == "vocab-naive" else set()
            names = ("IF", "S", "S1", "S2", "T", "C1", "H", "G", "IB")
            value = {
                n: (max(0.0, us[n]) if n in us else None) if n in there and n not in absent else "–" for n in names
            }
            vocabulary.append(row | value)
    fine = {n: ".0f" for n in ("F", "B", "W", "IF", "S", "S1", "S2", "T", "C1", "H", "G", "IB")} | {
        n: "d" for n in ("s", "layers", "V", "rows")
    }
    return (
        "## Passes\n\nMicroseconds for microbatches of one sequence. Each pass is timed as the executor runs it, after "
        "a sweep over memory; the time of a loop that is not entered is subtracted. C1 is what Algorithm 2 computes "
        "before its sum. The tables [4B on 8](results/gpu/pass_times_4B_8.csv) and [21B on "
        "32](results/gpu/pass_times_21B_32.csv) hold these times in the columns of the published tables, for "
        "`simulate.py --times`; for redis they follow the line through one layer and a whole stage.\n\n"
        + cells(layers, fine)
        + "\n\n"
        + cells(vocabulary, fine)
    )


def iterations(measured: Measured, size: Size, gpu: GPU) -> str:
    """Simulated iterations from measured passes."""
    rows = []
    for row in size.rows:
        for seq in row.sequences:
            for V in row.vocabularies:
                line: dict[str, Any] = {"model": row.model, "GPUs": row.p, "s": seq, "V": V}
                for method in ("baseline", "redis", "vocab-1", "vocab-2"):
                    line[method] = _iteration(measured, row.model, row.p, seq, V, method, gpu)
                rows.append(line)
    return (
        f"## Iterations\n\n**Simulated**: 1F1B with {MICROBATCHES} microbatches from the passes above, in milliseconds "
        f"and MFU. The network is the one assumed in the file of {gpu.name}, and collectives do not slow down the "
        "passes that overlap with them. The optimizer is left out.\n\n" + cells(rows, {"GPUs": "d", "s": "d", "V": "d"})
    )


def _iteration(measured: Measured, model: str, p: int, seq: int, V: int, method: str, gpu: GPU) -> str | None:
    schedule = schedule_of(method, model, p, MICROBATCHES, seq, V)
    durations = measured.durations(model, p, seq, V, schedule, gpu)
    if durations is None:
        return None
    seconds = simulate(lower(schedule), durations, ON_GPUS).makespan
    cost = Cost(models.cost_sizes(models.named(model, seq=seq, vocab_size=V)), gpu)
    return f"{1e3 * seconds:.0f} ({cost.mfu(MICROBATCHES, p, seconds):.1%})"


def table3(measured: Measured) -> str:
    """How vocabulary layers scale with their shards, next to the published values for A100s."""
    of_gpus, V, rows = {8: "4B", 16: "10B", 32: "21B"}, 256_000, []
    with (PUBLISHED / "table3_scaling.csv").open() as file:
        for line in csv.DictReader(file):
            p, seq, layer = int(line["gpus"]), int(line["seq_length"]), line["layer"]
            method = "vocab-1" if layer == "input" else layer.removeprefix("output ")
            names = ("IF", "IB") if layer == "input" else ("S", "T")
            whole, shard = (measured.vocabulary(of_gpus[p], seq, V, method, n) for n in (V, -(-V // p)))
            percent = None
            if whole and shard:
                loop = 0.0 if layer != "input" else 1e-6 * _skipped(measured)
                times = [sum(of[n] + loop for n in names) for of in (whole, shard)]
                percent = 100 * times[0] / (p * times[1])
            row = {"s": seq, "layer": layer, "GPUs": p, "published, A100": float(line["scaling_percent"])}
            rows.append(row | {"measured": percent})
    return (
        "## How vocabulary layers scale\n\nTable 3 of arXiv 2411.05288: the whole layer's time divided by p times a "
        "shard's, in percent, without collectives; V=256k. IF and IB of a shard take some ten microseconds, which is "
        "launch time, so their percentages show nothing else.\n\n"
        + cells(rows, {"s": "d", "GPUs": "d", "measured": ".1f"})
    )


def _skipped(measured: Measured) -> float:
    """Microseconds of the empty loop that was subtracted from the passes."""
    found = measured.cases("overhead", kind="loops", command_buffers="default")
    return found[0]["skipped_us"] if found else 0.0


def stages(measured: Measured, size: Size, gpu: GPU) -> str:
    """The real step of every stage: time and memory next to the predictions."""
    row, rows = size.stage_row, []
    seq, V = row.sequences[0], row.vocabularies[-1]
    for method in size.stage_methods:
        schedule = schedule_of(method, row.model, row.p, size.stage_microbatches, seq, V)
        durations = measured.durations(row.model, row.p, seq, V, schedule, gpu)
        program = lower(schedule)
        timeline = simulate(program, durations, ON_GPUS) if durations else None
        count = sum(s.intervals * sum(i.op == "run" for i in s.body) for s in program.segments)
        for stage in range(row.p):
            found = measured.cases("stages", method=method, stage=stage)
            for case in found or [{}]:
                ms = min(case["step_ms"]) if case else None
                busy = 1e3 * (timeline.busy[stage] + count * durations.overhead) if timeline else None
                buffers = case.get("command_buffers", "default")
                compiler = next((c["compiler_peak_bytes"] for c in measured.cases("stages", method=method)
                                 if c.get("compiler_peak_bytes")), None)  # fmt: skip
                peak = case.get("allocator_peak_bytes")
                rows.append({
                    "method": method + (", loops in command buffers" if buffers == "loops" else ""), "stage": stage,
                    "step, ms": ms, "passes and loops, ms": busy, "ratio": ms / busy if ms and busy else None,
                    "allocator's peak, GiB": peak / 2**30 if peak else None,
                    "compiler's, GiB": compiler / 2**30 if compiler else None,
                })  # fmt: skip
    return (
        f"## Stages\n\nThe train step of {row.model} on {row.p} devices, s={seq}, V={V:,}, {size.stage_microbatches} "
        "microbatches, as the real program of each stage: XLA's mocked topology runs it on the one GPU and skips the "
        "collectives, so computed values are meaningless after the first one. The next column is the sum of that "
        "stage's measured passes and the loop overhead, as in the simulator. Only the step includes the optimizer's "
        "update, which reads and writes all of the state.\n\n"
        + cells(rows, {"stage": "d", "step, ms": ".0f", "passes and loops, ms": ".0f", "ratio": ".3f"})
    )
