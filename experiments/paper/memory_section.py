"""Peak memory of every published row, compiled for A100s, and what it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console

from paper.page import Files, Say, table
from paper.settings import Setting, published
from vocabpp_jax import compiled
from vocabpp_jax.schedules.cost import load_gpu

GIB = 2**30


def line(row: Setting, report: dict[str, Any]) -> dict[str, Any]:
    """A line of the CSV."""
    peak = report["peak_bytes"] / GIB
    return {
        "schedule": row.order,
        "GPUs": row.gpus,
        "s": row.seq,
        "method": row.method,
        "V": row.vocab_size,
        "published": row.memory,
        "compiled": peak,
        "difference": None if row.memory is None else peak - row.memory,
        "share": None if row.memory is None else peak / row.memory - 1,
        "bytes copied an interval": report["loop_copy_bytes"],
        "devices differ by": report["imbalance"],
    } | {name: size / GIB for name, size in report["parts"].items()}


def section(files: Files, say: Say) -> str:
    """The part of the page for memory: compiles what the cache does not have."""
    from paper.memory import compile_rows  # which sets up JAX to compile for GPUs that are not there

    rows = [row for number in (5, 6) for row in published(number)]
    path = files.cache / "memory.jsonl"
    known = path.read_text().count("\n") if path.exists() else 0
    if known < len(rows):
        compiled.devices(load_gpu("a100-80g"), 1)  # says in one sentence what is missing, before the work
        say(f"{known} of {len(rows)} rows compiled already; each takes about a minute")
    reports = compile_rows(rows, path, Console())
    lines = [line(row, reports[row.name]) for row in rows]
    shares = [found["share"] for found in lines if found["share"] is not None]
    link = files.csv("memory", lines)
    shown = ["schedule", "GPUs", "s", "method", "V", "published", "compiled", "difference", "share"]
    furthest = sorted((x for x in lines if x["share"] is not None), key=lambda x: -abs(x["share"]))[:6]
    return "\n\n".join(
        [
            f"**Compiled** for A100-SXM4-80GB: the full train step of {len(rows)} rows, as `experiments/memory.py` "
            f"does it. Against the published peak, in GB of 1024 MiB: {np.mean(shares):+.1%} on average, from "
            f"{min(shares):+.1%} to {max(shares):+.1%}, {np.mean(np.abs(shares)):.1%} off on average. {link}",
            "Those that differ most:",
            table([{k: x[k] for k in shown} for x in furthest], {"GPUs": "d", "s": "d", "V": "d", "share": "+.1%"}),
        ]
    )
