"""Checkpoint folders, local or in a Cloud Storage bucket: paths, locks, listing.

:mod:`etils.epath` gives both the same interface. A bucket has no atomic rename or lock: orbax marks a complete
checkpoint with a file, and the lock is a :class:`Lease`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol

from etils import epath
from orbax.checkpoint import utils

from ..runtime.faults import reason

Folder = str | os.PathLike[str]
LOCK = ".lock"
BEAT, PATIENCE, SETTLE = 10.0, 35.0, 2.0
"""Timings of a :class:`Lease`, in seconds: between heartbeats, until a silent holder counts as dead, and for two
processes that take it at once to notice each other."""
_REFUSAL = re.compile("(PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): ")
"""Prefixes of tensorstore's messages for refused access; it has a single exception type for everything."""
_CLIENTS = ("aiohttp", "gcsfs", "google", "requests", "tensorflow")
"""Packages whose exceptions mean that a bucket cannot be reached."""


def folder_path(folder: Folder) -> epath.Path:
    """The folder with ``~`` expanded; ``gs://BUCKET/...`` is returned unchanged.

    Raises:
        ValueError: a scheme other than ``gs``, or no package installed that can reach a bucket.
    """
    name = os.fspath(folder)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", name)
    if not scheme:
        expanded = os.path.expanduser(name)
        if expanded.startswith("~"):
            raise ValueError(f"{name!r} names a user that does not exist; write the folder in full")
        return epath.Path(expanded)
    bucket = re.match(r"gs://[^/]+", name)
    if not bucket:
        raise ValueError(f"{name!r} is not a place for checkpoints; give a local folder or gs://BUCKET/FOLDER")
    if find_spec("gcsfs") is None and find_spec("tensorflow") is None:
        raise ValueError(f"{name!r} needs the package gcsfs; pip install 'vocabpp-jax[gcs]'")
    if find_spec("gcsfs") is not None:
        from fsspec.config import conf

        # A cached listing would hide what other processes write.
        conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(name)


def in_bucket(folder: epath.Path) -> bool:
    return os.fspath(folder).startswith("gs://")


class Unreadable(ValueError):
    """The file system or bucket refuses access, so nothing is known about what is stored."""


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """Turn errors that say nothing about the stored data (permissions, connections, ...) into Unreadable."""
    try:
        yield
    except Exception as problem:
        if not _refused(problem):
            raise
        raise Unreadable(f"{path} cannot be read ({reason(problem)})") from problem


def _refused(problem: Exception) -> bool:
    if isinstance(problem, OSError):
        about_content = FileNotFoundError | NotADirectoryError | IsADirectoryError
        return not isinstance(problem, about_content) and problem.errno != errno.EIO
    return bool(_REFUSAL.match(str(problem))) or type(problem).__module__.partition(".")[0] in _CLIENTS


def steps_in(folder: Folder) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending. An unfinished save does not count.

    Raises:
        ValueError: the folder exists but cannot be listed.
    """
    path = folder_path(folder)
    with readable(path):
        if not path.is_dir():
            return []
        named = [child for child in path.iterdir() if re.fullmatch("0|[1-9][0-9]*", child.name)]
        return sorted(int(child.name) for child in named if not in_bucket(path) or utils.is_checkpoint_finalized(child))


class Lock(Protocol):
    """Keeps other runs from writing to a folder."""

    token: str
    """What the holder wrote into the lock file; a process that reads something else is looking at another folder."""

    def check(self) -> None:
        """Raise ValueError if another run has taken the folder."""

    def release(self) -> None: ...


def lock(folder: epath.Path) -> Lock:
    """Create the folder and lock it. Raises ValueError if it is not writable or another run is writing to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Lease(folder) if in_bucket(folder) else FileLock(folder)
    except NoLocks:
        return Lease(folder)
    except ValueError:
        raise
    except Exception as problem:
        if not isinstance(problem, OSError) and not in_bucket(folder):
            raise
        raise ValueError(f"checkpoint_dir is {str(folder)!r}, which cannot be written ({reason(problem)})") from None


