"""Where the text comes from, and which of it is held out.

A corpus is a sequence of documents in a fixed order. A file of text is one document; a ``.jsonl`` file holds one a
line, in the field ``text``; a folder holds the documents of all its files. Without a source, the corpus is the Python
standard library's own sources: real text that every machine has.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STANDARD_LIBRARY = "stdlib"
HELD_OUT = 0.05
"""The part of the documents that validation gets."""


@dataclass(frozen=True)
class Corpus:
    """Documents, split into train and validation by a hash of their text, so that no duplicate stands in both.

    A corpus of a single document is cut near its end instead. Made by :func:`open_corpus`.
    """

    name: str
    files: tuple[Path, ...]
    documents: int
    fingerprint: str
    """A hash of every document's text: the same for the same text, wherever it lies."""
    limit: int
    """Documents whose hash is at most this are held out."""

    def train(self) -> Iterator[str]:
        """The documents to train on."""
        for text in self._texts():
            if self.documents == 1:
                yield text[: _cut(text)]
            elif _hash(text) > self.limit:
                yield text

    def validation(self) -> Iterator[str]:
        """The documents held out."""
        for text in self._texts():
            if self.documents == 1:
                yield text[_cut(text) :]
            elif _hash(text) <= self.limit:
                yield text

    def _texts(self) -> Iterator[str]:
        return _read(self.files, skip_binary=self.name == STANDARD_LIBRARY)


def open_corpus(source: str = STANDARD_LIBRARY) -> Corpus:
    """Read ``source`` once: ``stdlib``, a text file, a ``.jsonl`` file, or a folder of such files.

    Raises ValueError, naming the file, where there is nothing to read or it is not text.
    """
    if source == STANDARD_LIBRARY:
        files = _standard_library()
    elif Path(source).is_dir():
        files = tuple(sorted(path for path in Path(source).rglob("*") if path.is_file() and not _hidden(path, source)))
    elif Path(source).is_file():
        files = (Path(source),)
    else:
        raise ValueError(f"data is {source!r}, no file or folder; give a text file, a .jsonl file or a folder of them")

    everything, documents, least = hashlib.blake2b(digest_size=16), 0, 2**64
    for text in _read(files, skip_binary=source == STANDARD_LIBRARY):
        digest = _hash(text)
        everything.update(digest.to_bytes(8, "big"))
        documents, least = documents + 1, min(least, digest)
    if not documents:
        raise ValueError(f"data is {source!r}, which holds no text; give a text file, a .jsonl file or a folder")
    # A small corpus may have no hash below the share held out: its least one is held out then.
    return Corpus(source, files, documents, everything.hexdigest(), limit=max(least, int(HELD_OUT * 2**64)))


def _standard_library() -> tuple[Path, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return tuple(sorted(path for path in root.rglob("*.py") if not installed.intersection(path.parts)))


def _hidden(path: Path, root: str) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read(files: tuple[Path, ...], skip_binary: bool) -> Iterator[str]:
    """Every document that is not empty. The standard library holds a few files that test other encodings."""
    for path in files:
        try:
            for text in _jsonl(path) if path.suffix == ".jsonl" else (_decoded(path.read_bytes(), str(path)),):
                if text.strip():
                    yield text
        except ValueError:
            if not skip_binary:
                raise
        except OSError as reason:
            if not skip_binary:
                raise ValueError(f"{path} cannot be read ({reason.strerror}); leave it out or mend it") from None


def _decoded(raw: bytes, where: str) -> str:
    if b"\0" in raw:
        raise ValueError(f"{where} is not text: it has a NUL byte at {raw.index(0)}; give UTF-8 text")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not text: byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8; give UTF-8 text"
        ) from None


def _jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            text = _decoded(line, where)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                raise ValueError(f"{where} is not JSON; give one object with a field 'text' a line") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f"{where} has no field 'text' that is a string; give one object with it a line")
            # JSON can spell lone surrogates, which have no UTF-8: they become question marks.
            yield record["text"].encode(errors="replace").decode()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _cut(text: str) -> int:
    """Where the tail of a lone document begins: the line end nearest before its last twentieth, if there is one."""
    at = int(len(text) * (1 - HELD_OUT))
    return text.rfind("\n", 0, at) + 1 or at
