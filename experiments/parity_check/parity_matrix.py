"""The parity matrix: every schedule with every method, architecture and loss, over many shapes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from command_line.options import ClusterOptions, ModelOptions, PipelineOptions
from parity_check.fast_compile import FAST_COMPILE
from parity_check.parity_compare import Case, compare, prepare
from vocabpp_jax import schedules
from vocabpp_jax.schedules import Program
from vocabpp_jax.schedules.vocabulary import SHARDED


def combinations() -> list[tuple[str, str]]:
    """Every schedule with every method that it supports."""
    return [(schedule, method) for schedule in schedules.SCHEDULES for method in schedules.methods_of(schedule)]


def matrix() -> Iterator[Case]:
    """Every combination of schedule and method, over stages, microbatches and tied tables."""
    for schedule, method in combinations():
        for p in (1, 2, 3, 4, 8):
            for m in sorted({1, p - 1, p, 2 * p + 1, 3 * p} - {0}):
                for tied in (False, True):
                    yield case(schedule, method, p, m, tied)
        yield case(schedule, method, 4, 5, False, data=2)
        for p, depths, tied in itertools.product((2, 4), (1, 2), (False, True)):
            yield case(schedule, method, p, 2 * p + 1, tied, mtp_depth=depths)
        if method in SHARDED:
            for p, m in itertools.product((2, 4), (1, 5)):
                yield case(schedule, method, p, m, False, overlap=False)
    for schedule, method, p, tied in itertools.product(
        ("1f1b", "v-half"), ("vocab-1", "vocab-2"), (2, 4), (False, True)
    ):
        for model, loss in itertools.product(ARCHITECTURES, LOSSES):
            yield case(schedule, method, p, 3, tied, model=model, loss=loss)
        for model in ARCHITECTURES:
            yield case(schedule, method, p, 3, tied, model=model, tensor=2)
            yield case(schedule, method, p, 3, tied, model=model, tensor=2, mtp_depth=1)


ARCHITECTURES = ("gpt-tiny", "llama-tiny", "qwen-tiny", "gemma-tiny")
LOSSES = ((), ("soft_cap",), ("z_loss",), ("label_smoothing",), ("soft_cap", "z_loss", "label_smoothing"))
_EXTENSIONS = {"soft_cap": 2.0, "z_loss": 0.01, "label_smoothing": 0.1}


def case(
    schedule: str,
    method: str,
    p: int,
    m: int,
    tied: bool,
    data: int = 1,
    *,
    overlap: bool = True,
    model: str = "gpt-tiny",
    loss: tuple[str, ...] = (),
    tensor: int = 1,
    mtp_depth: int = 0,
) -> Case:
    """One small configuration: a prime vocabulary size, one layer per stage, some tokens masked if tied."""
    layers = 2 * p if schedule.startswith(("v-", "inter")) or method == "redis" else p
    return Case(
        mask_fraction=0.25 if tied else 0.0,
        model=ModelOptions(
            model=model, layers=layers, hidden=16, heads=2, seq=6, vocab_size=61,
            tie_embeddings=tied, untie_embeddings=not tied,
            mtp_depth=mtp_depth, **{name: _EXTENSIONS[name] for name in loss},
        ),
        pipeline=PipelineOptions(
            schedule=schedule, method=method, stages=p, microbatches=m, microbatch_size=2, data_parallel=data,
            tensor_parallel=tensor, no_overlap=not overlap,
        ),
    )  # fmt: skip


def name_of(options: Case) -> str:
    """A case's name in the results and the table."""
    x = options.pipeline
    tied = "tied" if options.model.tie_embeddings else "untied"
    name = f"{x.schedule} {x.method} p={x.stages} m={x.microbatches} {tied} data={x.data_parallel}"
    name += f" tensor={x.tensor_parallel}" if x.tensor_parallel > 1 else ""
    name += " no overlap" if x.no_overlap else ""
    name += f" {options.model.model}" if options.model.model != "gpt-tiny" else ""
    name += f" mtp={options.model.mtp_depth}" if options.model.mtp_depth else ""
    return name + "".join(f" {field}" for field in ModelOptions.LOSS if getattr(options.model, field))


def run_all(path: Path, only: str, jobs: int, console: Console) -> list[dict[str, Any]]:
    """Run the cases that the results file lacks or has of another program; returns the results of all cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {r["case"]: r for r in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    cases = [options for options in matrix() if re.search(only, name_of(options))]
    known = [done.get(name_of(options), {}).get("program", "") for options in cases]
    started, ran = time.monotonic(), 0
    # Threads do not speed up compiling small programs; processes do.
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin) as pool:
        for n, result in enumerate(pool.map(_compare, cases, known), start=1):
            if result is None:
                continue
            name, ran = name_of(cases[n - 1]), ran + 1
            done[name] = {"case": name} | result
            with path.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
            left = (time.monotonic() - started) / ran * (len(cases) - n) / 60
            verdict = "" if result["holds"] else "  FAILS"
            console.print(f"{n}/{len(cases)} {name}: {result['max_grad_error']:.1e}{verdict}, {left:.0f} min left")
    return [done[name_of(options)] for options in cases]


def summary(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row per schedule and method that has results."""
    rows = []
    for schedule, method in combinations():
        of = [r for r in results if r["case"].startswith(f"{schedule} {method} ")]
        if of:
            as_promised = all(r["in_flight"] == r["promised_in_flight"] for r in of)
            rows.append(
                {
                    "schedule": schedule,
                    "method": method,
                    "cases": str(len(of)),
                    "largest loss error": f"{max(r['loss_error'] for r in of):.1e}",
                    "largest gradient error": f"{max(r['max_grad_error'] for r in of):.1e}",
                    "in flight as promised": "yes" if as_promised else "no",
                    "hold": f"{sum(r['holds'] for r in of)}/{len(of)}",
                }
            )
    return rows


def _begin() -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}"
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    ClusterOptions().join(8)


def _end_with_the_parent() -> None:
    """Exit with the parent: otherwise a worker whose parent was killed would wait for another case forever."""
    parent_process().join()
    os._exit(1)


def _compare(options: Case, known: str) -> dict[str, Any] | None:
    """The result as JSON with a digest of the program; None if the digest is the known one."""
    pipe = prepare(options)
    program = digest(pipe.program)
    if program == known:
        return None
    result = compare(options, pipe).as_json()
    jax.clear_caches()
    return result | {"program": program}


def digest(program: Program) -> str:
    """Equal for programs that have the same instructions and tables."""
    hashed = hashlib.sha256()
    for segment in program.segments:
        for line in segment.body:
            hashed.update(repr((segment.intervals, line)).encode())
            for name, table in sorted(line.tables.items()):
                hashed.update(name.encode() + np.ascontiguousarray(table).tobytes())
    return hashed.hexdigest()[:16]
