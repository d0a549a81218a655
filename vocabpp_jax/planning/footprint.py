"""Bytes that a device allocates for a training step, estimated without compiling.

The state, the rings and what each layer leaves in them are counted as the program allocates them: one program has one
shape, so every device has what the fullest needs. What the compiler adds is a formula fitted to compiled programs;
docs/planner.md says to which, and how far off it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..pipeline.layout import ROW_MULTIPLE
from ..schedules.schedule import Schedule
from ..schedules.simulation.cost import stage_layers
from ..vocab.unsharded_head import EXPONENTIALS, LOGITS
from .layer_parts import LayerPart
from .request import Choice, Request

MARGIN = 0.02
"""What is left of the memory in case that an estimate is too low."""
SCRATCH, SCRATCH_OF_A_LAYER = 20.0, 30.0
"""Scratch space, bytes for each element of a microbatch's stream: in all, and for every layer of a stage, which a
tensor axis divides."""
SCRATCH_OF_WHAT_IS_STORED = 0.75
"""The same of a layer for each byte that it stores, where that is more."""


@dataclass(frozen=True)
class Bytes:
    """What the peak is made of, as experiments/memory.py names it."""

    parameters: float
    optimizer: float
    gradients: float
    rounded: float
    activations: float
    buffers: float
    scratch: float

    @property
    def state(self) -> float:
        """What is there whatever runs."""
        return self.parameters + self.optimizer + self.gradients + self.rounded

    @property
    def peak(self) -> float:
        """All of it."""
        return self.state + self.activations + self.buffers + self.scratch


@dataclass(frozen=True)
class Footprint:
    """A choice on one device: its parameters, counted with those that only the fullest device uses, and its layers."""

    request: Request
    choice: Choice
    schedule: Schedule
    """Of any number of microbatches."""

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
        """Rows of the vocabulary's tables on a device, and of the table of positions."""
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
        """Parameters on a device."""
        return (
            self.schedule.chunks * self.depth * self.part.parameters + sum(self.table_rows) * self.request.sizes.hidden
        )

    def bytes(self, rings: Mapping[str, int]) -> Bytes:
        """Of a step whose program has so many cells in its rings."""
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
            buffers=self._buffers(rings, stream, tokens, width),
            scratch=self._scratch(tokens),
        )

    def _rounded(self) -> float:
        """Copies of the parameters in the compute dtype: of a sharded embedding that is not the head too there is none,
        but where the optimizer is sharded, which gathers all that passes read."""
        z = self.request.sizes
        if self.request.dtype != "bfloat16":
            return 4 * self.parameters if self.choice.shard_optimizer else 0.0
        both, positions = self.table_rows
        s = self.schedule
        own_table = s.sharded or s.placement[0] == s.placement[-1]
        left_out = both // 2 + positions if own_table and not z.tied else 0
        return 2 * (self.parameters - (0 if self.choice.shard_optimizer else left_out * z.hidden))

    def _buffers(self, rings: Mapping[str, int], stream: int, tokens: int, width: int) -> float:
        """Streams in rings and under way, and what S leaves for T."""
        cells = rings.get("inbox", 1) + rings.get("outbox", 0) + 1
        if not self.schedule.sharded:
            return cells * stream
        rows = -(-self.request.sizes.vocab_size // (self.schedule.p * self.choice.tensor))
        gradient = 2 * stream if self.choice.method == "vocab-2" else 0
        return (cells + rings.get("X", 1) + 8) * stream + rings.get("P", 1) * (width * tokens * rows + gradient)

    def _scratch(self, tokens: int) -> float:
        """What a pass has beside what it leaves: of a layer's backward, or of a head that is not sharded."""
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
