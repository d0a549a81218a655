"""Safetensors files of a checkpoint: one, or several with an index. Everything is checked before a tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path as File
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")


class Entry(NamedTuple):
    """Where a tensor is, and of which shape."""

    file: File
    shape: tuple[int, ...]


class Tensors:
    """The tensors of a folder, read slice by slice.

    Raises:
        ValueError: no such files, a header that is none, a file that ends too soon, a tensor that the index promises
            and its file lacks, a dtype that is no float.
    """

    def __init__(self, folder: File):
        self.entries: dict[str, Entry] = {}
        self._open: dict[File, safe_open] = {}
        for file, promised in _files(folder):
            header = _header(file)
            for name in promised or header:
                if name not in header:
                    raise ValueError(f"{INDEX} says that tensor {name!r} is in {file.name}, which does not have it")
                if header[name]["dtype"] not in DTYPES:
                    raise ValueError(
                        f"tensor {name!r} in {file.name} is {header[name]['dtype']}; it must be one of "
                        f"{', '.join(DTYPES)}"
                    )
                self.entries[name] = Entry(file, tuple(header[name]["shape"]))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor in float32; reads no more than it."""
        file = self.entries[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, "numpy")
        return np.asarray(self._open[file].get_slice(name)[index]).astype(np.float32)


def _files(folder: File) -> list[tuple[File, set[str]]]:
    """Every file, with the tensors that the index says are in it."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        try:
            where = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"{index} has no weight_map") from None
        for name in sorted(set(where.values())):
            if not (folder / name).is_file():
                raise ValueError(f"{INDEX} names the file {name}, which is not in {folder}")
        return [
            (folder / name, {t for t, file in where.items() if file == name}) for name in sorted(set(where.values()))
        ]
    if single.is_file():
        return [(single, set())]
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _header(file: File) -> dict[str, dict]:
    """A file's header, once the file is known to be as long as it says."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is {size} bytes long, which ends within its header")
        try:
            header = json.loads(f.read(length))
        except ValueError:
            raise ValueError(f"{file} is not a safetensors file: its header is not JSON") from None
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        end = 8 + length + tensor["data_offsets"][1]
        if end > size:
            raise ValueError(
                f"{file} is truncated: it is {size} bytes long, and tensor {name!r} of shape {tensor['shape']} "
                f"ends at byte {end}"
            )
    try:
        safe_open(file, "numpy")
    except SafetensorError as problem:
        raise ValueError(f"{file} is not a safetensors file: {problem}") from None
    return header


def write(
    folder: File, tensors: Iterable[tuple[str, np.ndarray]], sizes: dict[str, int], at_most: int, *, writes: bool
) -> None:
    """Writes tensors as they come, in files of at most so many bytes each (a larger tensor has one for itself).

    Args:
        sizes: bytes of every tensor, in the order in which they come: it decides which file a tensor is in.
        writes: False on processes that only take part in making the tensors.
    """
    files: list[dict[str, None]] = [{}]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > at_most:
            files.append({})
            filled = 0
        files[-1][name] = None
        filled += size
    total = len(files)
    names = [SINGLE] if total == 1 else [f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
    tensors = iter(tensors)
    for file, within in zip(names, files, strict=True):
        held = dict(next(tensors) for _ in within)
        if writes:
            save_file({k: np.ascontiguousarray(held[k]) for k in within}, folder / file, metadata={"format": "pt"})
    if total > 1 and writes:
        where = {name: file for file, within in zip(names, files, strict=True) for name in within}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
