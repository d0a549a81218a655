"""Caches what was found in large files, so that a restart does not read all the data again."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vocabpp_jax.data.cache import cache_folder, written_atomically

_BLOCKS, _BLOCK_BYTES = 64, 2**14
_SETTLED = 2.0  # seconds


def remembered(about: dict[str, Any], files: Sequence[Path], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of ``compute``, cached while the files are unchanged.

    They count as unchanged if path, size and modification time of each are the same, and so is a sample of their bytes;
    nothing else is read then. Results for files younger than 2 seconds are not cached, because such a file may change
    again without changing its modification time; files of the cache itself never change in place.

    Args:
        about: whatever else the result depends on, JSON.
        files: all files that ``compute`` reads.
        compute: returns JSON.

    Raises:
        ValueError: what ``compute`` raises, or the cache cannot be written.
    """
    began = time.time()
    try:
        before = _stats(files)
        key = _hash([_version(), about, before])
        sample = _sample(before, key)
    except OSError:
        return compute()  # which has a sentence for a file that cannot be read
    folder = cache_folder()
    entry = folder / f"facts-{key}.json"
    try:
        kept = json.loads(entry.read_bytes())
        if kept["sample"] == sample and kept["check"] == _hash(kept["facts"]):
            return kept["facts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # missing or damaged
    facts = compute()
    newest = max((changed for path, _, changed in before if Path(path).parent != folder.absolute()), default=0)
    if newest / 1e9 < began - _SETTLED and _unchanged(files, before):
        with written_atomically(entry) as partial:
            partial.write_text(json.dumps({"sample": sample, "facts": facts, "check": _hash(facts)}))
    return facts


@functools.cache
def _version() -> str:
    """A hash of the code that reads data: another version may compute something else."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.blake2b(b"".join(path.read_bytes() for path in sources), digest_size=8).hexdigest()


def _stats(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Path, size and modification time of each file."""
    return [(os.path.abspath(path), (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in files]


def _unchanged(files: Sequence[Path], before: list[tuple[str, int, int]]) -> bool:
    try:
        return _stats(files) == before
    except OSError:
        return False


def _sample(stats: list[tuple[str, int, int]], seed: str) -> str:
    """A hash of blocks at random places in the files, more of them in larger ones, and of the files' ends."""
    ends = np.cumsum([size for _, size, _ in stats], dtype=np.int64)
    digest = hashlib.blake2b(digest_size=16)
    if len(ends) and ends[-1]:
        places = np.random.default_rng(int(seed, 16)).integers(ends[-1], size=_BLOCKS)
        for place in np.sort(np.concatenate([places, ends[-_BLOCKS:] - 1])):
            number = int(np.searchsorted(ends, place, side="right"))
            path, size, _ = stats[min(number, len(stats) - 1)]
            start = max(0, int(place) - int(ends[min(number, len(stats) - 1)] - size) - _BLOCK_BYTES + 1)
            with open(path, "rb") as file:
                file.seek(start)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
