"""Saves checkpoints while training continues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from .. import training
from ..runtime import hosts
from ..runtime.faults import Stop, as_sentence, reason
from .canonical import Canonical, fingerprints
from .folders import Folder, folder_path, in_bucket, lock, sees_lock, steps_in
from .store import FORMAT, RANDOM, VERSION, Record, _checksum, read_record


class Writer:
    """Saves checkpoints to a folder, each in the background of the steps that follow.

    With several processes, each creates a Writer and they call its methods together.

    Args:
        keep: how many of the newest to keep.
        keep_every: checkpoints whose step is a multiple of this are never deleted.

    Raises:
        ValueError: the folder is not writable, another run writes to it, or the processes do not share it.
    """

    def __init__(self, folder: Folder, keep: int = 3, keep_every: int | None = None):
        for name, value in (("checkpoint_keep", keep), ("checkpoint_keep_every", keep_every or 1)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self._folder = hosts.agree(lambda: folder_path(folder))
        self._policy = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self._manager: ocp.CheckpointManager | None = None
        self._lock = hosts.agree(lambda: lock(self._folder) if jax.process_index() == 0 else None)
        try:
            token = hosts.from_first(self._lock.token if self._lock else "")
            hosts.agree(lambda: sees_lock(self._folder, token))
        except BaseException:
            self._release()
            raise

    def save(self, canonical: Canonical, state: training.State, key: jax.Array, *, rows: int, **about: Any) -> None:
        """Start saving the state; it may be donated once this returns. Waits for the previous save to finish.

        ``about`` goes into the record: ``identity``, which :func:`load` compares, and ``config``, for people to read. A
        state that the folder already holds, array for array, is not written again.

        Raises:
            Stop: this or the previous save failed, or the folder holds a different state of this step or a later step.
        """
        self._finish()
        everywhere = canonical.shapes["step"].sharding
        flat = canonical.flatten(state) | {RANDOM: jax.jit(jax.random.key_data, out_shardings=everywhere)(key)}
        record = {"format": FORMAT, "version": VERSION, "step": int(state.step), "rows": rows} | about
        record["random_implementation"] = str(jax.random.key_impl(key))
        record["arrays"] = {
            name: {"shape": list(flat[name].shape), "dtype": str(flat[name].dtype), "fingerprint": mark}
            for name, mark in zip(sorted(flat), fingerprints(flat), strict=True)
        }
        record["checksum"] = _checksum(record)
        steps = self._steps_before(record)
        if steps is not None:
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(flat), run=ocp.args.JsonSave(record))
            self._guarded(lambda: self._up_to_date(steps).save(record["step"], args=items, force=True))

    def _steps_before(self, record: Record) -> list[int] | None:
        """The checkpoints in the folder, all from earlier steps; None if it already has this one.

        The folder is listed each time: :func:`load` may have renamed some since the last save.
        """

        def look() -> list[int] | None:
            if jax.process_index():
                return None
            steps, step = steps_in(self._folder), record["step"]
            if later := [other for other in steps if other > step]:
                raise ValueError(f"{self._folder} holds the checkpoint of step {later[0]}, which is later")
            if step not in steps:
                return steps
            if read_record(self._folder, step)["arrays"] != record["arrays"]:
                raise ValueError(f"{self._folder / str(step)} holds another state of the same step")
            return None

        try:
            return hosts.from_first(hosts.agree(look))
        except ValueError as problem:
            raise Stop(f"the checkpoint of step {record['step']} cannot be written: {problem}", agreed=True) from None

    def _up_to_date(self, steps: list[int]) -> ocp.CheckpointManager:
        """orbax's manager, aware of the checkpoints that are in the folder now."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(preservation_policy=policies.AnyPreservationPolicy(self._policy))
            path = self._folder if in_bucket(self._folder) else self._folder.resolve()
            self._manager = ocp.CheckpointManager(path, options=options, item_names=("state", "run"))
        elif sorted(self._manager.all_steps()) != steps:
            self._manager.reload()
        return self._manager

    def check(self) -> None:
        """Raise Stop if the background save has failed in this process, or another run has taken the folder."""
        if self._manager:
            self._guarded(self._manager.check_for_errors)
        if self._lock:
            self._guarded(self._lock.check)

    def _finish(self) -> None:
        """Wait for the background save. If it fails in one process, all raise Stop."""
        if self._manager is None:
            return
        try:
            hosts.attempts(self._wait, ())
        except Exception as problem:
            raise Stop(self._failed(as_sentence(problem)), agreed=True) from problem

    def _wait(self) -> None:
        self._manager.wait_until_finished()
        self.check()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is None:
            self.close()
        elif jax.process_count() == 1 or getattr(error, "agreed", False):  # the save in progress may still succeed
            with contextlib.suppress(Stop):
                self.close()
        # Otherwise another process may be gone: do not wait for it.

    def close(self) -> None:
        """Wait until everything is on disk. Raises Stop if that fails."""
        try:
            self._finish()
            if self._manager:
                self._guarded(self._manager.close)
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock:
            self._lock.release()

    def _guarded(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as problem:  # for a full disk, orbax and tensorstore raise ValueError, OSError and more
            raise Stop(self._failed(reason(problem))) from problem

    def _failed(self, why: str) -> str:
        return f"a checkpoint cannot be written to {self._folder} ({why})"
