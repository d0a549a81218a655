"""The planner's output: the table, why neighbors were dropped, the plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from vocabpp_jax.planning import Choice, Dropped, Plan, Ranked, Request

GIB = 2**30
LITTLE = 0.03
"""Shares of the step below this are not mentioned."""


@dataclass(frozen=True)
class Refused:
    """A plan that compiled but does not fit, or could not be compiled."""

    plan: Plan
    reason: str


@dataclass(frozen=True)
class Timed:
    """A plan and its step time in every round, without the optimizer."""

    plan: Plan
    seconds: list[float]

    @property
    def median(self) -> float:
        """Over the rounds."""
        return median(self.seconds)


def table_of_timed(found: Sequence[Timed]) -> Table:
    """One line per plan, in order of expected time, with measured and expected times."""
    fastest = min(each.median for each in found)
    shown_as = Table("schedule", "method", "microbatches", "expected, s", "measured, s", "rounds", "over the fastest")
    for each in found:
        c = each.plan.choice
        shown_as.add_row(
            c.schedule,
            c.method,
            f"{each.plan.request.microbatches(c)} of {c.microbatch_size}",
            f"{each.plan.step_seconds:.3f}",
            f"{each.median:.3f}",
            f"{min(each.seconds):.3f} to {max(each.seconds):.3f}",
            f"{each.median / fastest - 1:.1%}",
        )
    return shown_as


def bounded_by(plan: Plan, dropped: Sequence[Dropped]) -> str:
    """What limits a plan: memory, if a neighbor that does not fit might be faster; otherwise the largest part of the
    step besides the passes."""
    if any(len(d.choice.differs(plan.choice)) == 1 and d.at_least < (1 - LITTLE) * plan.step_seconds for d in dropped):
        return "memory"
    share, name = max((plan.bubble, "bubble"), (plan.communication, "communication"))
    return name if share > LITTLE else "compute"


def table(plans: Sequence[Plan], dropped: Sequence[Dropped], title: str) -> Table:
    """One line per plan, best first."""
    head = ("layout", "schedule", "method", "microbatches", "residuals", "optimizer")
    numbers = ("step, s", "tokens/s", "MFU", "bubble", "comm.", "GiB", "compiled", "bound by")
    found = Table(*head, *numbers, title=title)
    for plan in plans:
        c = plan.choice
        found.add_row(
            shown(c, "layout"),
            c.schedule + (f" × {c.chunks}" if c.chunks else ""),
            c.method,
            f"{plan.request.microbatches(c)} of {c.microbatch_size}",
            c.residuals,
            "sharded" if c.shard_optimizer else "whole",
            f"{plan.step_seconds:.3f}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu:.1%}",
            f"{plan.bubble:.1%}",
            f"{plan.communication:.1%}",
            f"{plan.estimated.peak / GIB:.1f}",
            "" if plan.compiled_bytes is None else f"{plan.compiled_bytes / GIB:.1f}",
            bounded_by(plan, dropped),
        )
    return found


def reasons(best: Plan, ranked: Ranked, refused: Sequence[Refused]) -> Iterator[str]:
    """Why neighbors of the best plan that looked better were not chosen: for each field, the best-looking one that
    differs only in that; and every plan that was compiled and refused."""
    for each in refused:
        yield f"{each.plan.choice}: {each.plan.step_seconds:.3f} s; {each.reason}"
    named: set[str] = set()
    for d in sorted(ranked.dropped, key=lambda d: d.at_least):
        what = d.choice.differs(best.choice)
        if len(what) == 1 and what[0] not in named and d.at_least < best.step_seconds:
            named.add(what[0])
            yield (
                f"{what[0].replace('_', ' ')} {shown(d.choice, what[0])}: {d.at_least:.3f} s at best; "
                f"about {d.bytes / GIB:.1f} GiB of {best.request.memory_bytes / GIB:.1f}"
            )


def shown(choice: Choice, what: str) -> str:
    """One field of a choice in words."""
    if what == "layout":
        return f"{choice.stages} × {choice.tensor} × {choice.data}"
    if what == "schedule":
        return choice.schedule + (f" of {choice.chunks} chunks" if choice.chunks else "")
    return str(getattr(choice, what))


def front(plans: Sequence[Plan]) -> list[Plan]:
    """The Pareto front: plans that no other beats in both time and memory, fastest first."""
    found: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.step_seconds, bytes_of(plan))):
        if not found or bytes_of(plan) < bytes_of(found[-1]):
            found.append(plan)
    return found


def bytes_of(plan: Plan) -> float:
    """Compiled if available, else estimated."""
    return plan.estimated.peak if plan.compiled_bytes is None else plan.compiled_bytes


def draw(plans: Sequence[Plan], request: Request, path: Path) -> None:
    """Plot step time against memory for every plan; those on the Pareto front are connected and labeled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(plan.choice.method for plan in plans):
        mine = [plan for plan in plans if plan.choice.method == method]
        axes.plot([bytes_of(p) / GIB for p in mine], [p.step_seconds for p in mine], "o", markersize=4, label=method)
    best = front(plans)
    axes.plot([bytes_of(p) / GIB for p in best], [p.step_seconds for p in best], "-", color="black", zorder=0)
    named = {f"{c.stages}×{c.tensor}×{c.data} {c.schedule}, {c.microbatch_size}": p for p in best for c in [p.choice]}
    for words, plan in named.items():
        at, far = (bytes_of(plan) / GIB, plan.step_seconds), bytes_of(plan) > 0.8 * request.memory_bytes
        side = {"ha": "right", "xytext": (4, -10)} if far else {"xytext": (4, 4)}
        axes.annotate(words, at, fontsize=7, textcoords="offset points", **side)
    axes.axvline(request.memory_bytes / GIB, color="black", linestyle=":", label="memory")
    axes.set_xlabel("GiB a GPU")
    axes.set_ylabel("seconds a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
