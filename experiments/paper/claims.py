"""The headline claims, computed from Tables 5 and 6, published and ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paper.memory_rows import read_reports
from paper.page import Files, Say
from paper.tables import Outcome, outcomes, settings
from reports.markdown import table


def gains(found: Sequence[Outcome], over: str, published: bool) -> list[float]:
    """The relative throughput gain of the better vocabulary method over another, in every setting that has both.

    MFU serves as throughput here, since the FLOPs within a setting are the same.
    """
    values = []
    for rows in settings(found).values():
        mfu = {o.row.method: o.row.mfu if published else o.ours for o in rows if o.row.mfu is not None}
        best = [mfu[m] for m in ("vocab-1", "vocab-2") if m in mfu]
        if best and over in mfu:
            values.append(max(best) / mfu[over] - 1)
    return values


def memory_saved(found: Sequence[Outcome], published: bool) -> list[float]:
    """GB by which the leaner vocabulary method undercuts the baseline, at the largest vocabulary that ran."""
    values = []
    for (_, _, V), rows in settings(found).items():
        memory = {o.row.method: o.row.memory if published else o.memory for o in rows}
        best = [memory[m] for m in ("vocab-1", "vocab-2") if memory.get(m) is not None]
        if best and memory.get("baseline") is not None and V == 256_000:
            values.append(memory["baseline"] - min(best))
    return values


def speedups(tables: dict[int, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """The range of every claim, published and ours."""
    lines = []
    for number, over in ((5, "redis"), (5, "baseline"), (6, "baseline")):
        theirs, ours = (gains(tables[number], over, published) for published in (True, False))
        lines.append(
            {
                "table": number,
                "vocabulary passes faster than": over,
                "published, least": min(theirs),
                "published, most": max(theirs),
                "simulated, least": min(ours),
                "simulated, most": max(ours),
            }
        )
    return lines


def balance(files: Files) -> list[dict[str, Any]]:
    """How much V-Half's devices differ in memory use, from the available compiler reports."""
    reports = read_reports(files.cache / "memory.jsonl").values()
    return [
        {"row": r["name"], "GB most": max(r["used_bytes"]) / 2**30, "least": min(r["used_bytes"]) / 2**30}
        | {"difference of peak": r["imbalance"]}
        for r in reports
        if r["name"].startswith("v-half")
    ]


def section(files: Files, say: Say) -> str:
    """The page's section on the claims."""
    say("simulating Tables 5 and 6")
    tables = {number: outcomes(number, files.cache / "memory.jsonl", own=True) for number in (5, 6)}
    lines = speedups(tables)
    link = files.csv("claims", lines)
    text = [
        "**Simulated**, with our program by the rules of GPUs, and published: how much faster the better of the two "
        "vocabulary methods is, over all settings of a table. The published headline is 5% to 51% over the "
        f"redistribution; the published Table 5 itself reaches {lines[0]['published, most']:.1%}. {link}",
        table(lines, {"table": "d"} | dict.fromkeys(list(lines[0])[2:], ".1%")),
    ]
    for number in (5, 6):
        theirs, ours = (memory_saved(tables[number], published) for published in (True, False))
        said = f" published, {min(theirs):.1f} to {max(theirs):.1f} GB"
        if ours:
            said += f"; **compiled**, {min(ours):.1f} to {max(ours):.1f} GB in {len(ours)} settings"
        text.append(f"Peak memory saved at V=256k over the baseline of Table {number}:{said}.")
    if balanced := balance(files):
        say(f"{len(balanced)} reports of V-Half")
        rows = files.csv("balance", balanced)
        by = {
            name: [b["difference of peak"] for b in balanced if f" {name} " in b["row"]]
            for name in ("baseline", "vocab-1")
        }
        ranges = ", ".join(f"{min(x):.1%} to {max(x):.1%} with {name}" for name, x in by.items() if x)
        text.append(
            "Memory balance of V-Half, **compiled**: the difference between what the fullest and the emptiest device "
            f"use, as a share of the peak: {ranges}. One program has one shape, so all devices allocate the same "
            f"amount; they differ in how much of it they use. {rows}"
        )
    return "\n\n".join(text)
