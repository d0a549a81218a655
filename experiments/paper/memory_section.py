"""Peak memory of every published row, compiled for A100s, and its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from paper.memory_rows import compile_rows, read_reports
from paper.page import Files, Say
from paper.settings import Setting, published
from reports.markdown import table
from vocabpp_jax import compiled
from vocabpp_jax.schedules.simulation.cost import load_gpu

GIB = 2**30


def line(row: Setting, report: dict[str, Any]) -> dict[str, Any]:
    """A row of the CSV."""
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
    """The page's section on memory: compiles what the cache does not have."""
    rows = [row for number in (5, 6) for row in published(number)]
    path = files.cache / "memory.jsonl"
    known = read_reports(path)
    if missing := [row for row in rows if row.name not in known]:
        compiled.devices(load_gpu("a100-80g"), 1)  # fails early, in one sentence, if something is missing
        say(f"{len(missing)} of {len(rows)} rows are to be compiled, which takes about a minute each")
    else:
        say(f"all {len(rows)} rows are in {path}; without it they are compiled again")
    reports = compile_rows(rows, path, Console())
    lines = [line(row, reports[row.name]) for row in rows]
    link = files.csv("memory", lines)
    shown = ["schedule", "GPUs", "s", "method", "V", "published", "compiled", "difference", "share"]
    sharded = [x["share"] for x in lines if x["method"] not in ("baseline", "redis") and x["share"] is not None]
    state = of_v_half_baseline(lines)
    highest = sorted((x for x in lines if x["share"] is not None), key=lambda x: -x["share"])[:6]
    return "\n\n".join(
        [
            f"**Compiled** for A100-SXM4-80GB: the full train step of {len(rows)} rows, as `experiments/memory.py` "
            "compiles it, against the published peak in GB of 1024 MiB. *differ* is the difference between what the "
            "fullest and the emptiest device use, as a share of the peak, in the row where it is largest. "
            f"{link} Over the "
            f"{len(sharded)} published rows with the vocabulary on all devices, the compiled peak differs by "
            f"{np.mean(sharded):+.1%} on average, from {min(sharded):+.1%} to {max(sharded):+.1%}.",
            table(by_family(lines), {"rows": "d", "with published": "d"}),
            "The rows furthest above the published peak:",
            table([{k: x[k] for k in shown} for x in highest], {"GPUs": "d", "s": "d", "V": "d", "share": "+.1%"}),
            REDIS,
            STATE.format(most=state[0]["float32 state"] / state[0]["published"]),
            table(state, {"GPUs": "d", "s": "d", "V": "d", "share": "+.1%"}),
            loops(rows, reports),
        ]
    )


REDIS = """All devices run one program, so each has room for the parameters and the activations of the deepest stage.
With `redis` the deepest stages are those before the head, and the last device reserves that room as well; with one
program per device, as published, it need not."""


STATE = """With V-Half, `baseline` keeps the embedding and the head on one device. Float32 parameters, gradients and two
moments, 16 bytes per parameter, are then up to {most:.0%} of the published peak, and the schedule determines the
activations. Only the rounded weights could be saved: rounding them again in every pass would cost 6 bytes of traffic
per weight each time. All published rows of V-Half `baseline`, by the share of that state:"""


def of_v_half_baseline(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of the peaks of V-Half's published baselines, most state first."""
    made = [
        {name: x[name] for name in ("GPUs", "s", "V", "published", "compiled", "share")}
        | {"float32 state": x["parameters"] + x["optimizer"] + x["gradients"]}
        | {"rounded weights": x["rounded weights"], "activations": x["activations in flight"]}
        | {"everything else": x["other buffers"] + x["everything else"]}
        for x in lines
        if x["schedule"] == "v-half" and x["method"] == "baseline" and x["share"] is not None
    ]
    return sorted(made, key=lambda x: -x["float32 state"] / x["published"])


def by_family(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per schedule and method that compares compiled peaks with the published."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in lines:
        families.setdefault((found["schedule"], found["method"]), []).append(found)
    return [
        {"schedule": schedule, "method": method, "rows": len(family)}
        | _compared([x["share"] for x in family if x["share"] is not None])
        | {"differ": f"{max(x['devices differ by'] for x in family):.1%}"}
        for (schedule, method), family in families.items()
    ]


def _compared(shares: Sequence[float]) -> dict[str, Any]:
    if not shares:
        return {"with published": 0, "on average": None, "lowest": None, "highest": None}
    figures = {"on average": np.mean(shares), "lowest": min(shares), "highest": max(shares)}
    return {"with published": len(shares)} | {name: f"{share:+.1%}" for name, share in figures.items()}


def loops(rows: Sequence[Setting], reports: Mapping[str, dict[str, Any]]) -> str:
    """What the steady-state loops copy, and whether their collectives start in time and overlap with work."""
    copying = {row.name: reports[row.name]["loop_copy_bytes"] for row in rows}
    copied = [f"{name} ({size / 2**20:.0f} MiB an interval)" for name, size in copying.items() if size]
    promising = [row.name for row in rows if row.method in ("vocab-1", "vocab-2")]
    large = {name: [c for c in reports[name]["collectives"] if is_large(c)] for name in promising}
    waited = [f"{c['step']} in {name}" for name in promising for c in large[name] if not is_hidden(c["passes_between"])]
    fits = [row.name for row in rows if reports[row.name]["peak_bytes"] <= reports[row.name]["memory_bytes"]]
    every = [(c, name) for name in fits for c in reports[name]["collectives"]]
    late = [f"{c['step']} in {name}" for c, name in every if compiled.starts_late(c["passes_before"])]
    return (
        f"Copies of 1 MiB or more in the steady-state loop: {', '.join(copied) or 'none in any row'}. "
        f"The {len(promising)} rows of vocab-1 and vocab-2 have {sum(map(len, large.values()))} vocabulary collectives "
        "of 1 MiB or more; those without a transformer pass between start and end: "
        f"{', '.join(waited) or 'none'}. Of the {len(every):,} collectives and transfers of the {len(fits)} rows "
        f"that fit on the GPU, these start later than the program has them: {', '.join(late) or 'none'}."
    )


def is_large(collective: Mapping[str, Any]) -> bool:
    """Whether a collective belongs to the vocabulary layers and is large enough to matter."""
    return collective["step"] != "transfer" and collective["bytes"] >= 2**20


def is_hidden(passes: Sequence[str]) -> bool:
    """Whether a transformer pass is among those between a collective's start and end."""
    return any(name[0] in "FBW" for name in passes)
