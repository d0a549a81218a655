"""The real time of every pass, and the step time that the simulator predicts from it.

A pass is timed as the executor runs it: a program with only that instruction, interval after interval, on all devices
that run it, compared with a program without it. Sums that are not stored anywhere are timed with the pass that reads
them. In a real step, other passes come between two of the same kind. Here a filler instruction does, which the
comparison program has too: for long passes, a sweep over memory, which evicts the caches as other passes would; for
short ones and for transfers, one that changes the buffers that are sent, since the compiler would otherwise send an
unchanged buffer only once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vocabpp_jax import Pipeline
from vocabpp_jax.pipeline.buffers import Cells, State, run_if
from vocabpp_jax.pipeline.executor import Executor
from vocabpp_jax.schedules import COMPILED, ON_CPUS, Durations, Instruction, Program, Segment, simulate

RINGS = {"deliver": "inbox"}  # tables not named after the ring they index
LONG = ("F", "B", "W", "S", "S1", "S2", "T", "H")  # all others are so short that they need more intervals to be visible
SWEPT = 2**24  # float32 values that a sweep changes: 64 MiB, more than caches hold
# The filler instructions between passes, and what they change.
BETWEEN = {"sweep": ("swept",), "perturb": ("inbox", "out", "A", "P")}
# Collectives whose results are not stored anywhere, and the pass timed with each.
_TIMED_WITH = {"embed_sum": "IF", "grad_sum": "G", "embed_grad_broadcast": "IB"}


@dataclass(frozen=True)
class Excerpt(Pipeline):
    """A pipeline that repeats some of a program's instructions, with a filler instruction in between."""

    whole: Program | None = None
    body: tuple[Instruction, ...] = ()
    intervals: int = 0
    between: str = "perturb"

    @property
    def program(self) -> Program:
        nothing = np.zeros((self.intervals, self.schedule.p), np.int32)
        between = Instruction("run", self.between, 0, 0, tables={"nothing": nothing})
        segments = (Segment(0, self.intervals, (between, *self.body)),) if self.intervals else ()
        return replace(self.whole, segments=segments)

    def _executor(self, *arguments: Any) -> Executor:
        return _Between(**vars(super()._executor(*arguments)))

    def _gradients(self, state: dict[str, Any], params: Any) -> Any:
        """The gradients, with all of the state kept live: the compiler would drop whatever nothing reads."""
        grads = super()._gradients(state, params)
        read = [x.reshape(-1)[0] for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
        invalid = jnp.isnan(sum(x.astype(jnp.float32) for x in read)).astype(jnp.float32)
        return grads | {"final": jax.tree.map(lambda g: g + invalid, grads["final"])}


class _Between(Executor):
    """An executor with two additional instructions."""

    def initial_state(self) -> State:
        sweeps = any(i.name == "sweep" for segment in self.program.segments for i in segment.body)
        return super().initial_state() | ({"swept": jnp.zeros(SWEPT, jnp.float32)} if sweeps else {})

    def execute(self, instruction: Instruction, cells: Cells, state: State) -> State:
        if instruction.name not in BETWEEN:
            return super().execute(instruction, cells, state)
        names = tuple(name for name in BETWEEN[instruction.name] if name in state)
        changed = lambda s: s | {name: _changed(s[name]) for name in names}  # noqa: E731
        return run_if(cells["nothing"] == 0, state, names, changed)


def _changed(entry: Any) -> Any:
    """A buffer with other values; for a record, only the row statistics, which are the part that is sent."""
    if isinstance(entry, dict):
        return entry | {"local": jax.tree.map(_changed, entry["local"])}
    return entry + 1


@dataclass(frozen=True)
class _Timed:
    """A compiled excerpt, its number of intervals, and the key of the same step without its passes."""

    run: Callable[[], Any]
    intervals: int
    nothing: Any


@dataclass
class PassTimes:
    """Measures passes once for all schedules that share them. Times are seconds.

    They are timed in rounds, each pass once per round, so that a slow moment of the machine affects only one round, and
    so that rounds can alternate with those of the steps they are to predict.

    Attributes:
        intervals: repeats of a pass in a timed program; ``more`` times as many if it is short.
    """

    intervals: int = 12
    more: int = 8
    _timed: dict[Any, _Timed] = field(default_factory=dict)
    _rounds: list[dict[Any, float]] = field(default_factory=list)

    def prepare(self, pipe: Pipeline, params: Any, batch: Any) -> None:
        """Compile whatever a pipeline's program needs timed that is not compiled yet, and run it once."""
        excerpts: dict[Any, Excerpt] = {}

        def ask(body: Sequence[Instruction], devices: tuple[int, ...] | None, key: Any) -> float:
            excerpts[_named(pipe, key)] = self._excerpt(pipe, body, devices)
            return 0.0

        durations_of(pipe, ask)
        of_none = [replace(excerpt, body=()) for excerpt in excerpts.values()]
        of_none.append(replace(of_none[0], intervals=0, between=""))
        for key, excerpt in ({_nothing(pipe, of.between): of for of in of_none} | excerpts).items():
            if key not in self._timed:
                step = excerpt.jit(excerpt.value_and_grad).lower(params, batch).compile()
                run = partial(step, params, batch)
                jax.block_until_ready(run())
                self._timed[key] = _Timed(run, excerpt.intervals, _nothing(pipe, excerpt.between))

    def round(self, timed: Callable[[Callable], float]) -> None:
        """Time everything once."""
        self._rounds.append({key: timed(of.run) for key, of in self._timed.items()})

    def predict(self, pipe: Pipeline) -> dict[str, Any]:
        """The simulated step, in ms: the passes, plus the cost of a step without any."""
        found, outside = self.durations(pipe), self._outside(pipe)
        on_cpus = pipe.mesh.devices.flat[0].platform == "cpu"
        timeline = simulate(pipe.program, found, ON_CPUS if on_cpus else COMPILED)
        return {
            "predicted_ms": 1e3 * (timeline.makespan + outside),
            "outside_ms": 1e3 * outside,
            "busy_ms": (1e3 * timeline.busy).tolist(),
            "pass_ms": {f.name: _thousandfold(getattr(found, f.name)) for f in fields(found)},
        }

    def account(self, pipe: Pipeline) -> dict[str, float]:
        """Milliseconds per step by kind of pass, if all devices take turns on one core: the time of a pass on several
        devices is then the sum of theirs."""
        found = self.durations(pipe)
        total: dict[str, float] = {"outside passes": self._outside(pipe)}
        for kind in (f.name for f in fields(found) if f.name != "transfer"):
            times = getattr(found, kind)
            if kind in ("F", "B", "W") and isinstance(times, tuple):
                # Stages of one chunk with the same number of layers were timed together.
                parts = [t for stages in pipe.layout.stage_of for t in {times[s] for s in stages}]
            else:
                parts = set(times) if isinstance(times, tuple) else {times}
            total[kind] = pipe.schedule.m * sum(parts)
        for segment in pipe.program.segments:
            for i in segment.body:
                if i.op == "permute":
                    took = max(found.transfer[a][b] for a, b in i.pairs)
                    total["transfers"] = total.get("transfers", 0.0) + segment.intervals * took
        return {kind: 1e3 * seconds for kind, seconds in total.items()}

    def durations(self, pipe: Pipeline) -> Durations:
        """The time of every pass and collective in the pipeline's program: the median of the rounds."""
        return durations_of(pipe, lambda body, devices, key: self._seconds(_named(pipe, key)))

    def _seconds(self, key: Any) -> float:
        of = self._timed[key]
        return max(0.0, median(took[key] - took[of.nothing] for took in self._rounds) / of.intervals)

    def _outside(self, pipe: Pipeline) -> float:
        return median(took[_nothing(pipe, "")] for took in self._rounds)

    def _excerpt(self, pipe: Pipeline, body: Sequence[Instruction], devices: tuple[int, ...] | None) -> Excerpt:
        """A step that runs only a body, on some devices or on all."""
        long = any(i.name in LONG for i in body)
        intervals = self.intervals * (1 if long else self.more)
        return Excerpt(
            pipe.model,
            pipe.schedule,
            pipe.mesh,
            pipe.compute_dtype,
            whole=pipe.program,
            body=tuple(again(pipe, i, intervals, devices) for i in body),
            intervals=intervals,
            between="sweep" if long else "perturb",
        )


Seconds = Callable[[Sequence[Instruction], "tuple[int, ...] | None", Any], float]


def durations_of(pipe: Pipeline, seconds: Seconds) -> Durations:
    """Durations from the seconds of bodies: what runs, on which devices (None for all), and its key."""
    schedule, layout = pipe.schedule, pipe.layout
    whole: dict[tuple[str, str], Instruction] = {}
    for segment in pipe.program.segments:
        for i in segment.body:
            whole.setdefault((i.op, i.name if i.op != "permute" else str(i.pairs)), i)
    times: dict[str, Any] = {"B": 0.0}
    kinds = {name for op, name in whole if op == "run"}
    for kind in ("F", "B", "W"):
        if kind in kinds:
            times[kind] = _stages(pipe, whole["run", kind], seconds)
    shared = (schedule.splits_backward, layout.sharded, "S1" in kinds, _early(pipe))
    for kind in sorted(kinds - {"F", "B", "W", "IF"}):  # in the same order on every rank
        i = whole["run", kind]
        devices = np.flatnonzero((i.tables["microbatch"] >= 0).any(axis=0))
        took = seconds([i], tuple(devices.tolist()), (kind, shared))
        times[kind] = tuple(took if d in devices else 0.0 for d in range(schedule.p))
    for name in sorted({name for op, name in whole if op == "start"}, key=lambda n: (n in _TIMED_WITH, n)):
        reads = _TIMED_WITH.get(name)
        ends = [whole["start", name], whole["done", name]]
        if name == "embed_sum":  # the lookup's result is used only by its sum
            both = seconds([whole["run", reads], *ends], None, (name, shared))
            times["embed_sum"] = min(both, times["hidden_broadcast"])
            times["IF"] = (both - times["embed_sum"],) * schedule.p
        elif reads:
            took = seconds([*ends, whole["run", reads]], None, (name, shared))
            times[name] = max(0.0, took - max(times[reads]))
        else:
            times[name] = seconds(ends, None, (name, shared))
    if "IF" in kinds and "embed_sum" not in times:
        first = schedule.placement[0]
        took = seconds([whole["run", "IF"]], (first,), ("IF", shared))
        times["IF"] = tuple(took if d == first else 0.0 for d in range(schedule.p))
    return Durations(**times, transfer=_transfers(schedule.p, whole, seconds))


def _stages(pipe: Pipeline, instruction: Instruction, seconds: Seconds) -> tuple[float, ...]:
    """The time of a pass for every stage: measured once per distinct number of layers."""
    layout, found = pipe.layout, {}
    for c, stages in enumerate(layout.stage_of):
        for count in sorted({layout.layer_counts[s] for s in stages} - set(found)):
            devices = tuple(d for d, s in enumerate(stages) if layout.layer_counts[s] == count)
            key = (instruction.name, count, layout.depth, len(devices), pipe.schedule.splits_backward)
            found[count] = seconds([replace(instruction, chunk=c)], devices, key)
    return tuple(found[count] for count in layout.layer_counts)


def _transfers(p: int, whole: dict, seconds: Seconds) -> tuple[tuple[float, ...], ...]:
    """The transfer time between every pair of devices; transfers that cross together are timed together."""
    matrix = np.zeros((p, p))
    for (op, _), i in whole.items():
        if op == "permute":
            took = seconds([i], None, ("permute", i.pairs))
            for source, target in i.pairs:
                matrix[source, target] = max(matrix[source, target], took)
    return tuple(map(tuple, matrix.tolist()))


def _named(pipe: Pipeline, key: Any) -> Any:
    return key, pipe.model.vocab_size, pipe.schedule.p


def _nothing(pipe: Pipeline, between: str) -> Any:
    """The key of a step without any pass, and the filler between passes, if any."""
    return ("nothing", pipe.layout, pipe.schedule.method, pipe.schedule.name, between)


def again(pipe: Pipeline, instruction: Instruction, intervals: int, devices: tuple[int, ...] | None) -> Instruction:
    """An instruction that runs in every interval on the given devices, cycling through the cells of its rings."""
    here = np.isin(np.arange(pipe.schedule.p), range(pipe.schedule.p) if devices is None else devices)
    tables = {}
    for name in instruction.tables:
        cells = pipe.schedule.m if name == "microbatch" else pipe.program.rings[RINGS.get(name, name)]
        tables[name] = np.where(here, (np.arange(intervals) % cells)[:, None], -1).astype(np.int32)
    return replace(instruction, tables=tables)


def _early(pipe: Pipeline) -> bool:
    """Whether S computes the input gradient: T is then a different pass."""
    return pipe.schedule.method == "vocab-2"


def _thousandfold(times: Any) -> Any:
    return [_thousandfold(t) for t in times] if isinstance(times, tuple) else 1e3 * times
