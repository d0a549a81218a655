"""Checkpoints in a folder: written beside the training, whole or not at all, and read back only if nothing changed.

A checkpoint is ``FOLDER/STEP``. orbax writes the canonical arrays under ``state`` and puts the folder in its place
when all of it is on disk; ``run/metadata`` is a record of everything else: step, data position, configuration, and of
every array its shape and a fingerprint of its entries.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CoroutineType, TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from .. import training
from ..runtime.faults import Stop, reason
from .canonical import Canonical, Flat, fingerprints

FORMAT, VERSION = "vocabpp_jax checkpoint", 1
RANDOM = "random"
"""The name of the stored random key; the other arrays are the training state's."""
Record = dict[str, Any]


class Damaged(ValueError):
    """A checkpoint that is ours and cannot be read as it was written."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in a pipeline's layout."""

    state: training.State
    key: jax.Array
    rows: int
    """Sequences of the training data that were consumed."""
    record: Record


def steps_in(folder: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending. A save that was cut off is none."""
    folder = Path(folder)
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def read_record(folder: str | Path, step: int) -> Record:
    """What a checkpoint says about itself.

    Raises:
        Damaged: the record is missing or was changed.
        ValueError: a checkpoint of another program, or of a later version of this one.
    """
    path = Path(folder) / str(step)
    try:
        record = json.loads((path / "run" / "metadata").read_text())
        foreign = not isinstance(record, dict) or record.get("format") != FORMAT
        damaged = False
    except FileNotFoundError:
        damaged = (path / "state").is_dir()
        foreign = not damaged
    except (OSError, ValueError, RecursionError):
        damaged, foreign = True, False
    if foreign:
        raise ValueError(f"{path} is no checkpoint of this program; give another folder, or move it away")
    if damaged or record.get("checksum") != _checksum(record):
        raise Damaged(f"{path} is damaged: its record cannot be read or was changed")
    if record["version"] != VERSION:
        raise ValueError(f"{path} has version {record['version']}; this program reads version {VERSION}")
    return record


def load(
    folder: str | Path,
    canonical: Canonical,
    identity: dict[str, Any],
    *,
    accept_changes: bool = False,
    say: Callable[[str], None] = print,
) -> Loaded | None:
    """The newest checkpoint that is whole, in the pipeline's layout; None where the folder holds none.

    Newer ones that are damaged are renamed to ``damaged-STEP``, which ``say`` is told.

    Args:
        identity: what must be as it was for the run to go on as if never stopped: JSON values by name.
        accept_changes: go on although the identity has changed.

    Raises:
        ValueError: the identity or the model has changed, the folder holds something else, or nothing in it is whole.
    """
    damaged: list[tuple[int, str]] = []
    for step in reversed(steps_in(folder)):
        problem = None
        try:
            record = read_record(folder, step)
            _refuse_changes(Path(folder) / str(step), record, canonical, identity, accept_changes)
            flat = read_arrays(folder, step, canonical.shapes | {RANDOM: _random_shape(canonical)}, record)
        except Damaged as error:
            problem = str(error)
        if not _everywhere(problem is None):
            damaged.append((step, problem or f"{Path(folder) / str(step)} is damaged: another process cannot read it"))
            continue
        for bad, why in damaged:
            aside = _move_aside(Path(folder), bad)
            say(f"{why}; it is kept as {aside}, and the run goes on from step {step}")
        key = jax.random.wrap_key_data(flat.pop(RANDOM))
        return Loaded(canonical.unflatten(flat), key, record["rows"], record)
    if damaged:
        raise ValueError(f"no checkpoint in {folder} is whole: {damaged[0][1]}; give an empty folder to begin anew")
    return None


def read_arrays(folder: str | Path, step: int, shapes: Flat, record: Record) -> Flat:
    """The named arrays of a checkpoint, sharded as ``shapes`` says. Raises Damaged where one is not as it was."""
    path = Path(folder) / str(step)
    _ignore_late_callbacks()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            flat = checkpointer.restore(
                path.absolute() / "state",
                args=ocp.args.PyTreeRestore(
                    item=shapes,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
                    partial_restore=True,
                ),
            )
    except Exception as problem:  # what orbax and tensorstore raise for a file that is gone or garbage is anything
        raise Damaged(f"{path} is damaged: {reason(problem)}") from problem
    for name, found in zip(sorted(flat), fingerprints(flat), strict=True):
        if found != record["arrays"][name]["fingerprint"]:
            raise Damaged(f"{path} is damaged: the array {name} has changed since it was written")
    return flat


class Writer:
    """Writes checkpoints to a folder, each beside the steps that follow it.

    Args:
        keep: so many of the newest are kept.
        keep_every: those whose step is a multiple of it are kept for ever.

    Raises:
        ValueError: the folder cannot be written, or another run writes to it.
    """

    def __init__(self, folder: str | Path, keep: int = 3, keep_every: int | None = None):
        self._folder = Path(folder)
        for name, value in (("checkpoint_keep", keep), ("checkpoint_keep_every", keep_every or 1)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self._lock = _lock(self._folder) if jax.process_index() == 0 else None
        _everywhere(True)  # the folder is there for all
        policy = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        options = ocp.CheckpointManagerOptions(preservation_policy=policies.AnyPreservationPolicy(policy))
        self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options, item_names=("state", "run"))
        self._last = max(steps_in(folder), default=None)

    @property
    def last(self) -> int | None:
        """The step of the last checkpoint that was begun here or found."""
        return self._last

    def save(self, canonical: Canonical, state: training.State, key: jax.Array, *, rows: int, **about: Any) -> None:
        """Begin to write the state; returns when it may be donated. Waits for the save before, if that still runs.

        ``about`` goes into the record: ``identity``, as :func:`load` compares it, and ``config``, for the reader.
        Raises Stop where this or the save before cannot be written.
        """
        step = int(state.step)
        if step == self._last:
            return
        everywhere = canonical.shapes["step"].sharding
        flat = canonical.flatten(state) | {RANDOM: jax.jit(jax.random.key_data, out_shardings=everywhere)(key)}
        record = {"format": FORMAT, "version": VERSION, "step": step, "rows": rows} | about
        record["arrays"] = {
            name: {"shape": list(flat[name].shape), "dtype": str(flat[name].dtype), "fingerprint": mark}
            for name, mark in zip(sorted(flat), fingerprints(flat), strict=True)
        }
        record["checksum"] = _checksum(record)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(flat), run=ocp.args.JsonSave(record))
        self._guarded(lambda: self._manager.save(step, args=items, force=True))
        self._last = step

    def check(self) -> None:
        """Raise Stop if the save that runs beside has failed."""
        self._guarded(self._manager.check_for_errors)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is None:
            self.close()
        elif jax.process_count() == 1:  # what was begun may still succeed; with others, one may be gone: do not wait
            with contextlib.suppress(Stop):
                self.close()

    def close(self) -> None:
        """Wait until all is on disk. Raises Stop where that fails."""
        try:
            self._guarded(self._manager.close)
        finally:
            if self._lock:
                self._lock.close()

    def _guarded(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as problem:  # orbax and tensorstore raise ValueError, OSError and more for a full disk
            raise Stop(f"a checkpoint cannot be written to {self._folder} ({reason(problem)})") from problem


def _lock(folder: Path) -> Any:
    """An open file that no other process can lock while this one lives."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as problem:
        raise ValueError(f"checkpoint_dir is {str(folder)!r}, which cannot be written ({problem.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"checkpoint_dir is {str(folder)!r}, to which another run is writing; end it first") from None
    except OSError:
        pass  # a file system without locks
    return file


def _refuse_changes(path: Path, record: Record, canonical: Canonical, identity: dict[str, Any], accept: bool) -> None:
    before = record["identity"]
    changed = [name for name in sorted(identity.keys() | before.keys()) if identity.get(name) != before.get(name)]
    if changed and not accept:
        told = ", ".join(f"{name} was {before.get(name)!r} and is {identity.get(name)!r}" for name in changed)
        raise ValueError(
            f"{path} is of a run in which {told}; give what was, another --checkpoint-dir, or --accept-changes"
        )
    stored = {name: (tuple(x["shape"]), x["dtype"]) for name, x in record["arrays"].items() if name != RANDOM}
    wanted = {name: (x.shape, str(x.dtype)) for name, x in canonical.shapes.items()}
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            told = " and ".join(
                f"{where} {'has none' if x is None else f'has {x[1]}{list(x[0])}'}"
                for where, x in ((str(path), stored.get(name)), ("this model", wanted.get(name)))
            )
            raise ValueError(f"the checkpoint is of another model or optimizer: of the array {name}, {told}")


def _ignore_late_callbacks() -> None:
    """When one array cannot be read, orbax closes its event loop; the reads of the others still call back into it, or
    are thrown away, and each would print a traceback."""
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


def _random_shape(canonical: Canonical) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=canonical.shapes["step"].sharding)


def _everywhere(good: bool) -> bool:
    """Whether it is true in every process; all of them wait here."""
    return bool(np.all(multihost_utils.process_allgather(np.array(good)))) if jax.process_count() > 1 else good


def _move_aside(folder: Path, step: int) -> Path:
    aside = folder / f"damaged-{step}"
    if jax.process_index() == 0:
        number = 1
        while aside.exists():
            aside, number = folder / f"damaged-{step}-{number + 1}", number + 1
        (folder / str(step)).rename(aside)
    _everywhere(True)
    return aside


def _checksum(record: Record) -> str:
    body = json.dumps({name: value for name, value in record.items() if name != "checksum"}, sort_keys=True)
    return hashlib.blake2b(body.encode(), digest_size=8).hexdigest()
