"""From measurements to rows, a table, a CSV and a plot."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median
from typing import Any

from command_line.options import PipelineOptions
from comparators import EVEN_SHARE
from speed_measure.turns import ratio

METHODS_OF_OTHERS = {
    "spmd-pipeline": "head outside",
    "data-parallel": "whole head",
    "fsdp": "whole head",
}
COLUMNS = (
    "schedule",
    "method",
    "vocab_size",
    "tokens_per_second",
    "ratio_to_ideal",
    "predicted_ratio",
    "measured_ms",
    "least_ms",
    "most_ms",
    "predicted_ms",
    "outside_ms",
    "cpu_ratio",
    "compile_s",
)


def rows_of(results: list[dict], seq: int, pipeline: PipelineOptions) -> dict[str, Any]:
    """``rows`` of ours, ``comparators`` and ``ideal``: a dictionary per contender and vocabulary size."""
    tokens = pipeline.microbatches * pipeline.microbatch_size * seq
    found: dict[str, Any] = {"devices": results[0]["devices"] if results else {}, "tokens_per_step": tokens}
    found |= {"rows": [], "comparators": [], "ideal": []}
    for result in results:
        ideal = result["contenders"][EVEN_SHARE]
        for name, of in result["contenders"].items():
            schedule, _, method = name.partition(" ")
            ms = [1e3 * s for s in of["seconds"]]
            row = {
                "schedule": schedule,
                "method": method or METHODS_OF_OTHERS.get(name, ""),
                "vocab_size": result["vocab_size"],
                "tokens_per_second": 1e3 * tokens / median(ms),
                "ratio_to_ideal": ratio(ideal["seconds"], of["seconds"]),
                "measured_ms": median(ms),
                "least_ms": min(ms),
                "most_ms": max(ms),
                "repeats": len(ms),
                "cpu_ratio": ratio(of["cpu_s"], ideal["cpu_s"]),
                **of["compile"],
            }
            if "prediction" in of:
                row |= of["prediction"]
                row["predicted_ratio"] = 1e3 * median(ideal["seconds"]) / row["predicted_ms"]
            found["rows" if method else "ideal" if name == EVEN_SHARE else "comparators"].append(row)
    return found


def table_of(found: dict[str, Any]) -> str:
    """Markdown: one line per contender and vocabulary size, fastest first."""
    devices, every = found["devices"], found["ideal"] + found["rows"] + found["comparators"]
    lines = [
        f"{devices['devices']} × {devices['device']}, one process each, jax {devices['jax']}; "
        f"{found['tokens_per_step']:,} tokens a step, loss and gradients. "
        f"Measured: the median of {min(r['repeats'] for r in every)} rounds and, in brackets, least and most; ratios "
        "are medians of the rounds' own. Ideal: the same work divided evenly, nobody waiting. "
        "Work: processor time, the ideal's being 1; what is above it is the program's own and not waiting.",
        "",
        "| vocabulary | schedule | method | tokens/s | of ideal | predicted | ms | predicted ms | error | work |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(every, key=lambda r: (r["vocab_size"], r["measured_ms"])):
        predicted = ("", "", "")
        if "predicted_ms" in row:
            error = row["predicted_ms"] / row["measured_ms"] - 1
            predicted = (f"{row['predicted_ratio']:.3f}", f"{row['predicted_ms']:.0f}", f"{error:+.1%}")
        schedule = "ideal" if row["schedule"] == EVEN_SHARE else row["schedule"]
        lines.append(
            f"| {row['vocab_size']:,} | {schedule} | {row['method']} | {row['tokens_per_second']:,.0f} | "
            f"{row['ratio_to_ideal']:.3f} | {predicted[0]} | {row['measured_ms']:.0f} "
            f"({row['least_ms']:.0f} to {row['most_ms']:.0f}) | {predicted[1]} | {predicted[2]} | "
            f"{row['cpu_ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def write_report(folder: Path, found: dict[str, Any]) -> str:
    """Write speed.csv, speed.md and speed.png; returns the table."""
    table = table_of(found)
    (folder / "speed.md").write_text(table)
    with (folder / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(found["ideal"] + found["rows"] + found["comparators"])
    draw_sweep(folder / "speed.png", found)
    return table


def draw_sweep(path: Path, found: dict[str, Any]) -> None:
    """Plot throughput over vocabulary size: measured as lines, predicted as crosses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    every = found["ideal"] + found["rows"] + found["comparators"]
    for number, (schedule, method) in enumerate(dict.fromkeys((r["schedule"], r["method"]) for r in every)):
        rows = sorted(
            (r for r in every if (r["schedule"], r["method"]) == (schedule, method)), key=lambda r: r["vocab_size"]
        )
        ideal, color = schedule == EVEN_SHARE, "black" if schedule == EVEN_SHARE else f"C{(number - 1) % 10}"
        sizes, speeds = [r["vocab_size"] for r in rows], [r["tokens_per_second"] for r in rows]
        style = "--" if ideal else "-" if any("predicted_ms" in r for r in rows) else ":"
        label = "ideal" if ideal else f"{schedule}, {method}"
        axes.plot(sizes, speeds, style, marker="" if ideal else ".", color=color, label=label)
        marked = [r for r in rows if "predicted_ms" in r]
        predicted = [found["tokens_per_step"] / r["predicted_ms"] * 1e3 for r in marked]
        axes.plot([r["vocab_size"] for r in marked], predicted, "x", color=color)
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("tokens a second (× predicted)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
