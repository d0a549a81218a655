"""``train.py`` with a fault in one of its processes before the first step; started by ``kill_test.py``.

``KILL_FAULT`` is JSON: which process, at which phase of restoring (a name in PHASES), what happens to it (a name in
FAULTS), and a file to create just before.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import train
from training_run import train_prepare
from vocabpp_jax import checkpoints
from vocabpp_jax.checkpoints import store, writer
from vocabpp_jax.runtime import hosts

PHASES: dict[str, tuple[Any, str]] = {
    "comparing options": (hosts, "check_same"),
    "laying out the mesh": (train.PipelineOptions, "mesh"),
    "reading data": (train_prepare, "read_tokens"),
    "comparing data": (train_prepare, "sample"),
    "taking the lock": (writer, "lock"),
    "finding the lock": (writer, "sees_lock"),
    "reading the record": (store, "read_record"),
    "reading arrays": (store, "_restored"),
    "checking arrays": (store, "fingerprints"),
    "laying out arrays": (checkpoints.Canonical, "unflatten"),
    "beginning to train": (train, "Training"),
}
ONLY_FIRST = ("taking the lock",)
"""Phases that only process 0 has."""
FAULTS = ("killed", "stopped", "OSError", "ValueError", "KeyError")


def fail(what: str) -> NoReturn | None:
    """Make the fault happen in this process."""
    if what in ("killed", "stopped"):
        os.kill(os.getpid(), signal.SIGKILL if what == "killed" else signal.SIGSTOP)
        return None
    raise {
        "OSError": OSError(5, "Input/output error", "a file"),
        "ValueError": ValueError("an option is wrong"),
        "KeyError": KeyError("a bug"),
    }[what]


def with_fault(act: Callable[..., Any], what: str, mark: Path) -> Callable[..., Any]:
    def faulty(*arguments: Any, **options: Any) -> Any:
        mark.touch()
        fail(what)
        return act(*arguments, **options)

    return faulty


def main() -> None:
    """Train, with the fault if this is the chosen process."""
    fault = json.loads(os.environ["KILL_FAULT"])
    if f"--process-id {fault['process']} " in " ".join(sys.argv) + " ":
        owner, name = PHASES[fault["phase"]]
        setattr(owner, name, with_fault(getattr(owner, name), fault["what"], Path(fault["mark"])))
    train.main()
