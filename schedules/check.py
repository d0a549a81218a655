"""Rejects schedules that could not run; messages name the pass and the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from .schedule import AFTER, PASSES, TRANSFERS, Schedule, Step

KINDS = ("F", "B", "W")


class ScheduleError(ValueError):
    """A schedule that could not run, or not within its memory."""


def check(schedule: Schedule, in_flight: int | Sequence[int] | None = None) -> None:
    """Check all passes and all steps of the vocabulary layers.

    Args:
        in_flight: the most activations of a stage that a device may hold, one number or one per device.

    Raises:
        ScheduleError: a pass or step is missing, duplicated or on the wrong device; one comes before what it depends
            on; two overlap on a device; devices would reach collectives in different orders; or the bound is exceeded.
    """
    start, last = _pass_times(schedule)
    _check_overlaps(schedule)
    _check_order(schedule, start, last)
    _check_steps(schedule)
    _check_collectives(schedule)
    _check_steps_order(schedule)
    _check_steps_against_passes(schedule, last)
    if in_flight is not None:
        _check_in_flight(schedule, in_flight)


# --- passes ----------------------------------------------------------------------------------------------------------

Times = dict[str, np.ndarray]  # by kind, [stages, m]


def _pass_times(schedule: Schedule) -> tuple[Times, Times]:
    """First and last slots of every pass; rejects passes that are missing, duplicated, misplaced or unknown."""
    shape = (schedule.stages, schedule.m)
    kinds = KINDS[: 1 + schedule.trains + (schedule.trains and schedule.splits_backward)]
    start, last, count = ({k: np.zeros(shape, int) for k in KINDS} for _ in range(3))
    for d, passes in enumerate(schedule.passes):
        for x in passes:
            if x.kind not in KINDS or not (0 <= x.stage < shape[0] and 0 <= x.microbatch < shape[1]) or x.slots < 1:
                raise ScheduleError(
                    f"device {d} runs {x} in {x.slots} slots; kinds are F, B and W, stages 0 to "
                    f"{shape[0] - 1}, microbatches 0 to {shape[1] - 1}, slots at least 1"
                )
            if schedule.placement[x.stage] != d:
                raise ScheduleError(f"device {d} runs {x}; stage {x.stage} is on device {schedule.placement[x.stage]}")
            count[x.kind][x.stage, x.microbatch] += 1
            start[x.kind][x.stage, x.microbatch], last[x.kind][x.stage, x.microbatch] = x.start, x.last
    for kind in KINDS:
        expected = int(kind in kinds)
        for stage, i in np.argwhere(count[kind] != expected)[:1].tolist():
            n = count[kind][stage, i]
            raise ScheduleError(
                f"device {schedule.placement[stage]} runs {stage}{kind}{i} {n} times; "
                f"this schedule has it {'once' if expected else 'not at all'}"
            )
    return {k: start[k] for k in kinds}, {k: last[k] for k in kinds}


def _check_overlaps(schedule: Schedule) -> None:
    for d, passes in enumerate(schedule.passes):
        for before, x in zip(passes[:-1], passes[1:], strict=True):
            if x.start <= before.last:
                raise ScheduleError(
                    f"device {d}: {x} starts in slot {x.start}, listed after {before}, which ends in slot "
                    f"{before.last}; a device runs one pass at a time, listed in order"
                )


def _check_order(schedule: Schedule, start: Times, last: Times) -> None:
    """Check that every pass comes after the one whose output it reads."""

    def after(kind: str, stages: slice, needed: str, of: slice) -> None:
        early = start[kind][stages] <= last[needed][of]
        for n, i in np.argwhere(early)[:1].tolist():
            stage, other = range(schedule.stages)[stages][n], range(schedule.stages)[of][n]
            raise ScheduleError(
                f"device {schedule.placement[stage]}: {stage}{kind}{i} starts in slot "
                f"{start[kind][stage, i]}, but {other}{needed}{i} on device {schedule.placement[other]}, "
                f"which it depends on, ends in slot {last[needed][other, i]}"
            )

    everything, but_first, but_last, only_last = slice(None), slice(1, None), slice(None, -1), slice(-1, None)
    after("F", but_first, "F", but_last)
    if "B" in start:
        after("B", only_last, "F", only_last)
        after("B", but_last, "B", but_first)
        after("B", everything, "F", everything)
    if "W" in start:
        after("W", everything, "B", everything)


def _check_in_flight(schedule: Schedule, in_flight: int | Sequence[int]) -> None:
    bounds = [in_flight] * schedule.p if isinstance(in_flight, int) else list(in_flight)
    if len(bounds) != schedule.p:
        raise ValueError(f"in_flight has {len(bounds)} entries; give one, or one for each of the {schedule.p} devices")
    frees = "W" if schedule.splits_backward else "B"
    for d, passes in enumerate(schedule.passes):
        held = 0
        for x in passes:
            held += (x.kind == "F") - (x.kind == frees)
            if held > bounds[d]:
                raise ScheduleError(
                    f"device {d}: {x} in slot {x.start} makes {held} activations in flight; the bound is {bounds[d]}"
                )


# --- steps of the vocabulary layers ----------------------------------------------------------------------------------


def _name(step: Step) -> str:
    return step.name if step.op == "run" else f"{step.op} {step.name}"


def _expected(schedule: Schedule) -> tuple[str, ...]:
    """The steps that a schedule with these passes must have."""
    if not schedule.sharded:
        return ("IF", "H") + ("IB",) * schedule.trains
    split = any(step.name in ("S1", "S2", "max") for step in schedule.vocabulary.steps)
    softmax = ("S1", "start max", "done max", "S2") if split else ("S",)
    sums = ("start embed_sum", "done embed_sum", "start hidden_broadcast", "done hidden_broadcast")
    forward = ("IF", *sums, *softmax, "start stats", "done stats")
    sums = ("start grad_sum", "done grad_sum", "G", "start embed_grad_broadcast", "done embed_grad_broadcast")
    backward = ("T", *sums, "IB")
    return forward + backward * schedule.trains


def _check_steps(schedule: Schedule) -> None:
    """Check that every step is there once, on the devices that take part in it."""
    found = Counter(_name(step) for step in schedule.vocabulary.steps)
    expected = _expected(schedule)
    for name in sorted(found.keys() | set(expected)):
        if found[name] != (name in expected):
            raise ScheduleError(
                f"the vocabulary layers have {name} {found[name]} times; "
                f"this schedule needs {', '.join(expected)}, each once"
            )
    one_device = {"G": schedule.placement[-1], "H": schedule.placement[-1]}
    if not schedule.sharded:
        one_device |= {"IF": schedule.placement[0], "IB": schedule.placement[0]}
    for step in schedule.vocabulary.steps:
        if len(step.at) != schedule.p:
            raise ScheduleError(
                f"{_name(step)} has {len(step.at)} places; give one for each of the {schedule.p} devices"
            )
        for d, at in enumerate(step.at):
            concerned = d == one_device.get(_name(step), d)
            if (at is not None) != concerned:
                raise ScheduleError(
                    f"device {d} {'lacks' if concerned else 'has'} {_name(step)}, which "
                    f"{'every device runs' if _name(step) not in one_device else 'another runs'}"
                )
        shifts = _shifts(schedule, step)
        if len(shifts) != schedule.m or shifts[0] != 0:
            raise ScheduleError(
                f"shifts of {_name(step)} are {shifts}; give one for each of the {schedule.m} microbatches, "
                "0 for the first"
            )
        if schedule.sharded and any(b <= a for a, b in zip(shifts[:-1], shifts[1:], strict=True)):
            raise ScheduleError(
                f"shifts of {_name(step)} are {shifts}; all devices process microbatches in the order 0 to m - 1"
            )


def _shifts(schedule: Schedule, step: Step) -> tuple[int, ...]:
    return schedule.vocabulary.shifts if step.shifts is None else step.shifts


def _check_collectives(schedule: Schedule) -> None:
    """Check that collectives are at the same place on every device; otherwise devices reach them in different orders
    and wait forever."""
    for step in schedule.vocabulary.steps:
        for d, at in enumerate(step.at):
            if step.op != "run" and at != step.at[0]:
                raise ScheduleError(
                    f"{_name(step)} is in slot {at} on device {d} and in slot {step.at[0]} on device 0; "
                    "a collective is at the same place on every device"
                )


class _Places:
    """Places as numbers that sort like (slot, rank, order)."""

    def __init__(self, schedule: Schedule):
        self.n = len(schedule.vocabulary.steps) + 1
        self.steps = {_name(step): (step, order) for order, step in enumerate(schedule.vocabulary.steps)}
        self.shifts = {name: np.array(_shifts(schedule, step)) for name, (step, _) in self.steps.items()}

    def slots(self, name: str, device: int) -> np.ndarray:
        """The slot of a step, for every microbatch."""
        return self.steps[name][0].at[device] + self.shifts[name]

    def of(self, name: str, device: int) -> np.ndarray:
        """The place of a step, for every microbatch."""
        step, order = self.steps[name]
        return (self.slots(name, device) * (AFTER + 1) + step.place) * self.n + order

    def of_passes(self, last: np.ndarray, rank: int) -> np.ndarray:
        """The place of passes, or of what follows them."""
        return (last * (AFTER + 1) + rank) * self.n


def _dependencies(schedule: Schedule) -> Iterator[tuple[str, str, bool]]:
    """Triples: a step, the step it depends on, and whether it belongs to the next microbatch.

    In that case, it overwrites what the earlier one reads.
    """
    for name in ("embed_sum", "hidden_broadcast", "max", "stats", "grad_sum", "embed_grad_broadcast"):
        yield f"done {name}", f"start {name}", False
        yield f"start {name}", f"done {name}", True
    yield from (
        ("start embed_sum", "IF", False),
        ("IF", "start embed_sum", True),
        ("S", "done hidden_broadcast", False),
        ("S1", "done hidden_broadcast", False),
        ("start stats", "S", False),
        ("start max", "S1", False),
        ("S2", "done max", False),
        ("start stats", "S2", False),
        ("T", "done stats", False),
        ("start grad_sum", "done stats", False),
        ("G", "done grad_sum", False),
        ("start grad_sum", "G", True),
        ("IB", "done embed_grad_broadcast", False),
        ("start embed_grad_broadcast", "IB", True),
    )
    if schedule.sums_before_T:
        yield "S", "start grad_sum", True
    else:
        yield from (("start grad_sum", "T", False), ("T", "start grad_sum", True))


def _check_steps_order(schedule: Schedule) -> None:
    places = _Places(schedule)
    for name, earlier, next_microbatch in _dependencies(schedule):
        if name not in places.steps or earlier not in places.steps:
            continue
        later = slice(1, None) if next_microbatch else slice(None)
        for d in range(schedule.p):
            if any(places.steps[n][0].at[d] is None for n in (name, earlier)):
                continue
            at, before = places.of(name, d)[later], places.of(earlier, d)[: schedule.m - next_microbatch]
            for n in np.flatnonzero(at <= before)[:1].tolist():
                i = n + next_microbatch
                raise ScheduleError(
                    f"device {d}: {name} of microbatch {i} in slot {places.slots(name, d)[i]} comes before "
                    f"{earlier} of {n} in slot {places.slots(earlier, d)[n]}, which must have ended"
                )


def _check_steps_against_passes(schedule: Schedule, last: Times) -> None:
    """Check that the input layer comes before the first F, the output layer between the last F and B, and IB after the
    first stage's B."""
    places = _Places(schedule)
    first, final = schedule.placement[0], schedule.placement[-1]

    def compare(step: str, device: int, kind: str, stage: int, step_first: bool) -> None:
        at = places.of(step, device)
        passes = places.of_passes(last[kind][stage], PASSES if step_first else TRANSFERS)
        for i in np.flatnonzero((at >= passes) if step_first else (at <= passes))[:1].tolist():
            raise ScheduleError(
                f"device {device}: {step} of microbatch {i} in slot {places.slots(step, device)[i]} comes "
                f"{'after' if step_first else 'before'} {stage % schedule.stages}{kind}{i}, which ends in slot "
                f"{last[kind][stage, i]} and {'needs it' if step_first else 'produces its input'}"
            )

    compare("done embed_sum" if schedule.sharded else "IF", first, "F", 0, True)
    compare("start hidden_broadcast" if schedule.sharded else "H", final, "F", -1, False)
    if schedule.trains:
        compare("G" if schedule.sharded else "H", final, "B", -1, True)
        compare("start embed_grad_broadcast" if schedule.sharded else "IB", first, "B", 0, False)
