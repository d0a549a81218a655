"""Where the text comes from, and which of it is held out.

A corpus is a sequence of documents in a fixed order. A file of text is one document; a ``.jsonl`` file holds one a
line and a ``.parquet`` file one a row, in the field ``text``; a folder holds the documents of all its files. Without a
source, the corpus is the Python standard library's own sources: real text that every machine has.

What is damaged is refused, with its name, or left out and counted: a whole text file, a line of a ``.jsonl`` file, the
rest of a ``.parquet`` file.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

STANDARD_LIBRARY = "stdlib"
HELD_OUT = 0.05
"""The part of the documents that validation gets."""
OnDamage = Callable[[ValueError], None]
"""What is done about something damaged: raise the error, or take note of it."""


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
    damaged: tuple[str, ...] = ()
    """A sentence for each thing that was left out."""

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
        leaves_out = self.damaged or self.name == STANDARD_LIBRARY
        return _read(self.files, _ignore if leaves_out else _refuse)


def open_corpus(source: str = STANDARD_LIBRARY, damaged: Literal["refuse", "skip"] = "refuse") -> Corpus:
    """Read ``source`` once: ``stdlib``, a text, ``.jsonl`` or ``.parquet`` file, or a folder of such files.

    Raises ValueError, naming the file, where there is nothing to read, or where something is damaged that is not to be
    left out.
    """
    if source == STANDARD_LIBRARY:
        files = _standard_library()
    elif Path(source).is_dir():
        files = tuple(sorted(path for path in Path(source).rglob("*") if path.is_file() and not _hidden(path, source)))
    elif Path(source).is_file():
        files = (Path(source),)
    else:
        raise ValueError(
            f"data is {source!r}, no file or folder; give a text, .jsonl or .parquet file, or a folder of them"
        )
    if any(path.suffix == ".parquet" for path in files) and find_spec("pyarrow") is None:
        raise ValueError(f"data is {source!r}; to read .parquet, pip install 'vocabpp-jax[parquet]'")

    left_out: list[str] = []
    on_damage: OnDamage = _refuse
    if damaged == "skip":
        on_damage = lambda problem: left_out.append(str(problem))  # noqa: E731
    if source == STANDARD_LIBRARY:  # it holds a few files that test other encodings
        on_damage = _ignore
    everything, documents, least = hashlib.blake2b(digest_size=16), 0, 2**64
    for text in _read(files, on_damage):
        digest = _hash(text)
        everything.update(digest.to_bytes(8, "big"))
        documents, least = documents + 1, min(least, digest)
    if not documents:
        damage = f" ({left_out[0]})" if left_out else ""
        raise ValueError(
            f"data is {source!r}, which holds no text{damage}; give a text file, a .jsonl file or a folder"
        )
    # A small corpus may have no hash below the share held out: its least one is held out then.
    limit = max(least, int(HELD_OUT * 2**64))
    return Corpus(source, files, documents, everything.hexdigest(), limit, tuple(left_out))


def _standard_library() -> tuple[Path, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return tuple(sorted(path for path in root.rglob("*.py") if not installed.intersection(path.parts)))


def _hidden(path: Path, root: str) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read(files: tuple[Path, ...], on_damage: OnDamage) -> Iterator[str]:
    """Every document that is not empty; what is damaged is told, and left out if that does not raise."""
    for path in files:
        try:
            for text in _documents(path, on_damage):
                if text.strip():
                    yield text
        except ValueError as problem:
            on_damage(problem)
        except OSError as problem:
            on_damage(ValueError(f"{path} cannot be read ({problem.strerror}); leave it out or mend it"))


def _documents(path: Path, on_damage: OnDamage) -> Iterator[str]:
    if path.suffix == ".jsonl":
        return _jsonl(path, on_damage)
    if path.suffix == ".parquet":
        return _parquet(path)
    return iter((_decoded(path.read_bytes(), str(path)),))


def _refuse(problem: ValueError) -> None:
    raise problem from None


def _ignore(problem: ValueError) -> None:
    pass


def _decoded(raw: bytes, where: str) -> str:
    if b"\0" in raw:
        raise ValueError(f"{where} is not text: it has a NUL byte at {raw.index(0)}; give UTF-8 text")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not text: byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8; give UTF-8 text"
        ) from None


def _jsonl(path: Path, on_damage: OnDamage) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if text := _record(line, f"{path}:{number}"):
                    yield text
            except ValueError as problem:
                on_damage(problem)


def _record(line: bytes, where: str) -> str:
    """The text of a line of a ``.jsonl`` file, empty where the line is."""
    text = _decoded(line, where)
    if not text.strip():
        return ""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is not JSON; give one object with a field 'text' a line") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f"{where} has no field 'text' that is a string; give one object with it a line")
    return _encodable(record["text"])


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as arrow  # an extra
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if "text" not in schema.names or not _is_string(schema.field("text").type):
                raise ValueError(f"{path} has no column 'text' of strings; its columns are {', '.join(schema.names)}")
            for batch in file.iter_batches(columns=["text"], batch_size=1024):
                yield from (_encodable(text) for text in batch.column(0).to_pylist() if text)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is damaged or no parquet file: {str(problem).splitlines()[0]}") from None


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _encodable(text: str) -> str:
    """JSON can spell lone surrogates, which have no UTF-8: they become question marks."""
    return text.encode(errors="replace").decode()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _cut(text: str) -> int:
    """Where the tail of a lone document begins: the line end nearest before its last twentieth, if there is one."""
    at = int(len(text) * (1 - HELD_OUT))
    return text.rfind("\n", 0, at) + 1 or at
