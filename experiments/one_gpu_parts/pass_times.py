"""Times of all passes of the published models, as one device of their pipeline runs them.

Layers and vocabulary passes are timed separately, since neither depends on the other: F and B of a stage and of one
layer, with the backward whole and split; the passes of every vocabulary size and method, for one shard and for the
whole table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from vocabpp_jax import make_mesh, models, schedules

from . import kernels
from .gpu_sizes import Row, Size, as_run_on
from .passes import Passes, times
from .results import Results
from .timing import Compiler

LAYER_PASSES = ("F", "B", "W")
VOCABULARY_PASSES = ("IF", "S", "S1", "S2", "stats", "T", "C1", "G", "H", "IB")
_ROWS_WITHOUT_HEAD = 64  # table rows where only layers are timed
_TOGETHER, _SECONDS = 24, 3.0  # at most this many programs are compiled together, and about this many seconds for each


@dataclass(frozen=True)
class Case:
    """One program of passes: the model's sizes, and how many of its layers and rows the device holds."""

    model: str
    p: int
    seq: int
    vocab_size: int
    schedule: str
    method: str
    layers: int
    rows: int
    names: tuple[str, ...]

    @property
    def key(self) -> str:
        """The case's name in the results."""
        what = f"{self.layers} layers" if self.names == LAYER_PASSES else f"{self.rows} of {self.vocab_size} rows"
        return f"{self.model} on {self.p}, s={self.seq}, {self.schedule} {self.method}, {what}"

    def build(self, swept: int, device: jax.Device | None = None) -> Passes:
        """The passes on a device, by default the first."""
        mesh = make_mesh(1, devices=[device or jax.devices()[0]])
        config = models.named(self.model, seq=self.seq, vocab_size=self.rows, layers=self.layers)
        config = as_run_on(mesh.devices.flat[0], config)
        schedule = schedules.build(self.schedule, self.method, p=1, m=4)
        return Passes(models.build(config), schedule, mesh, config.dtype, names=self.names, swept=swept)


def layer_cases(row: Row, seq: int) -> Iterator[Case]:
    """F, B and W of a stage and of a single layer; the difference is the cost of further layers."""
    per_stage = models.named(row.model).layers // row.p
    for schedule in ("1f1b", "zb-h1"):
        for layers in sorted({per_stage, 1}, reverse=True):
            small = _ROWS_WITHOUT_HEAD
            yield Case(row.model, row.p, seq, small, schedule, "baseline", layers, small, LAYER_PASSES)


def vocabulary_cases(row: Row, seq: int) -> Iterator[Case]:
    """Vocabulary passes of one shard of p, and of the whole table for a baseline."""
    for method in row.methods:
        for V in row.vocabularies:
            rows = V if method == "baseline" else -(-V // row.p)
            yield Case(row.model, row.p, seq, V, "1f1b", method, 1, rows, VOCABULARY_PASSES)


def whole_cases(row: Row, seq: int) -> Iterator[Case]:
    """The sharded passes on a whole table, which p shards are compared with in Table 3."""
    for method in row.methods:
        if method in ("vocab-1", "vocab-2"):
            V = max(row.vocabularies)
            yield Case(row.model, row.p, seq, V, "1f1b", method, 1, V, VOCABULARY_PASSES)


def cases(size: Size) -> Iterator[Case]:
    """All cases, most valuable first."""
    for row in size.rows:
        for seq in row.sequences:
            yield from layer_cases(row, seq)
            yield from vocabulary_cases(row, seq)
            yield from whole_cases(row, seq) if row.table3 else ()


def measure(size: Size, results: Results) -> None:
    """Compile some programs, then time them, then the next: compiling also measures kernels on the same GPU."""
    kernels.measure(size, results)
    waiting = [case for case in cases(size) if not results.has(case.key)]
    while waiting:
        count = _TOGETHER if size.name == "tiny" else min(_TOGETHER, int(results.left / _SECONDS))
        if count < 1:
            results.leave_out([case.key for case in waiting])
            break
        together, waiting = waiting[:count], waiting[count:]
        with Compiler() as compiler:
            compiling = [(case, compiler.submit(lambda c=case: _compiled(c, size.swept))) for case in together]
            ready = [
                (
                    case,
                    results.attempt(
                        f"compile {case.key}",
                        lambda f=future, count=count: f.result(max(1.0, results.left - 0.5 * count)),
                    ),
                )
                for case, future in compiling
            ]
        for case, compiled in ready:
            if compiled:
                results.case(case.key, lambda c=case, p=compiled: _timed(c, p, size.repeats), needs=1)
    results.done()


def _compiled(case: Case, swept: int) -> tuple[Passes, Any, Any]:
    passes = case.build(swept)
    return passes, *passes.compile(case.seq, case.vocab_size)


def _timed(case: Case, compiled: tuple[tuple[Passes, Any, Any], float], repeats: int) -> dict[str, Any]:
    (passes, program, make), compile_s = compiled
    found = times(passes, program, *make(), repeats)
    micro = {name: 1e6 * s for name, s in found.items()}
    sizes = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name != "names"}
    memory = program.memory_analysis()
    return sizes | {"us": micro, "compile_s": compile_s, "temp_bytes": getattr(memory, "temp_size_in_bytes", None)}
