"""The instruction table: one row for each pass and collective that a program can contain.

From it, lowering reads which rings an instruction writes and reads, the simulator its duration, pictures and file
formats its name, and the executor what it must be able to run. To add an instruction, add a row here and a function in
``vocabpp_jax/vocab/instructions/``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from .schedule import Schedule

Direction = Literal["forward", "backward"]
Condition = Callable[["Schedule"], bool]


class Value(NamedTuple):
    """What a ring holds: the output of a stage's F ("forward") or B ("backward").

    The stage is ``offset`` from the instruction's own, or from the ``anchor`` (the first or last stage) if given. With
    an anchor, only passes of that stage take part, and of instructions without a stage only those on its device.
    """

    direction: Direction
    offset: int = 0
    anchor: Literal["first", "last"] | None = None


class Access(NamedTuple):
    """An instruction's write to or read from a ring cell, in schedules where ``when`` holds."""

    ring: str
    value: Value
    op: str
    writes: bool
    when: Condition


@dataclass(frozen=True)
class Kind:
    """One row.

    Attributes:
        name: its name in schedules, durations and messages.
        title: its description in pictures, after its label.
        color: in pictures, "#rrggbb".
        runs: "per stage" (once for each stage of a device), "per device" (on every shard, or on one device), or
            "together" for a collective.
        accesses: the rings it writes and reads.
        sends: where its output goes: to the next stage (1), to the previous one (-1), nowhere (0).
        duration: the default.
        spelling: its name in CSV files, where torch would misread the usual one.
    """

    name: str
    title: str
    color: str
    runs: Literal["per stage", "per device", "together"]
    accesses: tuple[Access, ...] = ()
    sends: Literal[-1, 0, 1] = 0
    duration: float = 0.0
    spelling: str = ""

    @property
    def makes(self) -> Direction:
        """The kind of its output, for a pass that sends."""
        return "forward" if self.sends > 0 else "backward"

    @property
    def legend(self) -> str:
        """Its legend in pictures."""
        return self.title if self.runs == "together" else f"{self.name} {self.title}"

    def rings(self, schedule: Schedule) -> tuple[str, ...]:
        """The rings that it writes as it runs."""
        return tuple(a.ring for a in self.accesses if a.writes and a.op == "run" and a.when(schedule))


def _always(schedule: Schedule) -> bool:
    return True


def _trains(schedule: Schedule) -> bool:
    return schedule.trains


def _splits(schedule: Schedule) -> bool:
    return schedule.splits_backward


def _sharded(schedule: Schedule) -> bool:
    return schedule.sharded


def _whole(schedule: Schedule) -> bool:
    return not schedule.sharded


def _ahead(schedule: Schedule) -> bool:
    return schedule.depths > 0


def _ahead_sharded(schedule: Schedule) -> bool:
    return schedule.depths > 0 and schedule.sharded


def _ahead_trains(schedule: Schedule) -> bool:
    return schedule.depths > 0 and schedule.trains


def _ahead_splits(schedule: Schedule) -> bool:
    return schedule.depths > 0 and schedule.splits_backward


def _sums_before_T(schedule: Schedule) -> bool:
    return schedule.sums_before_T


def _writes(ring: str, value: Value, when: Condition = _always, op: str = "run") -> Access:
    return Access(ring, value, op, True, when)


def _reads(ring: str, value: Value, when: Condition = _always, op: str = "run") -> Access:
    return Access(ring, value, op, False, when)


_OUTPUT, _GRADIENT = Value("forward"), Value("backward")
_EMBEDDED = Value("forward", -1, "first")  # what the first stage's F reads
_EMBEDDED_GRADIENT = Value("backward", 0, "first")  # what the first stage's B produces
_HIDDEN = Value("forward", 0, "last")  # what the last stage's F produces
_HIDDEN_GRADIENT = Value("backward", 1, "last")  # what the last stage's B reads
_TAIL, _TAIL_GRADIENT = Value("forward", 0, "last"), Value("backward", 0, "last")  # of the last stage's passes
_RECORD = _OUTPUT  # per microbatch, on every device

_RECORDED = tuple(_reads("P", _RECORD, op=op) for op in ("start", "done"))

_TAIL_RINGS = ("ahead", "behind", "streams", "returned", "tail_residual", "tail_kept", "tail_carried")
RINGS = ("inbox", "outbox", "residual", "kept", "carried", "X", "P", *_TAIL_RINGS)
"""The ring buffers.

``inbox``: what arrives ahead of its slot, streams and their gradients; ``outbox``: what F and B leave for a transfer of
the next interval; ``residual``: what F leaves for B; ``kept``: what F also leaves for W; ``carried``: what B leaves for
W; ``X``: the last stage's output, on every device; ``P``: what S leaves for the reductions and T.

With multi-token prediction, on the last stage's device: ``ahead``: the sums of embeddings until its F; ``behind``:
their gradients from its B to the broadcast; ``streams``: what its F leaves for the output layer; ``returned``: the
gradients of ``streams``; ``tail_*``: like what F, B and W leave for each other.
"""

