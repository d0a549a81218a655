"""Megatron's indexed datasets: token ids in ``NAME.bin``, document boundaries in ``NAME.idx``.

``.idx``, little-endian: the magic ``MMIDIDX\\0\\0``, version 1 as uint64, a code for the token type as uint8, the
numbers of sequences and of document bounds as uint64; then int32 lengths of the sequences in tokens, int64 offsets of
the sequences in bytes, and int64 bounds: document i is the sequences ``bounds[i]`` to ``bounds[i + 1]``.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SUFFIXES = (".idx", ".bin")
_EDGE = 2**20  # bytes at the beginning and end of the .bin that identify it


@dataclass(frozen=True)
class IndexedDataset:
    """The tokens of all documents back to back, memory-mapped, and where each document ends."""

    tokens: np.ndarray
    ends: np.ndarray
    fingerprint: str
    damaged: tuple[str, ...]
    file: Path
    """The ``.bin``."""


def is_megatron(source: str) -> bool:
    """Whether the source names an indexed dataset: its ``.idx``, its ``.bin``, or both by the name without suffix."""
    try:
        return Path(source).suffix.lower() in SUFFIXES or (
            not Path(source).exists() and all(_beside(source, suffix).is_file() for suffix in SUFFIXES)
        )
    except (OSError, ValueError):  # a name that is too long, or contains a NUL
        return False


def _beside(stem: str, suffix: str) -> Path:
    """A file of the dataset, whatever the case of its suffix."""
    paths = [Path(stem + suffix), Path(stem + suffix.upper())]
    return next((path for path in paths if path.is_file()), paths[0])


def read_indexed(source: str, damaged: Literal["refuse", "skip"] = "refuse") -> IndexedDataset:
    """Map the dataset; of a truncated ``.bin``, the complete documents if ``damaged`` is "skip".

    Raises:
        ValueError: a file is missing, the index is not a Megatron index or contradicts itself, or index and ``.bin``
            differ in length.
    """
    stem = source[:-4] if source.lower().endswith(SUFFIXES) else source
    index, data = (_beside(stem, suffix) for suffix in SUFFIXES)
    try:
        raw, size = index.read_bytes(), data.stat().st_size
        digest = hashlib.blake2b(raw, digest_size=16)
        with data.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    except OSError as problem:
        raise ValueError(
            f"{problem.filename} cannot be read ({problem.strerror}); a Megatron dataset is {stem}.idx and {stem}.bin"
        ) from None
    lengths, bounds, kind = _parse(raw, index)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[bounds[1:]]
    total, held = int(lengths.sum(dtype=np.int64)), size // kind.itemsize
    left_out: tuple[str, ...] = ()
    if size > total * kind.itemsize:
        sentence = f"{data} is {size} bytes long; the {total} tokens of its index take {total * kind.itemsize}"
        if damaged == "refuse":
            raise ValueError(f"{sentence}; give the index that belongs to it, or leave out what is damaged")
        left_out = (f"{sentence}, and the rest is left out",)
    if held < total:
        sentence = f"{data} holds {held} tokens; its index says {total}: it was cut off"
        if damaged == "refuse":
            raise ValueError(f"{sentence}; fix it, or leave out what is damaged")
        whole = ends[ends <= held]
        left_out = (f"{sentence}, and {len(ends) - len(whole)} documents are left out",)
        ends = whole
    ends = ends[np.diff(ends, prepend=0) > 0]  # drop empty documents, which end where the previous one does
    if not len(ends):
        raise ValueError(f"{data} holds no whole document; give another dataset")
    tokens = np.memmap(data, kind, mode="r", shape=(int(ends[-1]),))
    return IndexedDataset(tokens, ends, digest.hexdigest(), left_out, data)


def _parse(raw: bytes, path: Path) -> tuple[np.ndarray, np.ndarray, np.dtype]:
    """Sequence lengths, document bounds, and the token type."""
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise ValueError(f"{path} is not the index of a Megatron dataset: it does not begin with {MAGIC[:7].decode()}")
    _, version, code, sequences, documents = HEADER.unpack_from(raw)
    if version != 1:
        raise ValueError(f"{path} has version {version}; version 1 can be read")
    if code not in TYPES:
        raise ValueError(f"{path} has tokens of type code {code}; the integer types are {', '.join(map(str, TYPES))}")
    if len(raw) < HEADER.size + 12 * sequences + 8 * documents:
        raise ValueError(f"{path} was cut off: it has {len(raw)} bytes, too few for {sequences} sequences")
    kind = np.dtype(TYPES[code]).newbyteorder("<")
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
    bounds = np.frombuffer(raw, "<i8", documents, HEADER.size + 12 * sequences)
    if (lengths < 0).any() or not np.array_equal(pointers[1:], np.cumsum(lengths, dtype=np.int64)[:-1] * kind.itemsize):
        raise ValueError(f"{path} is damaged: its offsets are not those that its lengths add up to")
    if not documents or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise ValueError(f"{path} is damaged: its document bounds do not rise from 0 to its {sequences} sequences")
    return lengths, bounds, kind
