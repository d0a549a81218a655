"""A model's dimensions, and what follows from them: parameters, elements, FLOPs.

Symbols: ``b`` microbatch size, ``s`` sequence length, ``h`` hidden size, ``V`` vocabulary, ``L`` layers. FLOPs count
causal attention in full, as the paper's tables do (arXiv 2411.05288, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Sizes:
    """A model's dimensions: layers, and two vocabulary tables of hV (one if ``tied``).

    The cost of a layer follows from three numbers, which default to a GPT's. ``matrices``: parameters in a layer's
    matrices (12h²). ``attended``: key elements that a token's query is multiplied with (hs). ``kept``: elements per
    token that a layer's forward keeps when norms and activation functions are recomputed (10h). Each of ``depths``
    further predicted tokens takes one more layer, a projection of 2h² and the head.
    """

    layers: int
    hidden: int
    seq: int
    vocab_size: int
    microbatch_size: int = 1
    tied: bool = False
    matrices: int | None = None
    attended: float | None = None
    kept: int | None = None
    depths: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("tied", "depths") and value is not None and value < 1:
                raise ValueError(f"{f.name} is {value}; it must be at least 1")

    @property
    def bsh(self) -> int:
        """Elements of a microbatch's stream."""
        return self.microbatch_size * self.seq * self.hidden

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch."""
        return self.microbatch_size * self.seq

    @property
    def scores(self) -> float:
        """Multiply-adds of one layer's attention scores for one microbatch: ``attended`` for every token."""
        return self.tokens * (self.hidden * self.seq if self.attended is None else self.attended)

    @property
    def layer_flops(self) -> float:
        """FLOPs of one layer, forward and backward, for one microbatch. GPT: bsh(72h + 12s)."""
        return 6 * self.tokens * self.layer_parameters + 12 * self.scores

    @property
    def kept_elements(self) -> int:
        """Elements of one layer's residuals, for one microbatch."""
        return self.tokens * (10 * self.hidden if self.kept is None else self.kept)

    @property
    def head_flops(self) -> int:
        """FLOPs of the output layer, forward and backward, for one microbatch: 6bshV."""
        return 6 * self.bsh * self.vocab_size

    @property
    def embedding_flops(self) -> int:
        """FLOPs of the input layer, forward and backward, for one microbatch: 3bsh."""
        return 3 * self.bsh

    @property
    def streams(self) -> int:
        """Streams of a microbatch that enter the head: one per predicted token."""
        return 1 + self.depths

    @property
    def projection_parameters(self) -> int:
        """Parameters of a depth's projection."""
        return 2 * self.hidden**2

    @property
    def depth_flops(self) -> float:
        """FLOPs of one depth of the tail without the head, forward and backward, for one microbatch."""
        return self.layer_flops + 6 * self.tokens * self.projection_parameters

    @property
    def ends_in_layers(self) -> float:
        """FLOPs of the head, for all streams, and of the tail, divided by those of one layer."""
        return (self.streams * self.head_flops + self.depths * self.depth_flops) / self.layer_flops

    def iteration_flops(self, m: int) -> float:
        """FLOPs of an iteration of ``m`` microbatches as counted for MFU: without the embedding."""
        ends = self.streams * self.head_flops + self.depths * self.depth_flops
        return m * (self.layers * self.layer_flops + ends)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, without biases and norms. GPT: 12h²."""
        return 12 * self.hidden**2 if self.matrices is None else self.matrices

    @property
    def table_parameters(self) -> int:
        """Parameters of one vocabulary table: hV."""
        return self.hidden * self.vocab_size
