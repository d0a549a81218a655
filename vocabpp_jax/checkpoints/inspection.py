"""Inspect checkpoints without a pipeline: list a folder, verify a checkpoint, export parameters as safetensors.

Arrays are read one at a time, so the model may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from ..pipeline.mesh import all_devices
from .folders import Folder, steps_in
from .store import Damaged, Record, read_arrays, read_record

PARAMS = "params."


@dataclass(frozen=True)
class Entry:
    """A checkpoint in a folder."""

    step: int
    record: Record | None
    problem: str | None
    """Why its record cannot be read."""

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(x["shape"])) for name, x in self.record["arrays"].items() if name.startswith(PARAMS))

    @property
    def bytes(self) -> int:
        return sum(_bytes(x) for x in self.record["arrays"].values())


def entries(folder: Folder) -> list[Entry]:
    """All checkpoints of a folder, oldest first; reads only their records.

    Raises:
        ValueError: there are none.
    """
    if not (steps := steps_in(folder)):
        raise ValueError(f"there is no checkpoint in {folder}; give the folder that --checkpoint-dir named")
    found = []
    for step in steps:
        try:
            found.append(Entry(step, read_record(folder, step), None))
        except ValueError as problem:
            found.append(Entry(step, None, str(problem)))
    return found


def verify(folder: Folder, step: int, progress: Callable[[int, int], None] = lambda done, of: None) -> list[str]:
    """Read every array of a checkpoint; returns a sentence per array that differs from what was written."""
    try:
        record = read_record(folder, step)
    except ValueError as problem:
        return [str(problem)]
    problems = []
    for done, name in enumerate(sorted(record["arrays"]), start=1):
        try:
            _read(folder, step, [name], record)
        except Damaged as problem:
            problems.append(str(problem))
        progress(done, len(record["arrays"]))
    return problems


def export(folder: Folder, step: int, output: str | Path, shard_bytes: int = 4 * 2**30) -> list[Path]:
    """Write the parameters of a checkpoint as safetensors, under their canonical names (``blocks.0.mlp.up.kernel``).

    Writes one file if ``output`` ends in ``.safetensors`` and everything fits into ``shard_bytes``; otherwise
    ``output`` is a folder that gets ``model-00001-of-00003.safetensors``, ... and ``model.safetensors.index.json``.
    Every array is checked against its fingerprint. Nothing is overwritten.

    Raises:
        ValueError: the checkpoint is damaged, or the output already exists or cannot be written.
    """
    record, output = read_record(folder, step), Path(output)
    names = [name for name in record["arrays"] if name.startswith(PARAMS)]
    shards = list(_shards(names, record, shard_bytes))
    single = output.suffix == ".safetensors"
    if single and len(shards) > 1:
        raise ValueError(f"{output} would have more than {shard_bytes} bytes; give a folder, or a larger --shard-gb")
    if output.exists():
        raise ValueError(f"{output} is there already; give another name")
    metadata = {"format": "vocabpp_jax canonical parameters", "step": str(step)}
    files, index = [], {}
    try:
        (output.parent if single else output).mkdir(parents=True, exist_ok=True)
        for number, shard in enumerate(shards, start=1):
            file = output if single else output / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            arrays = {n.removeprefix(PARAMS): np.asarray(x) for n, x in _read(folder, step, shard, record).items()}
            partial = file.with_suffix(".partial")
            save_file(arrays, partial, metadata)
            partial.replace(file)
            files.append(file)
            index |= dict.fromkeys(arrays, file.name)
        if not single:
            total = sum(_bytes(record["arrays"][name]) for name in names)
            text = json.dumps({"metadata": metadata | {"total_size": total}, "weight_map": index}, indent=1)
            (output / "model.safetensors.index.json").write_text(text + "\n")
    except OSError as problem:
        raise ValueError(f"{problem.filename or output} cannot be written ({problem.strerror})") from None
    return files


def _read(folder: Folder, step: int, names: list[str], record: Record) -> dict[str, jax.Array]:
    here = jax.sharding.SingleDeviceSharding(all_devices()[0])
    arrays = {name: record["arrays"][name] for name in names}
    shapes = {n: jax.ShapeDtypeStruct(tuple(x["shape"]), x["dtype"], sharding=here) for n, x in arrays.items()}
    return read_arrays(folder, step, shapes, record)


def _shards(names: list[str], record: Record, limit: int) -> Iterator[list[str]]:
    shard, size = [], 0
    for name in names:
        more = _bytes(record["arrays"][name])
        if shard and size + more > limit:
            yield shard
            shard, size = [], 0
        shard, size = [*shard, name], size + more
    yield shard


def _bytes(array: Record) -> int:
    return int(np.prod(array["shape"])) * np.dtype(array["dtype"]).itemsize
