"""Compiles plans for GPUs that are not present, each in its own process, several at a time.

Results are stored in a folder under a name derived from everything that determines them, so an interrupted run resumes
where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from command_line.options import ModelOptions, PipelineOptions

_EXPERIMENTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """A step to compile. ``pipeline`` determines the number of devices."""

    gpu: str
    model: ModelOptions
    pipeline: PipelineOptions

    def request(self) -> dict[str, Any]:
        """Everything that determines the result."""
        packages = {name: version(name) for name in ("jax", "jaxlib", "vocabpp-jax")}
        options = {"model": dataclasses.asdict(self.model), "pipeline": dataclasses.asdict(self.pipeline)}
        return options | {"gpu": self.gpu, "packages": packages}

    def result(self, folder: Path) -> dict[str, Any]:
        """``peak_bytes`` and ``seconds``, or ``refused`` and why; read from the folder if present."""
        request = json.dumps(self.request(), sort_keys=True)
        kept = folder / f"{hashlib.sha256(request.encode()).hexdigest()[:16]}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        path = os.pathsep.join(filter(None, (str(_EXPERIMENTS), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", "planning_run.compile_one"],
            input=request,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
            return {"refused": last.removeprefix("error: ")}
        found = json.loads(done.stdout.splitlines()[-1])
        unfinished = kept.with_suffix(f".{os.getpid()}.part")
        unfinished.write_text(json.dumps(found | {"request": json.loads(request)}, indent=1) + "\n")
        unfinished.replace(kept)
        return found


def results(
    jobs: Iterable[Job], folder: Path, at_once: int, say: Callable[[str], None] = lambda line: None
) -> Iterator[dict[str, Any]]:
    """Results in job order, with ``at_once`` jobs running. Jobs start as results are consumed."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = iter(jobs)
    with ThreadPoolExecutor(at_once) as pool:
        waiting = []
        while True:
            while len(waiting) < at_once and (job := next(jobs, None)) is not None:
                say(f"compiling {job.pipeline.schedule} with {job.pipeline.method} on {job.pipeline.stages} stages")
                waiting.append(pool.submit(job.result, folder))
            if not waiting:
                return
            yield waiting.pop(0).result()
