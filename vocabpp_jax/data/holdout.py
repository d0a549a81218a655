"""Which part of a corpus is held out: about a twentieth of its bytes, and no text that is also trained on.

Documents are assigned by a hash of their text, so copies stay together. Usually those with the smallest hashes are held
out. Where that would miss the target by far, as with few documents or widely differing sizes, documents larger than the
whole share are cut near their end, and others are chosen by size.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

HELD_OUT = 0.05
"""Fraction of the tokens that is held out for validation."""
_BUCKETS = 2**20  # hash buckets: copies of a document share one; in a small corpus different documents hardly ever do
_LARGEST = int(1 / HELD_OUT)  # with more documents than this, not all can be larger than the share
_LEAST_TO_CUT = 400  # bytes: a twentieth of less is too short to be text


@dataclass(frozen=True)
class Holdout:
    """The rule by which documents are split."""

    limit: int = -1
    """Documents whose hash is at most this are held out."""
    buckets: frozenset[int] = frozenset()
    """So are those whose hash falls into one of these buckets."""
    cut_above: int | None = None
    """Documents of more bytes are cut near their end instead."""

    def as_json(self) -> dict[str, Any]:
        """The rule as JSON values, for :meth:`from_json`."""
        return {"limit": self.limit, "buckets": sorted(self.buckets), "cut_above": self.cut_above}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Holdout:
        return cls(**values | {"buckets": frozenset(values["buckets"])})

    @property
    def name(self) -> bytes:
        """What distinguishes the rule from the smallest-hashes rule; empty for the latter."""
        return b"" if self.limit >= 0 or self.cut_above == 0 else repr((sorted(self.buckets), self.cut_above)).encode()

    def split(self, text: str) -> tuple[str, str]:
        """The parts of a document that are trained on and held out."""
        digest, size = digest_of(text)
        if self.cut_above is not None and size > self.cut_above:
            at = _cut(text)
            return text[:at], text[at:]
        held_out = digest <= self.limit or digest % _BUCKETS in self.buckets
        return ("", text) if held_out else (text, "")


def digest_of(text: str) -> tuple[int, int]:
    """A 64-bit hash of a document, and its size in bytes."""
    raw = text.encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big"), len(raw)


class Sizes:
    """The documents of a corpus by hash and size, in bounded memory."""

    def __init__(self) -> None:
        self.documents = self.total = 0
        self._weights = np.zeros(_BUCKETS, np.int64)
        self._largest: list[tuple[int, int]] = []
        self._below = 0  # bytes of documents that the smallest-hashes rule holds out
        self._least, self._least_weight = 2**64, 0

    def add(self, digest: int, size: int) -> None:
        """Add a document."""
        self.documents += 1
        self.total += size
        self._weights[digest % _BUCKETS] += size
        if digest <= _USUAL_LIMIT:
            self._below += size
        if digest < self._least:
            self._least, self._least_weight = digest, 0
        if digest == self._least:
            self._least_weight += size
        keep = heapq.heappush if len(self._largest) < _LARGEST else heapq.heappushpop
        keep(self._largest, (size, digest))

    def holdout(self) -> Holdout:
        """The rule whose held-out share is as close to :data:`HELD_OUT` of the bytes as whole documents allow.

        Raises:
            ValueError: the corpus consists of copies of one short document.
        """
        if self.documents == 1:
            return Holdout(cut_above=0)
        share = HELD_OUT * self.total
        usual = self._below or self._least_weight  # a small corpus may have no hash below the limit
        if share / 2 <= usual <= 2 * share:
            return Holdout(limit=max(self._least, _USUAL_LIMIT))
        cut_above = max(int(share), _LEAST_TO_CUT)
        weights, cut = self._weights.copy(), 0
        for size, digest in self._largest:
            if size > cut_above:
                weights[digest % _BUCKETS] -= size
                cut += size
        chosen = _choose(weights, share - HELD_OUT * cut, share)
        if chosen or cut:
            return Holdout(buckets=frozenset(chosen), cut_above=cut_above)
        (units,) = np.nonzero(self._weights)
        if len(units) > 1:  # a few short documents, or one repeated many times: hold out the lightest part
            return Holdout(buckets=frozenset([int(units[np.argmin(self._weights[units])])]))
        if self._largest[0][0] >= _LEAST_TO_CUT:
            return Holdout(cut_above=_LEAST_TO_CUT - 1)
        raise ValueError(
            f"its {self.documents:,} documents are one text of {self._largest[0][0]} bytes, so none can be held out "
            "that is not trained on; give different documents"
        )


def _choose(weights: np.ndarray, wanted: float, largest: float) -> list[int]:
    """Buckets whose total weight is close to ``wanted``, none heavier than ``largest``; at most half of the buckets."""
    (units,) = np.nonzero(weights)
    units = units[weights[units] <= largest]
    wanted = min(wanted, weights[units].sum() / 2)
    chosen, held = [], 0
    for unit in units.tolist():
        if held >= 0.9 * wanted:
            break
        if held + weights[unit] <= 1.5 * wanted:
            chosen.append(unit)
            held += int(weights[unit])
    return chosen


def _cut(text: str) -> int:
    """Where the last twentieth of a document begins: at the preceding line end or space, if one is near."""
    at, least = int(len(text) * (1 - HELD_OUT)), int(len(text) * (1 - 2 * HELD_OUT))
    return text.rfind("\n", least, at) + 1 or text.rfind(" ", least, at) + 1 or at


_USUAL_LIMIT = int(HELD_OUT * 2**64)
