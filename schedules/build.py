"""From a name to a schedule: building block, vocabulary passes, repetition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from . import blocks
from .blocks import Block
from .fit import Times, fit
from .reorder import can_reorder, reorder
from .repeat import repeat
from .schedule import Schedule
from .simulation.simulator import GPU, Rules
from .spelling import as_spelt
from .vocabulary import METHODS, SHARDED

_BLOCKS: dict[str, Callable[[int, int, int], Block]] = {
    "gpipe": lambda p, m, chunks: blocks.gpipe(p, m),
    "1f1b": lambda p, m, chunks: blocks.one_f_one_b(p),
    "interleaved-1f1b": lambda p, m, chunks: blocks.interleaved_one_f_one_b(p, chunks),
    "zb-h1": lambda p, m, chunks: blocks.zb_h1(p),
    "zb-h2": lambda p, m, chunks: blocks.zb_h2(p),
    "v-min": lambda p, m, chunks: blocks.v_min(p),
    "v-half": lambda p, m, chunks: blocks.v_half(p),
    "v-zb": lambda p, m, chunks: blocks.v_zb(p),
}
SCHEDULES = tuple(_BLOCKS)
ONLY_ON_1F1B = ("redis", "interlaced", "vocab-naive")


def methods_of(schedule: str) -> tuple[str, ...]:
    """The vocabulary methods that a named schedule can be built with."""
    return METHODS if schedule == "1f1b" else tuple(m for m in METHODS if m not in ONLY_ON_1F1B)


def build(
    schedule: str = "1f1b",
    method: str = "vocab-2",
    *,
    p: int,
    m: int,
    chunks: int | None = None,
    layer_counts: Sequence[int] | None = None,
    durations: Times | None = None,
    rules: Rules = GPU,
    reordered: bool = False,
    inserted: int | None = None,
    overlap: bool = True,
) -> Schedule:
    """The named schedule with the named vocabulary method.

    Args:
        schedule: one of :data:`SCHEDULES`.
        method: one of :func:`methods_of` the schedule.
        p: devices.
        m: microbatches.
        chunks: stages per device, for interleaved-1f1b; 2 by default.
        layer_counts: layers of every stage; required for method redis (see :mod:`.layers`), optional for the others.
        durations: pass and transfer times, for which :mod:`.fit` finds the best order; without them, the building block
            is repeated as it is.
        rules: what waits for what, with durations.
        reordered: without durations, whether warm-up and cool-down may differ from the steady state where that saves
            time when F, B and W take equally long; see :mod:`.reorder`.
        inserted: intervals between the last stage's F and its B, for the vocabulary passes; by default as published.
            With fewer, fewer microbatches are in flight: vocab-1 can do with 1 in schedules with W passes, v-half with
            none.
        overlap: whether collectives of the vocabulary layers may overlap with passes. If not, as suits CPUs, all steps
            of an interval run one after the other, and 1f1b keeps its devices in lockstep; it then holds 2(p - d) - 1
            microbatches in flight on device d, and durations change nothing.

    Raises:
        ValueError: an unknown name, or an invalid combination; the message names valid ones.
    """
    schedule, method = as_spelt(schedule, SCHEDULES), as_spelt(method, METHODS)
    _refuse_nonsense(schedule, method, p, m, chunks, layer_counts)
    waits = not overlap and method in SHARDED
    block = _block(schedule, method, p, m, chunks, waits)
    if layer_counts is not None and len(layer_counts) != len(block.placement):
        raise ValueError(
            f"layer_counts has {len(layer_counts)} entries; {schedule} on {p} devices has {len(block.placement)} stages"
        )
    if durations is None or waits:
        built = None
        if reordered and can_reorder(block) and not waits:
            built = reorder(block, method, m, schedule, inserted)
        built = built or repeat(block, method, m, schedule, inserted, overlap)
    else:
        built = fit(block, method, m, durations, schedule, rules=rules, inserted=inserted, layer_counts=layer_counts)
    return built if layer_counts is None else replace(built, layer_counts=tuple(layer_counts))


def _block(schedule: str, method: str, p: int, m: int, chunks: int | None, waits: bool) -> Block:
    """The block; if all devices wait for each collective, the variant in which they wait at the same time."""
    if schedule == "1f1b" and waits:
        return blocks.lockstep_1f1b(p)
    return blocks.interlaced(p) if method == "interlaced" else _BLOCKS[schedule](p, m, chunks or 2)


def _refuse_nonsense(schedule, method, p, m, chunks, layer_counts) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; the schedules are {', '.join(SCHEDULES)}")
    if method not in methods_of(schedule):
        where = "; that one runs on 1f1b" if method in METHODS else ""
        raise ValueError(f"method is {method!r}{where}; {schedule} takes {', '.join(methods_of(schedule))}")
    if p < 1 or m < 1:
        raise ValueError(f"p is {p} and m is {m}; a pipeline needs at least 1 device and 1 microbatch")
    if chunks is not None and schedule != "interleaved-1f1b":
        fixed = 2 if schedule.startswith("v-") else 1
        if chunks != fixed:
            raise ValueError(
                f"chunks is {chunks}; {schedule} has {fixed} per device, and interleaved-1f1b has any number"
            )
    if chunks is not None and chunks < 2 and schedule == "interleaved-1f1b":
        raise ValueError(f"chunks is {chunks}; interleaved-1f1b has 2 or more per device, and 1f1b has 1")
    if layer_counts is not None and any(n < 0 for n in layer_counts):
        raise ValueError(f"layer_counts is {tuple(layer_counts)}; a stage has 0 layers or more")


def evaluation(schedule: Schedule) -> Schedule:
    """Forward passes only, on the same stages and vocabulary shards: computes a loss and keeps no activations."""
    method = "vocab-2" if schedule.method in SHARDED else "baseline"
    forward = repeat(blocks.forward_only(schedule.placement), method, schedule.m, f"{schedule.name} evaluation")
    return replace(forward, layer_counts=schedule.layer_counts, depths=schedule.depths)
