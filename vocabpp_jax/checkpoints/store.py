"""Checkpoint storage: saved in the background, complete or absent, and verified on load.

A checkpoint is ``FOLDER/STEP``. orbax writes the canonical arrays under ``state`` and moves the folder into place once
everything is on disk. ``run/metadata`` is a record of everything else: step, data position, configuration, and the
shape and fingerprint of every array.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import CoroutineType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from .. import training
from ..runtime import hosts
from ..runtime.faults import reason
from .canonical import Canonical, Flat, fingerprints
from .folders import Folder, Unreadable, folder_path, in_bucket, move_aside, readable, steps_in

Result = TypeVar("Result")
FORMAT, VERSION = "vocabpp_jax checkpoint", 1
RANDOM = "random"
"""The name of the stored random key; all other arrays belong to the training state."""
Record = dict[str, Any]


class Damaged(ValueError):
    """One of our checkpoints that cannot be read back as it was written."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in a pipeline's layout."""

    state: training.State
    key: jax.Array
    rows: int
    """Training sequences consumed so far."""
    record: Record


def read_record(folder: Folder, step: int) -> Record:
    """A checkpoint's record.

    Raises:
        Damaged: the record is missing or was changed.
        ValueError: the checkpoint is from another program or a later version of this one, or the file system refuses.
    """
    path = folder_path(folder) / str(step)
    damaged = foreign = False
    try:
        with readable(path):
            record = json.loads((path / "run" / "metadata").read_text())
        foreign = not isinstance(record, dict) or record.get("format") != FORMAT
    except (FileNotFoundError, NotADirectoryError):
        damaged = (path / "state").is_dir()
        foreign = not damaged
    except Unreadable:
        raise
    except (OSError, ValueError, RecursionError):
        damaged = True
    if foreign:
        raise ValueError(f"{path} is not a checkpoint of this program; give another folder, or move it away")
    if damaged or record.get("checksum") != _checksum(record):
        raise Damaged(f"{path} is damaged: its record cannot be read or was changed")
    if record["version"] != VERSION:
        raise ValueError(f"{path} has version {record['version']}; this program reads version {VERSION}")
    return record


def load(
    folder: Folder,
    canonical: Canonical,
    identity: dict[str, Any],
    *,
    accept_changes: bool = False,
    say: Callable[[str], None] = print,
) -> Loaded | None:
    """The newest intact checkpoint, in the pipeline's layout; None if the folder holds none.

    Newer ones that are damaged are renamed to ``damaged-STEP``, each reported through ``say``. All processes call this
    together; a checkpoint that is damaged for one counts as damaged for all.

    Args:
        identity: what must be unchanged for the run to continue as if never stopped: JSON values by name.
        accept_changes: continue even if the identity has changed.

    Raises:
        ValueError: the identity or the model has changed, the folder holds something else, none of its checkpoints is
            intact, or the file system refuses to read. If it happens in one process, all raise it.
    """
    hosts.check_same("the identity of the run", identity)
    path, damaged = hosts.agree(lambda: folder_path(folder)), []
    steps = hosts.agree(lambda: steps_in(path) if jax.process_index() == 0 else None)
    for step in reversed(hosts.from_first(steps)):
        flat = None  # free what was read of a damaged one
        record, why = _everywhere(lambda step=step: _checked(path, step, canonical, identity, accept_changes))
        if not why:
            record = hosts.from_first(record)
            hosts.agree(lambda step=step, record=record: _sees(path, step, record))
            shapes = canonical.shapes | {RANDOM: _random_shape(canonical, record)}
            flat, why = _everywhere(lambda step=step, shapes=shapes: _restored(path, step, shapes))
        if not why:  # the same in all processes, which compute it together
            why = _changed_array(path / str(step), flat, record)
        if why:
            damaged.append((step, why))
            continue
        for bad, why in damaged:
            aside = hosts.agree(lambda bad=bad: str(move_aside(path, bad)) if jax.process_index() == 0 else "")
            say(f"{why}; it is kept as {hosts.from_first(aside)}, and the run resumes from step {step}")
        key = _random_key(flat.pop(RANDOM), record)
        return Loaded(canonical.unflatten(flat), key, record["rows"], record)
    if damaged:
        raise ValueError(f"no checkpoint in {folder} is whole: {damaged[0][1]}; give an empty folder to start over")
    return None


def _everywhere(act: Callable[[], Result]) -> tuple[Result | None, str]:
    """The result of ``act`` here, and why the checkpoint counts as damaged: it does if any process finds it damaged."""
    result, sentences = hosts.attempts(act, (Damaged,))
    return result, next(filter(None, sentences), "")


