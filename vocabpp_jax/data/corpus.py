"""A corpus: documents in a fixed order, split into training and held-out documents.

A text file is one document; a ``.jsonl`` file holds one per line and a ``.parquet`` file one per row, in the field
``text``; a folder holds the documents of all its files. Without a source, the corpus is the source code of the Python
standard library: real text that every machine has.

Damaged input is refused by name, or left out and counted: a whole text file, one line of a ``.jsonl`` file, the rest of
a ``.parquet`` file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vocabpp_jax.data.documents import read_documents
from vocabpp_jax.data.files import STANDARD_LIBRARY, OnDamage, files_of, format_of
from vocabpp_jax.data.holdout import HELD_OUT, Holdout, Sizes, digest_of
from vocabpp_jax.data.remembered import remembered

__all__ = ["HELD_OUT", "STANDARD_LIBRARY", "Corpus", "open_corpus"]


@dataclass(frozen=True)
class Corpus:
    """Documents split into train and validation so that no text is in both. Created by :func:`open_corpus`."""

    name: str
    files: tuple[Path, ...]
    documents: int
    fingerprint: str
    """A hash of every document's text and of the split; it does not depend on where the files are."""
    holdout: Holdout
    damaged: tuple[str, ...] = ()
    """A sentence for each thing left out because it is damaged."""
    notes: tuple[str, ...] = ()
    """A sentence for each choice in how the source is read that may surprise the user."""

    def train(self) -> Iterator[str]:
        """The documents to train on."""
        return (part for text in self._texts() if (part := self.holdout.split(text)[0]))

    def validation(self) -> Iterator[str]:
        """The held-out documents."""
        return (part for text in self._texts() if (part := self.holdout.split(text)[1]))

    def _texts(self) -> Iterator[str]:
        leaves_out = self.damaged or self.name == STANDARD_LIBRARY
        return read_documents(self.files, _ignore if leaves_out else _refuse)


def open_corpus(source: str = STANDARD_LIBRARY, damaged: Literal["refuse", "skip"] = "refuse") -> Corpus:
    """Read ``source``: ``stdlib``, a text, JSON lines or ``.parquet`` file, or a folder of such files.

    The result is cached and reused while the files are unchanged.

    Raises:
        ValueError: there is nothing to read, something is damaged and must not be left out, or nothing can be held out.
    """
    left_out: list[str] = []
    on_damage: OnDamage = _refuse
    if damaged == "skip":
        on_damage = lambda problem: left_out.append(str(problem))  # noqa: E731
    if source == STANDARD_LIBRARY:  # it contains a few files that test other encodings
        on_damage = _ignore
    files, notes = files_of(source, on_damage)
    unreadable = tuple(left_out)

    def read() -> dict[str, Any]:
        everything, sizes = hashlib.blake2b(digest_size=16), Sizes()
        for text in read_documents(files, on_damage):
            digest, size = digest_of(text)
            everything.update(digest.to_bytes(8, "big"))
            sizes.add(digest, size)
        if not sizes.documents:
            damage = f" ({left_out[0]})" if left_out else ""
            raise ValueError(
                f"data is {source!r}, which holds no text{damage}; give a text file, a .jsonl file or a folder"
            )
        try:
            holdout = sizes.holdout()
        except ValueError as problem:
            raise ValueError(f"data is {source!r}; {problem}") from None
        everything.update(holdout.name)
        found = {"documents": sizes.documents, "fingerprint": everything.hexdigest(), "holdout": holdout.as_json()}
        return found | {"damaged": left_out[len(unreadable) :]}

    found = remembered({"corpus": source, "damaged": damaged}, files, read)
    if len(files) == 1 and not files[0].suffix.lower().startswith(".json") and format_of(files[0]) == "jsonl":
        notes += (f"{files[0]} is read as JSON lines",)
    holdout, damage = Holdout.from_json(found["holdout"]), (*unreadable, *found["damaged"])
    return Corpus(source, files, found["documents"], found["fingerprint"], holdout, damage, notes)


def _refuse(problem: ValueError) -> None:
    raise problem from None


def _ignore(problem: ValueError) -> None:
    pass
