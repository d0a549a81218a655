"""The training loss: cross entropy with optional soft cap, z-loss and label smoothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """The loss of a token in nats, from raw logits U, label l and vocabulary size V.

    ::

        Y = c tanh(U / c)    lse = log Σ exp(Y)    G' = (1 - ε) one_hot(l) + ε / V
        loss = lse - Σ G' Y + λ lse²

    The defaults are plain cross entropy. :mod:`.output_layer` derives the gradients.
    """

    soft_cap: float | None = None
    """c: logits are squashed smoothly into (-c, c) (Gemma 2: 30). None leaves them unchanged."""
    z_loss: float = 0.0
    """λ: weight of the squared log-partition function, which keeps logits from drifting (PaLM: 1e-4)."""
    label_smoothing: float = 0.0
    """ε: the fraction of the target spread evenly over the whole vocabulary, including the label."""

    def __post_init__(self) -> None:
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap is {self.soft_cap}; it must be above 0, or None for no cap")
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss is {self.z_loss}; it must be 0 or above")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")
