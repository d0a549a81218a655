"""Batches of token windows: any batch at any time, a pure function of the seed and its index.

Shapes: m microbatches, B sequences in each (over all data-parallel replicas), L tokens in a sequence.
"""

from __future__ import annotations

from functools import partial

import grain
import numpy as np

Batch = dict[str, np.ndarray]
"""``tokens`` and ``labels`` int32 ``[m, B, L]``, ``mask`` float32 ``[m, B, L]``: 1 where the loss counts a label."""


class Windows:
    """A stream of tokens cut into windows of L, each with its labels: the same tokens, one later."""

    def __init__(self, tokens: np.ndarray, seq: int):
        self.tokens, self.seq = tokens, seq

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq)

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self.seq
        window = np.asarray(self.tokens[start : start + self.seq + 1], np.int32)
        return {"tokens": window[:-1], "labels": window[1:], "mask": np.ones(self.seq, np.float32)}

    def __repr__(self) -> str:
        return f"Windows({len(self)} of {self.seq} tokens)"


def training_batches(tokens: np.ndarray, *, microbatches: int, batch: int, seq: int, seed: int) -> grain.MapDataset:
    """An endless sequence of batches: ``result[k]`` is the same for the same arguments, in any order of asking.

    Every window comes once an epoch, in an order drawn anew for each.
    """
    windows = Windows(tokens, seq)
    rows = microbatches * batch
    if len(windows) < rows:
        raise ValueError(
            f"the train split has {len(tokens)} tokens, too few for one batch of {rows} sequences of {seq}, which "
            f"takes {rows * seq + 1}; give more text, or lower microbatches, microbatch_size or seq"
        )
    endless = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    return endless.batch(rows).map(partial(_split, microbatches=microbatches))


def validation_batches(
    tokens: np.ndarray, *, microbatches: int, batch: int, seq: int, at_most: int | None = None
) -> grain.MapDataset:
    """A fixed sample of the windows, at most ``at_most`` batches of it; the last is filled up with masked rows."""
    windows = Windows(tokens, seq)
    if not len(windows):
        raise ValueError(
            f"the validation split has {len(tokens)} tokens, too few for a sequence of {seq}, which takes {seq + 1}; "
            "give more text, or lower seq"
        )
    rows = microbatches * batch
    sample = grain.MapDataset.source(windows).seed(0).shuffle()
    if at_most is not None:
        sample = sample[: at_most * rows]
    filled = partial(grain.experimental.batch_and_pad, batch_size=rows, pad_value=0)
    return sample.batch(rows, drop_remainder=False, batch_fn=filled).map(partial(_split, microbatches=microbatches))


def _split(rows: Batch, microbatches: int) -> Batch:
    return {name: array.reshape(microbatches, -1, array.shape[-1]) for name, array in rows.items()}
