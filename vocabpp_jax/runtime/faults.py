"""Early ends of a run, each reported in one sentence: signals, full disks, hung or lost processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import ClassVar, NoReturn

import jax
from jax.experimental import multihost_utils

SAVED, LOST = 75, 76
"""Exit statuses of an unfinished run that resumes when restarted: it was asked to stop and has saved, or another
process or a device failed. Other nonzero statuses are failures that a restart would repeat."""


class Stop(RuntimeError):
    """The run cannot continue; the message is a sentence saying why.

    Attributes:
        agreed: all processes raise it at the same point, so they can still wait for each other.
    """

    def __init__(self, sentence: str, agreed: bool = False):
        super().__init__(sentence)
        self.agreed = agreed


class Termination:
    """Notices SIGTERM and SIGINT inside the block, so that the run can save and exit at the end of a step.

    A second signal ends the process at once. With several processes, a SIGTERM to any of them reaches all, and all stop
    after the same step; call :meth:`requested` once per step in every process.
    """

    def __init__(self) -> None:
        self._name: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Termination:
        # With jax.distributed, its service handles SIGTERM and notifies the other processes, but not SIGINT.
        signals = () if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._name is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._name = signal.Signals(number).name

    def requested(self, step: int) -> str | None:
        """The signal that asked for a stop, after ``step`` steps; None if there was none."""
        if jax.process_count() == 1:
            return self._name
        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None


class Watchdog:
    """Ends the process with a sentence when no step has ended for ``seconds``.

    A collective whose partner is stuck waits forever, and nothing in Python could interrupt it. With None, nothing is
    watched.
    """

    def __init__(self, seconds: float | None, status: int = 1):
        if seconds is not None and not seconds > 0:
            raise ValueError(f"hang_timeout is {seconds}; it must be above 0")
        self._seconds, self._status = seconds, status
        self._step, self._last = None, time.monotonic()
        self._end = threading.Event()

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        if self._seconds is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def alive(self, step: int) -> None:
        """Report progress: step ``step`` has ended, or something else that counts as progress."""
        self._step, self._last = step, time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                since = "the start" if self._step is None else f"step {self._step}"
                say_and_leave(
                    f"{_who()}no step has ended for {self._seconds:g} seconds after {since}; a process or device "
                    "hangs. The last checkpoint is good: start again to resume from it",
                    self._status,
                )


class LastWords:
    """Prints a sentence on standard error if the process dies inside the block: killed, or ended by a library, as
    jax.distributed does when another process is gone. A shell that waits for the end prints it.

    Args:
        wanted: whether to do so at all.
        who: names the process; by default its number, if there are several.
    """

    _active: ClassVar[list[LastWords]] = []

    def __init__(self, sentence: str, wanted: bool = True, who: str | None = None):
        self._wanted = wanted
        self._sentence = f"error: {_who() if who is None else who}{sentence}" if wanted else ""

    def __enter__(self) -> LastWords:
        if self._wanted:
            self._shell = subprocess.Popen(
                ["sh", "-c", 'read line || echo "$0" >&2', self._sentence],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._active.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._wanted:
            self._active.remove(self)
            self._shell.communicate(b"left\n")

    @classmethod
    def withhold(cls) -> None:
        """Print nothing after all: another sentence has been printed."""
        for words in list(cls._active):
            words.__exit__(None, None, None)


def out_of_memory(problem: BaseException) -> str | None:
    """The sentence for a device's out-of-memory error; None for any other error."""
    signs = r"out[ _]of[ _]memory|resource[ _]?exhausted|failed to allocate|failed to cuda \w*alloc|memoryallocation"
    text = str(problem)
    if not re.search(signs, text, re.IGNORECASE):
        return None
    do = "reduce what it keeps or computes at once (docs/memory.md)"
    if re.search("nccl", text, re.IGNORECASE):
        do = "NCCL allocates outside XLA's pool, so lower XLA_PYTHON_CLIENT_MEM_FRACTION (docs/memory.md)"
    return f"{_who()}a device is out of memory ({reason(problem)}); {do}"


def lost_peer(problem: BaseException) -> str | None:
    """The sentence for an error caused, directly or through its cause, by the end of another process; else None."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    if isinstance(problem, OSError) and not isinstance(problem, ConnectionError):
        return None
    signs = "connection|broken pipe|heartbeat|unavailable|aborted|cancelled|gloo|nccl|socket|peer|distributed"
    # NCCL's error classes for failures of this process; failures of another are "system" or "remote" errors.
    own = "nccl.*(unhandled cuda error|internal error|invalid argument|invalid usage)"
    text = str(problem)
    if jax.process_count() == 1 or out_of_memory(problem) or not re.search(signs, text, re.IGNORECASE):
        return None
    if re.search(own, text, re.IGNORECASE | re.DOTALL):
        return None
    return f"{_who()}another process is gone ({reason(problem)})"


def say_and_leave(sentence: str, status: int = 1) -> NoReturn:
    """End the process now, without clean-up that would wait for lost processes."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    LastWords.withhold()
    sys.stdout.flush()
    os._exit(status)


def reason(problem: BaseException) -> str:
    """Why an operation failed, in a few words: the system's if the error quotes it, else the error's first line."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = str(problem)
    if system := re.search(r": ([^:\[]+?) \[(?:os_error_code|source|tensorstore)", text):
        return system[1]
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else type(problem).__name__


def as_sentence(problem: BaseException) -> str:
    """An error in one line: the message of a ValueError or Stop, which are sentences; else also where it is from."""
    if isinstance(problem, ValueError | Stop):
        return str(problem) or "refused"
    if isinstance(problem, OSError):
        return f"{problem.filename}: {reason(problem)}" if problem.filename else reason(problem)
    return f"{type(problem).__name__}: {reason(problem)}"


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}: " if jax.process_count() > 1 else ""