class NoLocks(OSError):
    """The file system does not support locks, such as Lustre mounted without flock."""


class FileLock:
    """The lock of a local folder. The system releases it when the process ends, however it ends."""

    def __init__(self, folder: epath.Path):
        self.token = secrets.token_hex(8)
        self._file = open(folder / LOCK, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise _in_use(folder) from None
        except OSError as problem:
            self._file.close()
            if problem.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise NoLocks(problem.errno, problem.strerror) from None
            raise
        self._file.truncate(0)
        self._file.write(self.token)
        self._file.flush()
        os.fsync(self._file.fileno())

    def check(self) -> None:
        pass

    def release(self) -> None:
        self._file.truncate(0)
        self._file.close()


class Lease:
    """A lock for file systems without locks: a file that its holder rewrites every ``beat`` seconds (:data:`BEAT`).

    Whoever finds the file reads it again after ``patience`` seconds. If it changed, the holder is alive; if not, the
    holder is gone and the lease is free. If two processes take it at once, the last to write has it.
    """

    def __init__(
        self,
        folder: epath.Path,
        beat: float | None = None,
        patience: float | None = None,
        settle: float | None = None,
    ):
        self.token = secrets.token_hex(8)
        beat, patience, settle = beat or BEAT, patience or PATIENCE, settle or SETTLE
        self._folder, self._file, self._beat = folder, folder / LOCK, beat
        self._count, self._lost, self._end = 0, False, threading.Event()
        if (found := self._read()) and self._changes(found, patience):
            raise _in_use(folder)
        self._write()
        time.sleep(settle)
        if not self._mine():
            raise _in_use(folder)
        self._thread = threading.Thread(target=self._keep, name="checkpoint lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._lost:
            raise _in_use(self._folder)

    def release(self) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it expires by itself
            if self._mine():
                self._file.unlink()

    def _changes(self, found: str, patience: float) -> bool:
        """Whether the file is being rewritten. A holder that releases it meanwhile does not count."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            time.sleep(patience / 20)
            if (now := self._read()) != found:
                return bool(now)
        return False

    def _keep(self) -> None:
        while not self._end.wait(self._beat):
            with contextlib.suppress(Exception):  # the next heartbeat may get through
                if not self._mine():
                    self._lost = True
                    return
                self._write()

    def _write(self) -> None:
        self._count += 1
        text = f"{self.token} {self._count}"
        if in_bucket(self._folder):  # where an object is replaced as a whole
            self._file.write_text(text)
            return
        # A file written in place is empty for a moment, and would look like one that its holder has released.
        new = self._folder / f"{LOCK}-{self.token}"
        new.write_text(text)
        new.replace(self._file)

    def _mine(self) -> bool:
        return self._read().startswith(self.token)

    def _read(self) -> str:
        try:
            return self._file.read_text()
        except FileNotFoundError:
            return ""


def sees_lock(folder: epath.Path, token: str, within: float = 10.0) -> None:
    """Raise ValueError if the lock file with its token does not appear here: this process has another folder."""
    until = time.monotonic() + within
    while True:
        try:
            if (folder / LOCK).read_text().startswith(token):
                return
            found = "another file"
        except OSError as problem:
            found = reason(problem)
        if time.monotonic() > until:
            raise ValueError(
                f"checkpoint_dir is {str(folder)!r}, where this process does not see what process 0 writes ({found}); "
                "give a folder that all hosts share"
            )
        time.sleep(0.2)


def move_aside(folder: epath.Path, step: int) -> epath.Path:
    """Rename a checkpoint to ``damaged-STEP``, or ``damaged-STEP-2`` and so on if that exists; returns the new path."""
    aside, number = folder / f"damaged-{step}", 2
    while aside.exists():
        aside, number = folder / f"damaged-{step}-{number}", number + 1
    (folder / str(step)).rename(aside)
    return aside


def _in_use(folder: epath.Path) -> ValueError:
    return ValueError(f"checkpoint_dir is {str(folder)!r}, to which another run is writing; end it first")
