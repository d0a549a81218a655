"""Batches of token windows with random access: each is a pure function of the seed and its index.

Shapes: m microbatches, B sequences in each (over all data-parallel replicas), L tokens in a sequence. A process that
trains on some of the B columns reads only those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

Batch = dict[str, Any]
"""``tokens`` and ``labels`` int32 ``[m, B, L]``, ``mask`` float32 ``[m, B, L]``: 1 where the label counts in the loss;
with document masks also ``aux_inputs``: ``segment_ids`` int32 ``[m, B, L]``, the index of each token's document within
its row."""
ENDLESS = 2**48
"""Batches from a source that repeats forever."""
_NO_LABELS = (
    "has no label that counts: with document masks, a document of one token has none; leave document_masks out, or "
    "give longer documents"
)


class Windows:
    """A token stream cut into windows of L tokens; the labels are the same tokens shifted by one.

    ``ends`` holds the end of each document in the stream (ascending, the index of the first token after it). With it,
    rows have segment ids, and labels that belong to the next document do not count.
    """

    def __init__(self, tokens: np.ndarray, seq: int, ends: np.ndarray | None = None):
        self.tokens, self.seq, self.ends = tokens, seq, ends

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq)

    def __getitem__(self, index: int) -> Batch:
        start = int(index) * self.seq
        window = np.asarray(self.tokens[start : start + self.seq + 1], np.int32)
        row = {"tokens": window[:-1], "labels": window[1:], "mask": np.ones(self.seq, np.float32)}
        if self.ends is not None:
            first, last = np.searchsorted(self.ends, (start, start + self.seq), side="right")
            begins = np.zeros(self.seq + 1, np.int32)
            begins[np.asarray(self.ends[first:last]) - start] = 1
            row["mask"] = np.where(begins[1:], 0, row["mask"])
            row["aux_inputs"] = {"segment_ids": np.cumsum(begins[:-1], dtype=np.int32)}
        return row

    @property
    def labels_count(self) -> bool:
        """Whether any window has a label that counts."""
        if self.ends is None:
            return len(self) > 0
        labels = len(self) * self.seq  # labels are tokens 1 up to and including this one
        first, last = np.searchsorted(self.ends, (1, labels + 1))
        return labels > last - first

    def __repr__(self) -> str:
        return f"Windows({len(self)} of {self.seq} tokens)"


@dataclass(frozen=True)
class Batches:
    """Rows stacked into batches, starting at row ``start``; the last batch is padded with masked rows.

    ``columns`` are the sequences of each microbatch, out of B, that this process needs.
    """

    rows: Any
    count: int
    microbatches: int
    batch: int
    columns: Sequence[int]
    start: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        first = self.start + int(index) * self.microbatches * self.batch
        rows = [self._row(first + i * self.batch + j) for i in range(self.microbatches) for j in self.columns]
        return _stacked(rows, self.microbatches)

    def _row(self, index: int) -> Batch:
        row = self.rows[index % len(self.rows)]
        return row if index < len(self.rows) else row | {"mask": np.zeros_like(row["mask"])}

    def __repr__(self) -> str:
        return f"Batches({self.microbatches} x {len(self.columns)} of {self.batch} from row {self.start})"


def training_batches(
    tokens: np.ndarray,
    *,
    microbatches: int,
    batch: int,
    seq: int,
    seed: int,
    ends: np.ndarray | None = None,
    start: int = 0,
    columns: Sequence[int] | None = None,
) -> grain.MapDataset:
    """An endless sequence of batches: ``result[k]`` depends only on the arguments and k, whatever the access order.

    Every window appears once per epoch, reshuffled each epoch. ``start`` rows are skipped at the beginning, so a run
    can resume with batches of any size. ``ends`` as in :class:`Windows`, ``columns`` as in :class:`Batches`.

    Raises:
        ValueError: too few tokens for one batch, or no label that counts.
    """
    windows = Windows(tokens, seq, ends)
    rows = microbatches * batch
    if len(windows) < rows:
        raise ValueError(
            f"the train split has {len(tokens)} tokens, too few for one batch of {rows} sequences of {seq}, which "
            f"takes {rows * seq + 1}; give more text, or lower microbatches, microbatch_size or seq"
        )
    if not windows.labels_count:
        raise ValueError(f"the train split {_NO_LABELS}")
    endless = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    columns = range(batch) if columns is None else columns
    return grain.MapDataset.source(Batches(endless, ENDLESS, microbatches, batch, columns, start))


def validation_batches(
    tokens: np.ndarray,
    *,
    microbatches: int,
    batch: int,
    seq: int,
    at_most: int | None = None,
    ends: np.ndarray | None = None,
    columns: Sequence[int] | None = None,
) -> grain.MapDataset:
    """A fixed sample of the windows, at most ``at_most`` batches; the last is padded with masked rows.

    Raises:
        ValueError: too few tokens for one sequence, or a sample without a label that counts.
    """
    windows = Windows(tokens, seq, ends)
    if not len(windows):
        raise ValueError(
            f"the validation split has {len(tokens)} tokens, too few for a sequence of {seq}, which takes {seq + 1}; "
            "give more text, or lower seq"
        )
    rows = microbatches * batch
    sample = grain.MapDataset.source(windows).seed(0).shuffle()
    if at_most is not None:
        sample = sample[: at_most * rows]
    if ends is not None and not any(sample[i]["mask"].any() for i in range(len(sample))):
        raise ValueError(f"the validation sample {_NO_LABELS}")
    columns = range(batch) if columns is None else columns
    return grain.MapDataset.source(Batches(sample, -(-len(sample) // rows), microbatches, batch, columns))


def prefetched(batches: grain.MapDataset, threads: int = 2, ahead: int = 4) -> Iterator[Batch]:
    """The batches in order, with up to ``ahead`` of them read in advance."""
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))


def _stacked(rows: list[Batch], microbatches: int) -> Batch:
    return {
        name: _stacked([row[name] for row in rows], microbatches)
        if isinstance(value, dict)
        else np.stack([row[name] for row in rows]).reshape(microbatches, -1, *value.shape)
        for name, value in rows[0].items()
    }
