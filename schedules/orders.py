"""A schedule from free-form orders: for every device, the passes it runs, one after the other.

The grammar is that of torch's pipelines: stage, kind, microbatch, as in ``0F0 1F0 1B0 0B0``. With W passes, torch
writes I for a backward that computes only the input gradient, and B for one that computes both. Every pass starts as
soon as the device is free and its input is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .check import ScheduleError, check
from .schedule import Pass, Schedule, Vocabulary
from .vocabulary import METHODS, SHARDED, unsharded

_PASS = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")


def from_orders(
    orders: Sequence[str],
    placement: Sequence[int],
    method: str = "baseline",
    *,
    interval: int | None = None,
    backward_slots: int | None = None,
    layer_counts: Sequence[int] | None = None,
    name: str = "custom",
) -> Schedule:
    """The schedule of the given orders, with the embedding on the first stage's device and the head on the last's.

    Args:
        orders: one string per device, passes separated by spaces.
        placement: the device of every stage.
        interval: slots of the program's scan step; by default those of one microbatch on a device.
        backward_slots: slots of a B; by default 1 with W passes, else 2.

    Raises:
        ValueError: a word that is not a pass, or a method that shards the vocabulary, which needs a building block.
        ScheduleError: devices that wait for each other forever, or another fault that :func:`.check` finds.
    """
    if method in SHARDED or method not in METHODS:
        raise ValueError(
            f"method is {method!r}; free-form orders support baseline and redis, building blocks all methods"
        )
    words = [[_parsed(word, d, placement) for word in order.split()] for d, order in enumerate(orders)]
    words = [_with_own_backward(order) for order in words]
    kinds = {kind for order in words for kind, _, _ in order}
    slots = {"F": 1, "B": backward_slots or (1 if "W" in kinds else 2), "W": 1}
    passes = _as_soon_as_possible(words, slots, len(placement))
    m = 1 + max((i for order in words for _, _, i in order), default=0)
    last = {(x.kind, x.stage, x.microbatch): x.last for of_device in passes for x in of_device}

    def slots_of(kind: str, stage: int) -> list[int]:
        return [last.get((kind, stage, i), 0) for i in range(m)] if kind in kinds else []

    F_last = slots_of("F", len(placement) - 1)
    steps = unsharded(placement, slots_of("F", 0), F_last, slots_of("B", 0))
    chunks = max(1, len(placement) // max(1, len(orders)))
    schedule = Schedule(
        name,
        len(orders),
        m,
        interval or chunks * sum(slots[kind] for kind in kinds),
        tuple(placement),
        passes,
        Vocabulary(method, steps, tuple(t - F_last[0] for t in F_last)),
        None if layer_counts is None else tuple(layer_counts),
    )
    check(schedule)
    return schedule


def _parsed(word: str, device: int, placement: Sequence[int]) -> tuple[str, int, int]:
    match = _PASS.fullmatch(word)
    if match is None:
        raise ValueError(
            f"device {device} runs {word!r}; a pass is a stage, F, B, I or W, and a microbatch, such as 3F0"
        )
    stage = int(match[1])
    if stage >= len(placement) or placement[stage] != device:
        where = (
            f"stage {stage} is on device {placement[stage]}"
            if stage < len(placement)
            else f"stages end at {len(placement) - 1}"
        )
        raise ScheduleError(f"device {device} runs {word}; {where}")
    return match[2], stage, int(match[3])


def _with_own_backward(order: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Convert to our kinds: torch's I is our B; with separate weight gradients, its B is our B and W."""
    split = {(stage, i) for kind, stage, i in order if kind in "IW"}
    if not split:
        return order
    made = []
    for kind, stage, i in order:
        made.append(("B" if kind == "I" else kind, stage, i))
        if kind == "B" and (stage, i) not in split:
            made.append(("W", stage, i))
    return made


def _as_soon_as_possible(
    orders: list[list[tuple[str, int, int]]], slots: dict[str, int], stages: int
) -> tuple[tuple[Pass, ...], ...]:
    """Start slots, advancing device by device as far as inputs are known, until nothing moves."""
    ends: dict[tuple[str, int, int], int] = {}
    done: list[list[Pass]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for order, of_device in zip(orders, done, strict=True):
            while len(of_device) < len(order):
                kind, stage, i = order[len(of_device)]
                needs = _inputs(kind, stage, i, stages)
                if any(need not in ends for need in needs):
                    break
                start = max([0, *(ends[need] + 1 for need in needs), *(x.last + 1 for x in of_device[-1:])])
                of_device.append(Pass(kind, stage, i, start, slots[kind]))
                ends[kind, stage, i] = of_device[-1].last
                moved = True
    for d, (order, of_device) in enumerate(zip(orders, done, strict=True)):
        if len(of_device) < len(order):
            kind, stage, i = order[len(of_device)]
            waits = next(need for need in _inputs(kind, stage, i, stages) if need not in ends)
            raise ScheduleError(
                f"device {d} waits forever: {stage}{kind}{i} needs {waits[1]}{waits[0]}{waits[2]}, "
                "which never runs or itself waits for a pass that comes after this one"
            )
    return tuple(tuple(of_device) for of_device in done)


def _inputs(kind: str, stage: int, i: int, stages: int) -> list[tuple[str, int, int]]:
    if kind == "F":
        return [("F", stage - 1, i)] if stage else []
    if kind == "W":
        return [("B", stage, i)]
    return [("F", stage, i)] + ([("B", stage + 1, i)] if stage + 1 < stages else [])
