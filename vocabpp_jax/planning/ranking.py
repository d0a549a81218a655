"""Ranks choices by simulated step time, best first, with as few simulations as possible.

The durations alone give a lower bound on a step (:func:`.bound.least_seconds`), and choices are visited in the order of
their bounds. Those that do not fit are set aside. The others are simulated with few microbatches and extrapolated with
the steady state. Where the order of passes can be fitted to the durations, that is done once per schedule, method and
number of stages, and the result is simulated with the durations of the other choices. The search ends when the
requested number of plans has been simulated and no other choice is expected to beat the last of them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from math import inf
from typing import Any

import numpy as np

from ..schedules import Durations, Program, Schedule, lower, simulate
from ..schedules.fit import Times
from ..schedules.fitting import Fit, Fitter
from ..schedules.simulation.cost import Cost
from ..schedules.simulation.simulator import GPU, ON_CPUS, Rules
from ..schedules.simulation.step_cost import StepCost
from ..schedules.simulation.timeline import Timeline
from .bound import least_seconds
from .footprint import MARGIN, Bytes, Footprint
from .plans import Dropped, Plan, Ranked
from .request import Choice, Request

SMALL = 4  # stages of the small problem that estimates the gain from fitting
SMALLEST = 40  # choices among which the smallest is named if none fits
AHEAD = 4  # choices to look ahead for fits that will be needed


class Ranking:
    """The ranking of one request. ``say`` receives progress messages, one sentence at a time."""

    def __init__(self, request: Request, say: Callable[[str], None] = lambda line: None):
        self.request, self.say = request, say
        self.rules: Rules = GPU if request.gpu.overlaps else ON_CPUS
        self._ones: dict[Any, Schedule] = {}
        self._programs: dict[Any, Program] = {}
        self._fitter = Fitter()
        self._gains: dict[Any, float] = {}
        self._durations: dict[Any, Durations] = {}
        self._timelines: dict[Any, Timeline] = {}

    def best(self, wanted: int, memory_bytes: float | None = None) -> Ranked:
        """The ``wanted`` best plans, or fewer if fewer fit; ``memory_bytes`` overrides the request's.

        Raises:
            ValueError: nothing can run, or nothing fits.
        """
        usable = (self.request.memory_bytes if memory_bytes is None else memory_bytes) * (1 - MARGIN)
        number = itertools.count()
        heap = [(bound, next(number), "bound", choice) for bound, choice in self._bounds]
        heapq.heapify(heap)
        plans: list[Plan] = []
        dropped: list[Dropped] = []
        while heap and len(plans) < wanted:
            seconds, _, known, choice = heapq.heappop(heap)
            if known == "simulated":
                plan = self.plan(choice)
                if (needed := plan.estimated.peak) > usable:  # the fitted order has other ring sizes
                    dropped.append(Dropped(choice, seconds, needed))
                    continue
                plans.append(plan)
                self.say(f"{len(plans)} of {wanted}: {choice}, {seconds:.2f} s; {len(self._timelines)} simulated")
                continue
            if known == "bound" and (needed := self.bytes(choice, usable).peak) > usable:
                dropped.append(Dropped(choice, seconds, needed))
                continue
            if known == "bound" and self.can_fit(choice):
                expected = self.seconds(choice, self.program(choice)) * self.gain(choice)
                heapq.heappush(heap, (max(seconds, expected), next(number), "repeated", choice))
                continue
            if known == "repeated":
                self._begin_fitting([choice, *(c for _, _, k, c in heapq.nsmallest(AHEAD, heap) if k == known)])
            heapq.heappush(heap, (self.step_seconds(choice), next(number), "simulated", choice))
        if not plans:
            raise ValueError(self._why_none(dropped))
        plans.sort(key=lambda plan: plan.step_seconds)
        return Ranked(tuple(plans), tuple(dropped), len(self._bounds), len(self._timelines))

    def smaller(self, plan: Plan, steps: int = 8) -> list[Plan]:
        """Plans with less and less memory: each the fastest that takes a tenth less than the previous one."""
        found = [plan]
        while len(found) <= steps:
            try:
                found += self.best(1, 0.9 * found[-1].estimated.peak).plans
            except ValueError:
                break
        return found[1:]

    @cached_property
    def _bounds(self) -> list[tuple[float, Choice]]:
        """Every choice with its lower bound."""
        choices = self.request.choices()
        self.say(f"{len(choices):,} choices")
        for choice in {(c.schedule, c.method): c for c in choices if c.tensor == 1 and self.can_fit(c)}.values():
            few = self._few(choice)
            self._fitter.begin(self._of_gain(choice), self._fit(few, few.stages * 3 + 8, self._level(choice)))
        return [(self.bound(choice), choice) for choice in choices]

    def plan(self, choice: Choice) -> Plan:
        """The expected performance of a choice."""
        program, cost, m = self.best_program(choice), self.cost(choice), self.request.microbatches(choice)
        timeline, whole = self.timeline(choice, program), self.seconds(choice, program)
        busy = float(timeline.busy.mean()) * m / program.schedule.m
        sums = m * cost.tensor_sums(self.one(choice))
        data = cost.gradient_sums(self.footprint(choice).parameters, choice.stages)
        return Plan(
            self.request,
            choice,
            whole,
            bubble=max(0.0, whole - self._outside(choice) - busy) / whole,
            communication=(sums + data) / whole,
            estimated=self.footprint(choice).bytes(program),
        )

    # --- seconds -----------------------------------------------------------------------------------------------------

    def step_seconds(self, choice: Choice) -> float:
        """Seconds of a step, with the best known order of passes."""
        return self.seconds(choice, self.best_program(choice))

    def best_program(self, choice: Choice) -> Program:
        """The repeated block's program, or the fitted one if that is faster with the choice's durations."""
        own = [self.program(choice)]
        if self.can_fit(choice):
            self._begin_fitting([choice])
            own.append(self._fitter.result(self._of_fit(choice)))
        return min(own, key=lambda program: self.seconds(choice, program))

    def seconds(self, choice: Choice, program: Program) -> float:
        """Seconds of a step, extrapolated from a program with fewer microbatches."""
        timeline = self.timeline(choice, program)
        more = self.request.microbatches(choice) - timeline.schedule.m
        return timeline.makespan + (more * timeline.steady_interval if more else 0.0) + self._outside(choice)

    def _outside(self, choice: Choice) -> float:
        """Seconds after the passes: the gradient all-reduce over the data axis, and the optimizer."""
        n, cost = self.footprint(choice).parameters, self.cost(choice)
        return cost.gradient_sums(n, choice.stages) + cost.update(n)

    def timeline(self, choice: Choice, program: Program) -> Timeline:
        """A program simulated with a choice's durations."""
        key = id(program), self._of_durations(choice)
        if key not in self._timelines:
            self._timelines[key] = simulate(program, self.durations(choice), self.rules)
        return self._timelines[key]

    def bound(self, choice: Choice) -> float:
        """A lower bound on the seconds of a step."""
        passes = least_seconds(
            self.one(choice), self.durations(choice), self.request.microbatches(choice), self.request.gpu.overlaps
        )
        return passes + self._outside(choice)

    def durations(self, choice: Choice) -> Durations:
        """Durations of the choice's passes."""
        key = self._of_durations(choice)
        if key not in self._durations:
            self._durations[key] = self.cost(choice).durations(self.one(choice))
        return self._durations[key]

    def cost(self, choice: Choice) -> StepCost:
        """The cost of a step."""
        part, whole = (
            self.request.layer_part(n, next(iter(self.request.models)), False).stored for n in (choice.tensor, 1)
        )
        return StepCost(
            Cost(replace(self.request.sizes, microbatch_size=choice.microbatch_size), self.request.gpu),
            choice.tensor,
            choice.data,
            choice.shard_optimizer,
            recompute=choice.residuals == "full",
            share=part / whole,
        )

    # --- programs ----------------------------------------------------------------------------------------------------

    def one(self, choice: Choice) -> Schedule:
        """The schedule for one microbatch, which gives the placement."""
        key = self._of_schedule(choice)
        if key not in self._ones:
            self._ones[key] = self.request.schedule(choice, 1)
        return self._ones[key]

    def program(self, choice: Choice) -> Program:
        """The repeated block's program, with enough microbatches to show the steady state."""
        key = self._of_fit(choice)
        if key not in self._programs:
            self._programs[key] = lower(self.request.schedule(choice, self.trial(choice)))
        return self._programs[key]

    def can_fit(self, choice: Choice) -> bool:
        """Whether the order of passes can follow their durations."""
        return self.one(choice).splits_backward and self.request.gpu.overlaps

    def _begin_fitting(self, choices: Iterable[Choice]) -> None:
        """Fit the choices' programs, each to the durations of the first choice with its schedule."""
        for choice in choices:
            if (key := self._of_fit(choice)) not in self._fitter:
                self.say(f"fitting {choice.schedule} with {choice.method} on {choice.stages} stages")
                self._fitter.begin(key, self._fit(choice, self.trial(choice), self.cost(choice).durations))

    def _fit(self, choice: Choice, m: int, durations: Times) -> Fit:
        return Fit(self.request.arguments(choice, m), durations, self.rules)

    def gain(self, choice: Choice) -> float:
        """The fraction of the repeated block's time that remains after fitting, measured with few stages."""
        key = self._of_gain(choice)
        if key not in self._gains:
            few, times = self._few(choice), self._level(choice)
            self._fitter.begin(key, self._fit(few, 3 * few.stages + 8, times))
            fitted = self._fitter.result(key)
            plain = lower(self.request.schedule(few, fitted.schedule.m))
            fitted, plain = (simulate(program, times, self.rules).makespan for program in (fitted, plain))
            self._gains[key] = min(1.0, fitted / plain)
        return self._gains[key]

    def _few(self, choice: Choice) -> Choice:
        return replace(choice, stages=min(SMALL, choice.stages))

    def _level(self, choice: Choice) -> Durations:
        """A choice's durations, averaged to be the same for all stages."""
        given = self.durations(choice)
        return Durations(**{name: float(np.mean(getattr(given, name))) for name in Durations.__dataclass_fields__})

    def _of_gain(self, choice: Choice) -> tuple:
        return "gain", choice.schedule, choice.method

    def _of_fit(self, choice: Choice) -> tuple:
        return self._of_schedule(choice), self.trial(choice)

    def trial(self, choice: Choice) -> int:
        """Microbatches to simulate: enough for the steady state, with the same remainder as the full number where they
        come in groups."""
        m, p = self.request.microbatches(choice), choice.stages
        enough = (4 if choice.chunks else 3) * p + 8
        if choice.schedule == "gpipe" or m <= enough:  # gpipe runs all forwards first
            return m
        return enough + (m - enough) % p if choice.chunks else enough

    def _of_schedule(self, choice: Choice) -> tuple:
        return choice.stages, choice.schedule, choice.method, choice.chunks

    def _of_durations(self, choice: Choice) -> tuple:
        apart = {copy * choice.stages * choice.tensor % self.request.gpu.gpus_per_node for copy in range(choice.data)}
        own = choice.tensor, choice.microbatch_size, choice.residuals, frozenset(apart)
        return self._of_schedule(choice), own

    # --- bytes -------------------------------------------------------------------------------------------------------

    def footprint(self, choice: Choice) -> Footprint:
        """What a device holds."""
        return Footprint(self.request, choice, self.one(choice))

    def bytes(self, choice: Choice, usable: float = inf) -> Bytes:
        """The estimate; if the state alone exceeds ``usable``, only the state."""
        footprint = self.footprint(choice)
        least = footprint.bytes()
        return least if least.peak > usable else footprint.bytes(self.program(choice))

    def _why_none(self, dropped: list[Dropped]) -> str:
        # For most choices only the state has been counted.
        smallest = sorted(dropped, key=lambda d: d.bytes)[:SMALLEST]
        needed, least = min(((self.bytes(d.choice).peak, d) for d in smallest), key=lambda each: each[0])
        gib = 2**30
        return (
            f"memory is {self.request.memory_bytes / gib:.1f} GiB, and no plan fits; the smallest, {least.choice}, "
            f"takes about {needed / (1 - MARGIN) / gib:.1f} GiB: give that much, or more GPUs than {self.request.gpus}"
        )
