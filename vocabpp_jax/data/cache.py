"""The cache folder for results that are slow to compute."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """``$VOCABPP_CACHE``, else ``vocabpp_jax`` in the user's cache folder; created if missing."""
    named = os.environ.get("VOCABPP_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(home) / "vocabpp_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise ValueError(
            f"the cache folder {folder} cannot be created ({reason.strerror}); set VOCABPP_CACHE to one that can"
        ) from None
    return folder


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` when the block succeeds: readers see the complete file or none.

    Raises:
        ValueError: the file cannot be written, for example because the disk is full.
    """
    partial = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem + ".", suffix=".partial" + path.suffix)
        os.close(handle)
        partial = Path(name)
        yield partial
        partial.replace(path)
    except OSError as reason:
        raise ValueError(
            f"{path} cannot be written ({reason.strerror or reason}); make room in its folder, or set VOCABPP_CACHE to "
            "another"
        ) from None
    finally:
        if partial:
            partial.unlink(missing_ok=True)
