"""Batches of token windows: any batch at any time, a pure function of the seed and its index.

Shapes: m microbatches, B sequences in each (over all data-parallel replicas), L tokens in a sequence. A process that
trains on some of the B columns reads those only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

Batch = dict[str, Any]
"""``tokens`` and ``labels`` int32 ``[m, B, L]``, ``mask`` float32 ``[m, B, L]``: 1 where the loss counts a label; with
document masks also ``aux_inputs``: ``segment_ids`` int32 ``[m, B, L]``, the number of a token's document in its row."""
ENDLESS = 2**48
"""Batches in what repeats for ever."""
_NO_LABELS = (
    "has no label that counts: with document masks, a document of one token has none; leave document_masks out, or "
    "give longer documents"
)


class Windows:
    """A stream of tokens cut into windows of L, each with its labels: the same tokens, one later.

    With ``ends``, where in the stream each document ends (ascending, the first token after it), rows have segment ids,
    and a label that belongs to the next document does not count.
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
        labels = len(self) * self.seq  # those of the tokens 1 to this one
        first, last = np.searchsorted(self.ends, (1, labels + 1))
        return labels > last - first

    def __repr__(self) -> str:
        return f"Windows({len(self)} of {self.seq} tokens)"


@dataclass(frozen=True)
class Batches:
    """Rows stacked into batches, from row ``start`` on; rows beyond the last are filled up with masked ones.

    ``columns`` are those of the B sequences of each microbatch that this process wants.
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
    """An endless sequence of batches: ``result[k]`` is the same for the same arguments, in any order of asking.

    Every window comes once an epoch, in an order drawn anew for each. ``start`` rows are left out at the beginning: a
    run goes on where it was, with batches of any size. ``ends`` as in :class:`Windows`, ``columns`` as in
    :class:`Batches`.

    Raises:
        ValueError: too few tokens for one batch, or not one label that counts.
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
    """A fixed sample of the windows, at most ``at_most`` batches of it; the last is filled up with masked rows.

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
    """The batches in order, up to ``ahead`` of them read before they are asked for."""
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))


def _stacked(rows: list[Batch], microbatches: int) -> Batch:
    return {
        name: _stacked([row[name] for row in rows], microbatches)
        if isinstance(value, dict)
        else np.stack([row[name] for row in rows]).reshape(microbatches, -1, *value.shape)
        for name, value in rows[0].items()
    }