def _checked(
    folder: epath.Path, step: int, canonical: Canonical, identity: dict[str, Any], accept: bool
) -> Record | None:
    """The record, read by process 0 only: another process failing to see it says nothing about the checkpoint."""
    if jax.process_index():
        return None
    record = read_record(folder, step)
    _refuse_changes(folder / str(step), record, canonical, identity, accept)
    return record


def _sees(folder: epath.Path, step: int, record: Record, within: float = 10.0) -> None:
    """Raise ValueError if this process does not see the record that process 0 read."""
    until = time.monotonic() + within
    while True:
        try:
            if read_record(folder, step)["checksum"] == record["checksum"]:
                return
            found = "another record"
        except ValueError as problem:
            found = str(problem)
        if time.monotonic() > until:
            raise ValueError(f"{folder / str(step)} is not what process 0 sees there: {found}")
        time.sleep(0.5)


def read_arrays(folder: Folder, step: int, shapes: Flat, record: Record) -> Flat:
    """The named arrays of a checkpoint, sharded as ``shapes`` says, read in one process.

    Raises:
        Damaged: an array is not what was written.
        ValueError: the file system refuses.
    """
    path = folder_path(folder)
    flat = _restored(path, step, shapes)
    if why := _changed_array(path / str(step), flat, record):
        raise Damaged(why)
    return flat


def _restored(folder: epath.Path, step: int, shapes: Flat) -> Flat:
    """Read this process's parts of the arrays without waiting for other processes."""
    path = folder / str(step)
    _ignore_late_callbacks()
    # Not through ocp.Checkpointer, which ends with a barrier: another process may already have failed.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        with readable(path):
            return handler.restore(
                (path if in_bucket(path) else path.resolve()) / "state",
                args=ocp.args.PyTreeRestore(
                    item=shapes,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
                    partial_restore=True,
                ),
            )
    except (Unreadable, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as problem:  # orbax and tensorstore raise all sorts of exceptions for missing or garbage files
        raise Damaged(f"{path} is damaged: {reason(problem)}") from problem
    finally:
        handler.close()


def _changed_array(path: epath.Path, flat: Flat, record: Record) -> str:
    """A sentence if an array is not what was written, else "". All processes call it together."""
    for name, found in zip(sorted(flat), fingerprints(flat), strict=True):
        if found != record["arrays"][name]["fingerprint"]:
            return f"{path} is damaged: the array {name} has changed since it was written"
    return ""


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """For each name whose value differs, both values in words."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _refuse_changes(
    path: epath.Path, record: Record, canonical: Canonical, identity: dict[str, Any], accept: bool
) -> None:
    if (changed := changes(record["identity"], identity)) and not accept:
        raise ValueError(
            f"{path} is from a run in which {', '.join(changed)}; give the old values, another --checkpoint-dir, or "
            "--accept-changes"
        )
    stored = {name: (tuple(x["shape"]), x["dtype"]) for name, x in record["arrays"].items() if name != RANDOM}
    wanted = {name: (x.shape, str(x.dtype)) for name, x in canonical.shapes.items()}
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            told = " and ".join(
                f"{where} {'has none' if x is None else f'has {x[1]}{list(x[0])}'}"
                for where, x in ((str(path), stored.get(name)), ("this model", wanted.get(name)))
            )
            raise ValueError(f"the checkpoint is from another model or optimizer: of the array {name}, {told}")


def _ignore_late_callbacks() -> None:
    """Silence tracebacks of late orbax callbacks.

    When one array cannot be read, orbax closes its event loop. The reads of the others still call back into it or are
    discarded, and each would print a traceback.
    """
    before = sys.unraisablehook
    if getattr(before, "ignores_late_callbacks", False):
        return

    def hook(unraisable: Any) -> None:
        late = isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)
        if not (
            late or isinstance(unraisable.object, CoroutineType) and "orbax" in unraisable.object.cr_code.co_filename
        ):
            before(unraisable)

    hook.ignores_late_callbacks = True
    sys.unraisablehook = hook


def _random_shape(canonical: Canonical, record: Record) -> jax.ShapeDtypeStruct:
    stored = record["arrays"][RANDOM]
    return jax.ShapeDtypeStruct(tuple(stored["shape"]), stored["dtype"], sharding=canonical.shapes["step"].sharding)


def _random_key(data: jax.Array, record: Record) -> jax.Array:
    """The stored key, with its original implementation whatever jax_default_prng_impl is now."""
    return jax.random.wrap_key_data(data, impl=record.get("random_implementation", "threefry2x32"))


def _checksum(record: Record) -> str:
    body = json.dumps({name: value for name, value in record.items() if name != "checksum"}, sort_keys=True)
    return hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
