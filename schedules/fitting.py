"""Fits schedules in separate processes, several at a time."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from .build import build
from .fit import Times
from .lowering.program import Program, lower
from .simulation.simulator import Rules

_WORKER = "import pickle, sys; sys.stdout.buffer.write(pickle.dumps(pickle.load(sys.stdin.buffer).program()))"


class Fit(NamedTuple):
    """The arguments of :func:`vocabpp_jax.schedules.build`."""

    arguments: dict[str, Any]
    durations: Times
    rules: Rules

    def program(self) -> Program:
        """The fitted schedule, lowered."""
        return lower(build(**self.arguments, durations=self.durations, rules=self.rules))


class Fitter:
    """Fits each schedule once, at most ``at_once`` at a time, in the order they are requested."""

    def __init__(self, at_once: int | None = None):
        self.at_once = at_once or min(4, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self.at_once)
        self._begun: dict[Hashable, Future[Program]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._begun

    def begin(self, key: Hashable, fit: Fit) -> None:
        """Start a fit that has not been started."""
        if key not in self._begun:
            self._begun[key] = self._pool.submit(_in_a_process, fit)

    def result(self, key: Hashable) -> Program:
        """Wait for the fit started under this key and return its result."""
        return self._begun[key].result()


def _in_a_process(fit: Fit) -> Program:
    done = subprocess.run([sys.executable, "-c", _WORKER], input=pickle.dumps(fit), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"fitting {fit.arguments} failed:\n{done.stderr.decode()}")
    return pickle.loads(done.stdout)
