"""Compile many programs concurrently and time them one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp


def seconds(run: Callable[[], Any]) -> float:
    """Seconds until everything that ``run`` returns is ready."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def steps(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each of several runs, after one untimed run."""
    seconds(run)
    return [seconds(run) for _ in range(repeats)]


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in rounds, after one untimed round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            took = seconds(run)
            if number:
                found[name].append(took)
    return found


def middle(values: Iterable[float]) -> float:
    """The median."""
    return float(median(values))


class Compiler:
    """Compiles in threads: most of a compilation runs outside Python, and GPU machines have many cores."""

    def __init__(self, workers: int | None = None):
        self.pool = ThreadPoolExecutor(workers or max(1, min(12, (os.cpu_count() or 2) - 2)))

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, compile: Callable[[], Any]) -> Future:
        """Submit a compilation; :meth:`Future.result` returns the compiled program and the seconds it took."""

        def run() -> tuple[Any, float]:
            began = time.monotonic()
            return compile(), time.monotonic() - began

        return self.pool.submit(run)


def noise(shapes: Any, scale: float = 0.02, like: Any = None) -> Any:
    """Pseudo-random arrays for a tree of shapes; elementwise, so any sharding lets each device compute its own part."""

    def of(number: int, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return _noise(shape.shape, number) * scale

    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([of(n, s).astype(s.dtype) for n, s in enumerate(leaves)])


def _noise(shape: tuple[int, ...], seed: int) -> jax.Array:
    angle = jnp.float32(seed + 1)
    for dim in range(len(shape)):
        angle = angle + (12.9898 + 65.233 * dim) * jax.lax.broadcasted_iota(jnp.float32, shape, dim)
    fraction = jnp.sin(jnp.broadcast_to(angle, shape)) * 43758.547
    return (fraction - jnp.floor(fraction) - 0.5) * 12**0.5


def ids(shape: tuple[int, ...], below: int, seed: int = 0) -> jax.Array:
    """Pseudo-random integers from 0 up to ``below``."""
    unit = _noise(shape, seed) / 12**0.5 + 0.5
    return jnp.clip((unit * below).astype(jnp.int32), 0, below - 1)
