"""Peak memory of the published settings, from the compiler for A100s."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from paper.settings import Setting


def read_reports(path: Path) -> dict[str, dict[str, Any]]:
    """The reports compiled so far, by row name."""
    return {r["name"]: r for r in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def compile_rows(rows: Iterable[Setting], results: Path, console: Console) -> dict[str, dict[str, Any]]:
    """A report for every setting, by name. Those in ``results`` are read; the others are compiled and added to it."""
    from memory import MemoryOptions, report  # its import sets up JAX to compile for absent GPUs

    results.parent.mkdir(parents=True, exist_ok=True)
    done = read_reports(results)
    rows = list(rows)
    missing = [row for row in rows if row.name not in done]
    started = time.monotonic()
    for n, row in enumerate(missing, start=1):
        found, _ = report(MemoryOptions(model=row.model, pipeline=row.pipeline))
        done[row.name] = {"name": row.name} | found.as_json()
        with results.open("a") as file:
            file.write(json.dumps(done[row.name]) + "\n")
        jax.clear_caches()
        left = (time.monotonic() - started) / n * (len(missing) - n) / 60
        published = f", {row.memory:.2f} published" if row.memory else ""
        console.print(
            f"{n}/{len(missing)} {row.name}: {found.peak_bytes / 2**30:.2f} GiB{published}, "
            f"{found.loop_copy_bytes} bytes copied, {found.compile_seconds:.0f} s; {left:.0f} min left"
        )
    return {row.name: done[row.name] for row in rows}
