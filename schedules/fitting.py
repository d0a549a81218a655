"""Schedules fitted in processes of their own, several at a time."""

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
    """What to build, as :func:`vocabpp_jax.schedules.build` takes it."""

    arguments: dict[str, Any]
    durations: Times
    rules: Rules

    def program(self) -> Program:
        """The fitted schedule, lowered."""
        return lower(build(**self.arguments, durations=self.durations, rules=self.rules))


class Fitter:
    """Fits each once, ``at_once`` of them under way, those that are asked for first begun first."""

    def __init__(self, at_once: int | None = None):
        self.at_once = at_once or min(4, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self.at_once)
        self._begun: dict[Hashable, Future[Program]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._begun

    def begin(self, key: Hashable, fit: Fit) -> None:
        """Fit something that has not been begun."""
        if key not in self._begun:
            self._begun[key] = self._pool.submit(_in_a_process, fit)

    def result(self, key: Hashable) -> Program:
        """What was begun under this key, when it is there."""
        return self._begun[key].result()


def _in_a_process(fit: Fit) -> Program:
    done = subprocess.run([sys.executable, "-c", _WORKER], input=pickle.dumps(fit), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"fitting {fit.arguments} failed:\n{done.stderr.decode()}")
    return pickle.loads(done.stdout)
