"""Simulations at the published tables' settings that the tables do not contain: other schedules with vocabulary passes,
tied embeddings, and interlaced without its collectives."""

from __future__ import annotations

import dataclasses
from typing import Any

from paper.calibration import predict
from paper.page import Files, Say
from paper.settings import Setting, published
from reports.markdown import table
from vocabpp_jax.schedules import methods_of
from vocabpp_jax.schedules.simulation.durations import Durations
from vocabpp_jax.schedules.simulation.simulator import GPU

VOCABULARIES = (32_000, 256_000)
SEQ = 2048
POINTS = ("MFU", "a process per device", "GB most", "least")


def new_rows() -> list[Setting]:
    """V-Half with Algorithm 2, V-Min and V-ZB at Table 6's settings; ZB-H1 and ZB-H2 at Table 5's; tied tables."""
    there = {(row.table, row.gpus, row.order, row.method) for n in (5, 6) for row in published(n)}
    found = []
    for number, schedules in ((5, ("zb-h1", "zb-h2")), (6, ("v-half", "v-min", "v-zb"))):
        for gpus in sorted({row.gpus for row in published(number)}):
            for schedule in schedules:
                for method in ("baseline", "vocab-1", "vocab-2"):
                    if method in methods_of(schedule) and (number, gpus, schedule, method) not in there:
                        found += [Setting(number, gpus, SEQ, method, V, schedule=schedule) for V in VOCABULARIES]
            own = "1f1b" if number == 5 else "v-half"
            found += [Setting(number, gpus, SEQ, "vocab-2", V, schedule=own, tied=True) for V in VOCABULARIES]
    return found


def simulated(rows: list[Setting], say: Say = lambda _: None) -> list[dict[str, Any]]:
    """MFU, bubble and estimated memory of the fullest and the emptiest device with our program, one line per row."""
    lines = []
    for n, row in enumerate(rows, start=1):
        done = predict(row, rules=GPU)
        peaks = [size / 2**30 for size in done.cost.peak_bytes(done.timeline)]
        lines.append(
            {
                "GPUs": row.gpus,
                "schedule": row.order,
                "method": row.method + (", tied" if row.tied else ""),
                "V": row.vocab_size,
                "MFU": done.mfu,
                "a process per device": predict(row).mfu,
                "bubble": done.timeline.bubble_ratio,
                "GB most": max(peaks),
                "least": min(peaks),
            }
        )
        if n % 10 == 0 or n == len(rows):
            say(f"simulated {n}/{len(rows)} rows beyond the tables")
    return lines


def section(files: Files, say: Say) -> str:
    """The page's section on the rows that the tables lack."""
    known = [
        Setting(number, gpus, SEQ, method, V)
        for number, gpus, method in ((5, 8, "vocab-2"), (5, 32, "vocab-2"), (6, 16, "vocab-1"), (6, 32, "vocab-1"))
        for V in VOCABULARIES
    ]
    lines = simulated(known + new_rows(), say)
    lines.sort(key=lambda line: (line["GPUs"], line["V"]))
    link = files.csv("beyond", lines)
    return "\n\n".join(
        [
            "**Simulated** with our program by the rules of GPUs, and beside it with a process per device and passes "
            "in the published order, with the frozen calibration at the settings of Table 5 (1F1B and zero-bubble "
            f"schedules, 8 and 32 GPUs) and Table 6 (V-shaped ones, 16 and 32), s={SEQ}, 128 microbatches; some rows "
            "of those tables are included for comparison. Table 6's software is faster, so compare V-shaped schedules "
            "only with one another. Memory is the estimate of `schedules.simulation.cost`: 18 bytes per parameter plus "
            f"what selective residuals keep of a layer in flight; compile for exact figures. {link}",
            table(lines, {"GPUs": "d", "V": "d", "bubble": ".1%"} | dict.fromkeys(POINTS, ".1f")),
        ]
    )


# --- the ablation ----------------------------------------------------------------------------------------------------


def ablation() -> list[dict[str, Any]]:
    """Interlaced with and without the time of its synchronous collectives, next to the vocabulary passes."""
    lines = []
    for gpus in (8, 32):
        for V in VOCABULARIES:
            row = Setting(5, gpus, SEQ, "interlaced", V)
            whole, without = (
                predict(row, change=change).timeline.makespan for change in (lambda d: d, Durations.without_collectives)
            )
            beside = predict(dataclasses.replace(row, method="vocab-2")).timeline.makespan
            lines.append(
                {
                    "GPUs": gpus,
                    "V": V,
                    "interlaced, ms": 1e3 * whole,
                    "without collectives, ms": 1e3 * without,
                    "faster by": 1 - without / whole,
                    "vocab-2, ms": 1e3 * beside,
                }
            )
    return lines


def ablation_section(files: Files, say: Say) -> str:
    """The page's section on the ablation."""
    say("simulating interlaced without its collectives")
    lines = ablation()
    link = files.csv("ablation", lines)
    percent = {"GPUs": "d", "V": "d", "faster by": ".1%"} | dict.fromkeys([k for k in lines[0] if "ms" in k], ".0f")
    return "\n\n".join(
        [
            "**Simulated**: one iteration of interlaced 1F1B, 4B on 8 GPUs and 21B on 32, s=2048, with its "
            "synchronous collectives and as if they took no time. Between nodes, these collectives make it slower than "
            f"vocabulary passes, which hide theirs. {link}",
            table(lines, percent),
        ]
    )
