"""What is minimised: cross entropy, and the three things that people add to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """The loss of a token with raw logits U, label l and a vocabulary of V; nats.

    ::

        Y = c tanh(U / c)    lse = log Σ exp(Y)    G' = (1 - ε) one_hot(l) + ε / V
        loss = lse - Σ G' Y + λ lse²

    The defaults are plain cross entropy. :mod:`.output_layer` derives the gradients.
    """

    soft_cap: float | None = None
    """c: logits are squashed smoothly into (-c, c) (Gemma 2: 30). None leaves them as they are."""
    z_loss: float = 0.0
    """λ: weight of the squared log-partition, which keeps logits from drifting (PaLM: 1e-4)."""
    label_smoothing: float = 0.0
    """ε: the share of the target that is spread evenly over the whole vocabulary, the label included."""

    def __post_init__(self) -> None:
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap is {self.soft_cap}; it must be above 0, or None for no cap")
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss is {self.z_loss}; it must be 0 or above")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
