"""The documents of a file. Damage is passed to ``on_damage``, which raises it or records it.

A document is a text file, a JSON line or a Parquet row. A byte order mark is not part of the text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vocabpp_jax.data.files import BOM, OnDamage, format_of


def read_documents(files: tuple[Path, ...], on_damage: OnDamage) -> Iterator[str]:
    """Every non-blank document of the files, in order."""
    for path in files:
        try:
            for text in _documents(path, on_damage, alone=len(files) == 1):
                if text.strip():
                    yield text
        except ValueError as problem:
            on_damage(problem)
        except OSError as problem:
            on_damage(ValueError(f"{path} cannot be read ({problem.strerror}); leave it out or fix it"))


def _documents(path: Path, on_damage: OnDamage, alone: bool) -> Iterator[str]:
    match format_of(path, alone):
        case "jsonl":
            return _json_lines(path, on_damage)
        case "json":
            return _json_records(path, on_damage)
        case "parquet":
            return _parquet(path)
    return iter((_decoded(path.read_bytes(), str(path)),))


def _decoded(raw: bytes, where: str) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{where} is not UTF-8: it has the byte order mark of UTF-16; give UTF-8 text")
    raw = raw.removeprefix(BOM)
    if b"\0" in raw:
        raise ValueError(f"{where} is not text: it has a NUL byte at {raw.index(0)}; give UTF-8 text")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not text: byte 0x{raw[error.start]:02x} at {error.start} is not UTF-8; give UTF-8 text"
        ) from None


def _json_lines(path: Path, on_damage: OnDamage) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                if (text := _decoded(line, where)).strip():
                    yield _text_of(_parsed(text, where, "give one object with a field 'text' per line"), where)
            except ValueError as problem:
                on_damage(problem)


def _json_records(path: Path, on_damage: OnDamage) -> Iterator[str]:
    """A list of records, or a single record."""
    value = _parsed(_decoded(path.read_bytes(), str(path)), str(path), "give JSON lines, or a list of objects")
    for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
        try:
            yield _text_of(record, f"{path}, record {number}," if isinstance(value, list) else str(path))
        except ValueError as problem:
            on_damage(problem)


def _parsed(text: str, where: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is not JSON; {advice}") from None


def _text_of(record: Any, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f"{where} has no field 'text' that is a string; give an object with one for each document")
    return _encodable(record["text"])


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as arrow  # optional dependency
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if "text" not in schema.names or not _is_string(schema.field("text").type):
                names = " ".join(", ".join(schema.names).split())
                raise ValueError(f"{path} has no column 'text' of strings; its columns are {names}")
            for batch in file.iter_batches(columns=["text"], batch_size=1024):
                yield from (_encodable(text) for text in batch.column(0).to_pylist() if text)
    except (arrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise ValueError(f"{path} is damaged or not a parquet file: {reason}") from None


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON can spell but UTF-8 cannot encode, with question marks."""
    return text.encode(errors="replace").decode()
