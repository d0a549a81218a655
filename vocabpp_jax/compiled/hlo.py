"""Reads a compiled program: its loops, the copies in them, and what each collective overlaps with.

Works on the text of scheduled HLO, where the order of the lines is the order of execution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)


class Line(NamedTuple):
    """One instruction: its name, result shape, opcode, and the rest of the line."""

    name: str
    shape: str
    op: str
    rest: str

    @property
    def scope(self) -> tuple[str, ...]:
        """The named scopes it comes from, outermost first."""
        found = _OP_NAME.search(self.rest)
        return tuple(found[1].split("/")) if found else ()

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])


class Copy(NamedTuple):
    """A copied array: its shape, its bytes, and the computation and named scopes it is in."""

    shape: str
    bytes: int
    computation: str
    scope: str


class Collective(NamedTuple):
    """A collective: its kind, its step of the program, its bytes.

    Attributes:
        passes_before: the passes that run before its start although an operand could be made before them; among them,
            by the broadcast's name, the loops that fill its send buffer.
        passes_between: the passes between its start and end.
    """

    kind: str
    step: str
    bytes: int
    passes_before: tuple[str, ...]
    passes_between: tuple[str, ...]


def starts_late(passes_before: Sequence[str]) -> bool:
    """Whether a collective starts behind a pass that it need not wait for. Loops that fill a send buffer are none."""
    return any(not name.endswith("_broadcast") for name in passes_before)


def shape_bytes(shape: str) -> int:
    """Bytes of an array shape such as ``bf16[8,128]{1,0}``; for a tuple, the sum over its arrays."""
    total = 0
    for kind, dims in _ARRAY.findall(shape):
        size = 1
        for n in filter(None, dims.split(",")):
            size *= int(n)
        bits = 8 if kind in ("pred", "token") else int(re.search(r"\d+", kind)[0])
        total += size * bits // 8
    return total


def instruction_count(text: str) -> int:
    """The number of instructions in all computations of a program."""
    return sum(1 for line in text.splitlines() if _INSTRUCTION.match(line))


@dataclass(frozen=True)
class Loop:
    """A scan of the program: its body, its trip count, and all computations of the program."""

    body: str
    trips: int
    computations: dict[str, list[Line]]

    @cached_property
    def reached(self) -> tuple[str, ...]:
        """The body and every computation it calls, directly or indirectly."""
        found, waiting = {}, [self.body]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = None
                waiting += [c for line in self.computations.get(name, ()) for c in _called(line)]
        return tuple(found)

    def copies(self, at_least: int) -> list[Copy]:
        """Copies of arrays of at least this many bytes, anywhere in the loop."""
        return [
            Copy(_first_array(line.shape), size, name, "/".join(line.scope))
            for name in self.reached
            for line in self._copied(name)
            if line.op in ("copy", "copy-start") and (size := shape_bytes(_first_array(line.shape))) >= at_least
        ]

    @cached_property
    def _kernels(self) -> frozenset[str]:
        fusions = (line for lines in self.computations.values() for line in lines if line.op == "fusion")
        return frozenset(name for line in fusions for name in _called(line))

    def _copied(self, name: str) -> list[Line]:
        """The lines of a computation; none for a fusion that does more than copy, as it materializes no copy."""
        lines = self.computations.get(name, [])
        does = {line.op for line in lines} - {"parameter", "bitcast", "copy", "tuple"}
        return [] if name in self._kernels and does else lines

    @cached_property
    def collectives(self) -> list[Collective]:
        """The collectives of the body, in the order of their ends."""
        passes: list[str] = []
        starts: dict[str, tuple[Line, int]] = {}
        ready: dict[str, int] = {}  # for every instruction, how many passes have to run first
        found = []

        def add(kind: str, start: Line, at: int, size: int) -> None:
            first = min((ready.get(name, 0) for name in start.operands), default=0)
            before, between = passes[first:at], passes[at:]
            found.append(Collective(kind, _step(start), size, tuple(before), tuple(between)))

        for line in self.computations[self.body]:
            ready[line.name] = max((ready.get(name, 0) for name in line.operands), default=0)
            if line.op == "while":
                passes.append(line.scope[-2] if len(line.scope) > 1 else line.name)
            elif line.op.endswith("-start"):
                starts[line.name] = line, len(passes)
            elif line.op.endswith("-done") and line.operands[0] in starts:
                start, at = starts.pop(line.operands[0])
                if (kind := start.op.removesuffix("-start")) in _COLLECTIVES:
                    add(kind, start, at, shape_bytes(line.shape))
            elif line.op in _COLLECTIVES:
                add(line.op, line, len(passes), shape_bytes(line.shape))
            if line.op == "while" or line.op.endswith("-done"):
                ready[line.name] = len(passes)
        return found


def loops(text: str) -> list[Loop]:
    """The scans that communicate, longest first: with many microbatches, the steady state comes before its ends."""
    computations = dict(_computations(text))
    found = []
    for lines in computations.values():
        for line in lines:
            trips = _TRIPS.search(line.rest)
            if line.op != "while" or not trips:
                continue
            body = re.search(r"body=%?([\w.\-]+)", line.rest)[1]
            if any(x.op.removesuffix("-start") in _COLLECTIVES for x in computations.get(body, ())):
                found.append(Loop(body, int(trips[1]), computations))
    return sorted(found, key=lambda loop: -loop.trips)


def _computations(text: str) -> Iterator[tuple[str, list[Line]]]:
    name, lines = None, []
    for row in text.splitlines():
        if head := _COMPUTATION.match(row):
            name, lines = head[2], []
        elif row.startswith("}") and name:
            yield name, lines
            name = None
        elif name and (found := _INSTRUCTION.match(row)):
            lines.append(Line(found[2], found[3], found[4], found[5]))


def _called(line: Line) -> Iterator[str]:
    for one, several in _CALLED.findall(line.rest):
        yield from [one] if one else [name.strip().lstrip("%") for name in several.split(",")]


def _first_array(shape: str) -> str:
    found = _ARRAY.search(shape)
    return found[0] if found else ""


def _step(line: Line) -> str:
    """The scope of a collective's primitive: hidden_broadcast, stats, transfer, ..."""
    return line.scope[-2] if len(line.scope) > 1 else line.name