# Colors that remain distinct for color-blind readers and in grayscale: compute is cold, vocabulary warm.
_ROWS = (
    Kind(
        "F",
        "forward",
        "#4477AA",
        "per stage",
        (
            _reads("inbox", Value("forward", -1)),
            _writes("residual", _OUTPUT, _trains),
            _writes("kept", _OUTPUT, _splits),
            _reads("ahead", _TAIL, _ahead_sharded),
            _writes("streams", _TAIL, _ahead),
            _writes("tail_residual", _TAIL, _ahead_trains),
            _writes("tail_kept", _TAIL, _ahead_splits),
        ),
        sends=1,
        duration=1.0,
    ),
    Kind(
        "B",
        "backward",
        "#66BFC4",
        "per stage",
        (
            _reads("inbox", Value("backward", 1)),
            _reads("residual", _OUTPUT),
            _reads("kept", _OUTPUT, _splits),
            _writes("carried", _GRADIENT, _splits),
            _reads("returned", _TAIL_GRADIENT, _ahead),
            _reads("tail_residual", _TAIL, _ahead),
            _reads("tail_kept", _TAIL, _ahead_splits),
            _writes("behind", _TAIL_GRADIENT, _ahead_sharded),
            _writes("tail_carried", _TAIL_GRADIENT, _ahead_splits),
        ),
        sends=-1,
        duration=2.0,
    ),
    Kind(
        "W",
        "weight gradient",
        "#3E9A64",
        "per stage",
        (
            _reads("kept", _OUTPUT),
            _reads("carried", _GRADIENT),
            _reads("tail_kept", _TAIL, _ahead),
            _reads("tail_carried", _TAIL_GRADIENT, _ahead),
        ),
    ),
    Kind(
        "S",
        "logits, softmax",
        "#EE8833",
        "per device",
        (_reads("X", _RECORD), _writes("P", _RECORD)),
    ),
    Kind(
        "S1",
        "maxima",
        "#EE8833",
        "per device",
        (_reads("X", _RECORD), _writes("P", _RECORD)),
        spelling="SM",
    ),
    Kind("S2", "softmax", "#F6B56B", "per device", (_reads("P", _RECORD),), spelling="SE"),
    Kind(
        "T",
        "gradients",
        "#CC3D4E",
        "per device",
        (_reads("X", _RECORD), _reads("P", _RECORD)),
    ),
    Kind(
        "H",
        "output layer",
        "#D9553B",
        "per device",
        (
            _reads("inbox", _HIDDEN),
            _writes("inbox", _HIDDEN_GRADIENT, _trains),
            _reads("streams", _TAIL, _ahead),
            _writes("returned", _TAIL_GRADIENT, _ahead_trains),
        ),
    ),
    Kind("IF", "lookup", "#B07AA1", "per device", (_writes("inbox", _EMBEDDED, _whole),), spelling="EF"),
    Kind("IB", "scatter", "#D4A6C8", "per device", (_reads("inbox", _EMBEDDED_GRADIENT, _whole),), spelling="EB"),
    Kind(
        "G",
        "final norm",
        "#8C8C8C",
        "per device",
        (_reads("X", _RECORD), _writes("inbox", _HIDDEN_GRADIENT), _writes("returned", _TAIL_GRADIENT, _ahead)),
    ),
    Kind(
        "hidden_broadcast",
        "broadcast of X",
        "#7A6A53",
        "together",
        (
            _reads("inbox", _HIDDEN, op="start"),
            _reads("streams", _TAIL, _ahead, op="start"),
            _writes("X", _RECORD, op="done"),
        ),
    ),
    Kind("max", "maxima", "#E0C04C", "together", _RECORDED),
    Kind("stats", "softmax sums", "#C9A227", "together", _RECORDED),
    Kind("grad_sum", "sum of ∇X", "#A3123F", "together", (_reads("P", _RECORD, _sums_before_T, op="start"),)),
    Kind(
        "embed_sum",
        "sum of embeddings",
        "#B07AA1",
        "together",
        (_writes("inbox", _EMBEDDED, op="done"), _writes("ahead", _TAIL, _ahead, op="done")),
    ),
    Kind(
        "embed_grad_broadcast",
        "broadcast of ∇embeddings",
        "#D4A6C8",
        "together",
        (_reads("inbox", _EMBEDDED_GRADIENT, op="start"), _reads("behind", _TAIL_GRADIENT, _ahead, op="start")),
    ),
)
KINDS = {kind.name: kind for kind in _ROWS}
"""The rows by name, in legend order."""
STAGE_PASSES = tuple(kind.name for kind in _ROWS if kind.runs == "per stage")
DEVICE_PASSES = tuple(kind.name for kind in _ROWS if kind.runs == "per device")
COLLECTIVES = tuple(kind.name for kind in _ROWS if kind.runs == "together")
