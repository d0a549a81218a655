"""A case is a process that gets some input; its output and exit status are checked against the promise."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Action = Callable[[], None]
"""What a case does; runs in its folder. Raises SystemExit as a command does."""
PROGRESS = ("reading ", "note: ", "left out: ", "step ")
"""Prefixes of progress lines on standard output, which are not part of the answer."""
_OUT, _ERR = ".stdout", ".stderr"
_MEMORY = 2**33  # address-space limit of a case: absurdly large allocations fail, and the other cases need not wait
_CRASHED = 70


@dataclass
class Case:
    """One input and, once it has run, its outcome."""

    name: str
    folder: Path
    action: Action
    report: bool = False
    """The command prints a report, and exits with status 1 if it reports damage."""
    started: float = 0.0
    seconds: float = 0.0
    wrong: str = ""
    """How it broke the promise."""
    accepted: bool = False
    said: str = ""
    """Its standard error."""
    _process: int = field(default=0, repr=False)

    def start(self) -> None:
        """Run it in its own process."""
        self.started = time.monotonic()
        self._process = os.fork()
        if not self._process:
            os.setsid()
            os.chdir(self.folder)
            for number, name in ((1, _OUT), (2, _ERR)):
                os.dup2(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            # Give it the streams of a fresh process, whatever this process has.
            sys.stdout = open(1, "w", closefd=False, encoding="utf-8")
            sys.stderr = open(2, "w", closefd=False, encoding="utf-8", errors="backslashreplace")
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os._exit(_status(self.action))

    def ended(self, limit_s: float) -> bool:
        """Whether it has ended; kills it if it exceeds the limit."""
        process, status = os.waitpid(self._process, os.WNOHANG)
        self.seconds = time.monotonic() - self.started
        if not process and self.seconds < limit_s:
            return False
        if not process:
            os.killpg(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self.wrong = f"has not ended after {limit_s:.0f} s"
            return True
        code = os.waitstatus_to_exitcode(status)
        self.said = (self.folder / _ERR).read_text(errors="replace")
        self.wrong, self.accepted = self._judged(code), code == 0
        return True

    def _judged(self, code: int) -> str:
        out, err = (self.folder / _OUT).read_text(errors="replace"), self.said
        if code < 0:
            return f"was ended by signal {-code}\n{err[-2000:]}"
        if "Traceback" in err or code == _CRASHED:
            return f"traceback\n{err[-3000:]}"
        if code == 0:
            return f"accepted, but wrote to standard error:\n{err[:1000]}" if err else ""
        if code not in ((1, 2) if self.report else (2,)):
            return f"status {code}\n{err[-2000:]}"
        if err.count("\n") != 1 or not err.startswith("error: ") or not 20 < len(err) < 2000:
            return f"refused, but not in a sentence:\n{err[:2000]}"
        other = [line for line in out.splitlines() if not line.startswith(PROGRESS)]
        return f"refused, but also wrote: {other[0]}" if other and not self.report else ""


def _status(action: Action) -> int:
    """Run the action; returns the status with which a command would exit."""
    try:
        action()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = _CRASHED
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run_all(cases: Iterator[Case], jobs: int, limit_s: float) -> Iterator[Case]:
    """Run the cases, ``jobs`` at a time; yields each as it ends. Folders of passing cases are removed."""
    running: list[Case] = []
    try:
        while True:
            while len(running) < jobs and (case := next(cases, None)) is not None:
                case.start()
                running.append(case)
            if not running:
                return
            if done := [case for case in running if case.ended(limit_s)]:
                running = [case for case in running if case not in done]
                for case in done:
                    if not case.wrong:
                        shutil.rmtree(case.folder)
                    yield case
            else:
                time.sleep(0.005)
    finally:
        for case in running:
            os.killpg(case._process, signal.SIGKILL)
            os.waitpid(case._process, 0)
