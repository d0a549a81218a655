"""The folder where what is slow to compute is kept between runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """``$VOCABPP_CACHE``, else ``vocabpp_jax`` in the user's cache folder; made if it is not there."""
    named = os.environ.get("VOCABPP_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(home) / "vocabpp_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise ValueError(
            f"the cache folder {folder} cannot be made ({reason.strerror}); set VOCABPP_CACHE to one that can"
        ) from None
    return folder


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` when the block ends well: a reader sees all of the file or none."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem + ".", suffix=".partial" + path.suffix)
    except OSError as reason:
        raise ValueError(
            f"the folder {path.parent} cannot be written to ({reason.strerror}); set VOCABPP_CACHE to one that can"
        ) from None
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
