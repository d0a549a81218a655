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
from .layers import LayerPart
from .request import Choice, Request

MARGIN = 0.02
"""What is left of the memory in case that an estimate is too low."""
SCRATCH, SCRATCH_OF_A_LAYER = 20.0, 1.5
"""Scratch space: bytes for each element of a microbatch's stream, and, for every layer of a stage, bytes for each that
the layer would store with ``selective`` residuals."""
SCRATCH_OF_WHAT_IS_STORED = 0.75
"""The same for each byte that it does store, where that is more."""


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
        return self._part(self.choice.residuals)

    def _part(self, residuals: str) -> LayerPart:
        return self.request.layer_part(self.choice.tensor, residuals, self.schedule.splits_backward)

    @property
    def depth(self) -> int:
        """Layers that a device has room for in a chunk."""
        return max(stage_layers(self.schedule, self.request.config.layers))

    @property
    def table_rows(self) -> tuple[int, int]:
        """Rows of the vocabulary's tables on a device, and of the table of positions."""
        config, s = self.request.config, self.schedule
        positions = config.positions or 0
        if not s.sharded:
            ends_apart = s.placement[0] != s.placement[-1]
            return config.vocab_size * (1 if ends_apart or config.tie_embeddings else 2), positions
        multiple = s.p * self.choice.tensor * ROW_MULTIPLE
        shard = lambda rows: -(-rows // multiple) * ROW_MULTIPLE  # noqa: E731
        return shard(config.vocab_size) * (1 if config.tie_embeddings else 2), shard(positions)

    @property
    def parameters(self) -> float:
        """Parameters on a device."""
        return (
            self.schedule.chunks * self.depth * self.part.parameters + sum(self.table_rows) * self.request.config.hidden
        )

    def bytes(self, rings: Mapping[str, int]) -> Bytes:
        """Of a step whose program has so many cells in its rings."""
        config, choice, part = self.request.config, self.choice, self.part
        n, copies = self.parameters, choice.data if choice.shard_optimizer else 1
        tokens = choice.microbatch_size * config.seq
        width = 2 if config.dtype == "bfloat16" else 4
        stream = width * tokens * config.hidden
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
        config = self.request.config
        if config.dtype != "bfloat16":
            return 4 * self.parameters if self.choice.shard_optimizer else 0.0
        both, positions = self.table_rows
        s = self.schedule
        own_table = s.sharded or s.placement[0] == s.placement[-1]
        left_out = both // 2 + positions if own_table and not config.tie_embeddings else 0
        return 2 * (self.parameters - (0 if self.choice.shard_optimizer else left_out * config.hidden))

    def _buffers(self, rings: Mapping[str, int], stream: int, tokens: int, width: int) -> float:
        """Streams in rings and under way, and what S leaves for T."""
        cells = rings.get("inbox", 1) + rings.get("outbox", 0) + 1
        if not self.schedule.sharded:
            return cells * stream
        rows = -(-self.request.config.vocab_size // (self.schedule.p * self.choice.tensor))
        gradient = 2 * stream if self.choice.method == "vocab-2" else 0
        return (cells + rings.get("X", 1) + 8) * stream + rings.get("P", 1) * (width * tokens * rows + gradient)

    def _scratch(self, tokens: int) -> float:
        """What a pass has beside what it leaves: of a layer's backward, or of a head that is not sharded."""
        config, choice = self.request.config, self.choice
        elements = tokens * config.hidden
        stored = choice.microbatch_size * max(
            SCRATCH_OF_A_LAYER * self._part("selective").stored, SCRATCH_OF_WHAT_IS_STORED * self.part.stored
        )
        layer = SCRATCH * elements + self.depth * stored
        logits = tokens * config.vocab_size
        head = (
            0.0
            if self.schedule.sharded
            else 4 * min(logits, LOGITS) + 2 * min(logits, EXPONENTIALS) + SCRATCH * elements
        )
        return max(layer, head)
