"""Bytes that a device allocates for a training step, estimated without compiling.

The state, the rings and each layer's residuals in them are counted as the program allocates them: all devices run one
program with the same shapes, so each has what the fullest needs. What the compiler adds is a formula fitted to compiled
programs; docs/planner.md says which, and how far off it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..pipeline.layout import ROW_MULTIPLE
from ..schedules.lowering.program import Program
from ..schedules.schedule import Schedule
from ..schedules.simulation.cost import stage_layers
from ..vocab.unsharded_head import EXPONENTIALS, LOGITS
from .layer_parts import LayerPart
from .request import Choice, Request

MARGIN = 0.02
"""Fraction of memory left free in case an estimate is too low."""
SCRATCH, SCRATCH_OF_A_LAYER = 20.0, 30.0
"""Scratch bytes per element of a microbatch's stream: in total, and per layer of a stage, divided by the
tensor axis."""
SCRATCH_OF_WHAT_IS_STORED = 0.75
"""Scratch bytes of a layer per byte of its residuals, used where that is more."""


@dataclass(frozen=True)
class Bytes:
    """The parts of the peak, named as in experiments/memory.py."""

    parameters: float
    optimizer: float
    gradients: float
    rounded: float
    activations: float
    buffers: float
    scratch: float

    @property
    def state(self) -> float:
        """Bytes that are always allocated."""
        return self.parameters + self.optimizer + self.gradients + self.rounded

    @property
    def peak(self) -> float:
        """The sum of all parts."""
        return self.state + self.activations + self.buffers + self.scratch


@dataclass(frozen=True)
class Footprint:
    """What a choice allocates on one device, whose parameters include those that only the fullest device uses."""

    request: Request
    choice: Choice
    schedule: Schedule
    """With any number of microbatches."""

    @property
    def part(self) -> LayerPart:
        """One device's part of a layer."""
        return self.request.layer_part(self.choice.tensor, self.choice.residuals, self.schedule.splits_backward)

    @property
    def depth(self) -> int:
        """Layers that a device has room for in a chunk."""
        return max(stage_layers(self.schedule, self.request.sizes.layers))

    @property
    def table_rows(self) -> tuple[int, int]:
        """Rows per device of the vocabulary tables, and of the position table."""
        z, s = self.request.sizes, self.schedule
        positions = self.request.model.positions or 0
        if not s.sharded:
            ends_apart = s.placement[0] != s.placement[-1]
            return z.vocab_size * (1 if ends_apart or z.tied else 2), positions
        multiple = s.p * self.choice.tensor * ROW_MULTIPLE
        shard = lambda rows: -(-rows // multiple) * ROW_MULTIPLE  # noqa: E731
        return shard(z.vocab_size) * (1 if z.tied else 2), shard(positions)

    @property
    def parameters(self) -> float:
        """Parameters per device."""
        return (
            self.schedule.chunks * self.depth * self.part.parameters + sum(self.table_rows) * self.request.sizes.hidden
        )

    def bytes(self, program: Program | None = None) -> Bytes:
        """The estimate for a step with this program, or without its rings."""
        rings = {} if program is None else program.rings
        z, choice, part = self.request.sizes, self.choice, self.part
        n, copies = self.parameters, choice.data if choice.shard_optimizer else 1
        tokens = choice.microbatch_size * z.seq
        width = 2 if self.request.dtype == "bfloat16" else 4
        stream = width * tokens * z.hidden
        stored = {"residual": part.residual, "kept": part.kept, "carried": part.carried}
        activations = sum(choice.microbatch_size * size * rings.get(ring, 0) for ring, size in stored.items())
        return Bytes(
            parameters=4 * n / copies,
            optimizer=8 * n / copies,
            gradients=4 * n,
            rounded=self._rounded(),
            activations=activations * self.depth,
            buffers=self._buffers(rings, 1 if program is None else program.open_transfers, stream, tokens, width),
            scratch=self._scratch(tokens),
        )

    def _rounded(self) -> float:
        """Copies of the parameters in the compute dtype.

        A sharded embedding that is not tied to the head needs none, unless the optimizer is sharded, which gathers
        everything that passes read.
        """
        z = self.request.sizes
        if self.request.dtype != "bfloat16":
            return 4 * self.parameters if self.choice.shard_optimizer else 0.0
        both, positions = self.table_rows
        s = self.schedule
        own_table = s.sharded or s.placement[0] == s.placement[-1]
        left_out = both // 2 + positions if own_table and not z.tied else 0
        return 2 * (self.parameters - (0 if self.choice.shard_optimizer else left_out * z.hidden))

    def _buffers(self, rings: Mapping[str, int], transfers: int, stream: int, tokens: int, width: int) -> float:
        """Streams in rings, two for every transfer under way, and what S leaves for T."""
        cells = rings.get("inbox", 1) + rings.get("outbox", 0) + 2 * transfers
        if not self.schedule.sharded:
            return cells * stream
        rows = -(-self.request.sizes.vocab_size // (self.schedule.p * self.choice.tensor))
        gradient = 2 * stream if self.schedule.sums_before_T else 0
        return (cells + rings.get("X", 1) + 8) * stream + rings.get("P", 1) * (width * tokens * rows + gradient)

    def _scratch(self, tokens: int) -> float:
        """Temporaries of a pass: the larger of a layer's backward and an unsharded head."""
        z, choice = self.request.sizes, self.choice
        elements = tokens * z.hidden
        stored = SCRATCH_OF_WHAT_IS_STORED * choice.microbatch_size * self.part.stored
        layer = SCRATCH * elements + self.depth * max(stored, SCRATCH_OF_A_LAYER * elements / choice.tensor)
        logits = tokens * z.vocab_size
        head = (
            0.0
            if self.schedule.sharded
            else 4 * min(logits, LOGITS) + 2 * min(logits, EXPONENTIALS) + SCRATCH * elements
        )
        return max(layer, head)
