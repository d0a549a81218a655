"""A checkpoint's safetensors files: one, or several with an index. Everything is checked before a tensor is read."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path as File
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vocabpp_jax.models.hf_fields import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TAIL = "mtp.safetensors"
"""The file for the multi-token-prediction tail."""
DTYPES = ("F32", "F16", "BF16")


class Entry(NamedTuple):
    """Where a tensor is stored, its shape and its dtype."""

    file: File
    shape: tuple[int, ...]
    dtype: str


class Tensors:
    """The tensors of a folder, or of one file in it, read slice by slice.

    Raises:
        ValueError: no such files, an invalid header, a truncated file, or a tensor that the index lists and its file
            lacks.
    """

    def __init__(self, folder: File, only: str | None = None):
        self.entries: dict[str, Entry] = {}
        self._open: dict[File, safe_open] = {}
        for file, promised in _files(folder) if only is None else [(folder / only, set())]:
            header = _header(file)
            for name in promised or header:
                if name not in header:
                    raise ValueError(f"{INDEX} says that tensor {name!r} is in {file.name}, which does not have it")
                self.entries[name] = Entry(file, tuple(header[name]["shape"]), header[name]["dtype"])

    def check(self, where: File, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError if a tensor is missing, has another shape, or has a dtype that weights never have."""
        for name, shape in wanted.items():
            if (entry := self.entries.get(name)) is None:
                raise ValueError(f"{where} has no tensor {name!r}, which should have shape {list(shape)}")
            if entry.dtype not in DTYPES:
                raise ValueError(
                    f"tensor {name!r} in {entry.file.name} is {entry.dtype}; it must be one of {', '.join(DTYPES)}"
                )
            if entry.shape != shape:
                raise ValueError(
                    f"tensor {name!r} in {entry.file.name} has shape {list(entry.shape)}; the model's is {list(shape)}"
                )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor in float32; reads only that part."""
        file = self.entries[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, "numpy")
        return np.asarray(self._open[file].get_slice(name)[index]).astype(np.float32)


def _files(folder: File) -> list[tuple[File, set[str]]]:
    """Every file, with the tensors that the index says are in it."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
            raise ValueError(f"{index} has no weight_map from names of tensors to names of files")
        names = sorted(set(where.values()))
        for name in names:
            if File(name).name != name or "\0" in name or not (folder / name).is_file():
                raise ValueError(f"{INDEX} names the file {name}, which is not in {folder}")
        return [(folder / name, {t for t, file in where.items() if file == name}) for name in names]
    if single.is_file():
        return [(single, set())]
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _header(file: File) -> dict[str, dict]:
    """A file's header, after checking that the file is as long as it says."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is {size} bytes long, which ends within its header")
        try:
            header = json.loads(f.read(length))
        except (ValueError, RecursionError):
            raise ValueError(f"{file} is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file} is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        if not _describes_a_tensor(tensor):
            raise ValueError(f"{file} is not a safetensors file: its header says {tensor!r} of tensor {name!r}")
        end = 8 + length + tensor["data_offsets"][1]
        if end > size:
            raise ValueError(
                f"{file} is truncated: it is {size} bytes long, and tensor {name!r} of shape {tensor['shape']} "
                f"ends at byte {end}"
            )
    try:
        safe_open(file, "numpy")
    except (SafetensorError, OSError) as problem:
        raise ValueError(f"{file} is not a safetensors file: {problem}") from None
    return header


def _describes_a_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    lists = [entry.get("shape"), entry.get("data_offsets")]
    return all(isinstance(x, list) and all(type(n) is int and n >= 0 for n in x) for x in lists) and len(lists[1]) == 2


def write(
    folder: File, tensors: Iterable[tuple[str, np.ndarray]], sizes: dict[str, int], at_most: int, *, writes: bool
) -> None:
    """Write tensors as they arrive, in files of at most ``at_most`` bytes each (a larger tensor gets its own file).

    Raises:
        OSError: a file cannot be written.

    Args:
        sizes: bytes of every tensor, in order of arrival: this decides which file a tensor is in.
        writes: False in processes that only take part in computing the tensors.
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
            save_tensors({k: held[k] for k in within}, folder / file)
    if total > 1 and writes:
        where = {name: file for file, within in zip(names, files, strict=True) for name in within}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def canonical_name(path: tuple) -> str:
    """The file's name for a parameter that no architecture names: ``tail.0.project.kernel``."""
    return ".".join(map(str, path))


def save_tensors(tensors: dict[str, np.ndarray], file: File) -> None:
    """Write one file. Raises OSError if it cannot be written."""
    try:
        save_file({k: np.ascontiguousarray(t) for k, t in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as problem:  # for example a full disk
        number = re.search(r"os error (\d+)", str(problem))
        said = os.strerror(int(number[1])) if number else str(problem)
        raise OSError(number and int(number[1]), said, str(file)) from None
