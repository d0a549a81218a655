"""Tables comparing PyTorch's pipelines with ours: losses, throughput, and where the difference comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytorch.megatron_logs import MegatronRun
from speed_measure.turns import ratio

ALONE = "last stage, one device"
"""The bottleneck stage of 1F1B without a sharded vocabulary, timed in a plain accumulation step of all microbatches."""


def ratios_of(ours: Sequence[str], vocab_size: int, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Torch's 1F1B relative to each of ours: the kernel ratio, the schedule ratio, their product, and the measured
    ratio.

    ``seconds`` are those of every round.
    """
    if "torch 1f1b" not in seconds or "ours 1f1b baseline" not in seconds:
        return []
    kernel = ratio(seconds[f"torch {ALONE}"], seconds[f"ours {ALONE}"])
    found = []
    for name in ours:
        mine = seconds[f"ours {name}"]
        schedule, total = ratio(seconds["ours 1f1b baseline"], mine), ratio(seconds["torch 1f1b"], mine)
        found.append(
            {
                "ours": name,
                "vocab_size": vocab_size,
                "kernel_ratio": kernel,
                "schedule_ratio": schedule,
                "product": kernel * schedule,
                "measured_ratio": total,
                "difference": kernel * schedule / total - 1,
            }
        )
    return found


def losses_table(result: dict[str, Any]) -> str:
    """The curves side by side, every fifth step, and the largest difference."""
    names = list(result["losses"])
    lines = ["| step | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
    steps = len(result["losses"][names[0]])
    for step in sorted({*range(0, steps, 5), steps - 1}):
        lines.append(f"| {step + 1} | " + " | ".join(f"{result['losses'][n][step]:.6f}" for n in names) + " |")
    largest = " | ".join(f"{result['largest_difference'][n]:.1e}" for n in names)
    return "\n".join([*lines, f"| largest difference | {largest} |"]) + "\n"


def speed_table(what: str, rows: list[dict], ratios: list[dict], runs: list[MegatronRun]) -> str:
    """Throughput of everything, and the ratios, under a line that says what was measured."""
    lines = [
        what,
        "",
        "| vocabulary | framework | what | tokens/s | step, ms | TFLOP/s a GPU | GiB |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda r: (r["vocab_size"], r["measured_ms"])):
        lines.append(
            f"| {row['vocab_size']:,} | {row['framework']} | {row['what']} | {row['tokens_per_second']:,.0f} | "
            f"{row['measured_ms']:.0f} ({row['least_ms']:.0f} to {row['most_ms']:.0f}) | | |"
        )
    for run in runs:
        said = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
        lines.append(
            f"| {said(run.vocab_size, ',')} | Megatron | {run.name} | {said(run.tokens_per_second, ',.0f')} | "
            f"{run.step_ms:.0f} | {said(run.tflops, '.1f')} | {said(run.memory_gib, '.1f')} |"
        )
    if ratios:
        lines += [
            "",
            "| vocabulary | torch 1f1b over ours | kernels | schedule | product | measured | product off by |",
        ]
        lines += ["|---:|---|---:|---:|---:|---:|---:|"]
    for r in ratios:
        lines.append(
            f"| {r['vocab_size']:,} | {r['ours']} | {r['kernel_ratio']:.2f} | {r['schedule_ratio']:.2f} | "
            f"{r['product']:.2f} | {r['measured_ratio']:.2f} | {r['difference']:+.1%} |"
        )
    return "\n".join(lines) + "\n"
