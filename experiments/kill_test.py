"""Kill a small training run with SIGKILL at random moments, start it again each time, and see that nothing was lost.

Trains once without interruption, then again with kills. Every restart must go on from the last checkpoint that was
complete when the run died; in the end the losses of all steps and the fingerprints of all arrays must be those of the
run that was never killed. Exits with status 1 if not.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from command_line.options import OptionalStr, fail, parse, write_json
from vocabpp_jax.checkpoints import read_record, steps_in
from vocabpp_jax.runtime.metrics import read_records

SMALL = (
    "--vocab-size 300 --layers 2 --hidden 32 --heads 2 --seq 16 --stages 2 --data-parallel 1 --microbatches 3 "
    "--eval-batches 1 --eval-every 1000000"
)


@dataclass(frozen=True)
class KillOptions:
    """How often, and how hard."""

    kills: int = 20
    """SIGKILLs, each at a random moment of a life of the run."""
    steps: int = 300
    """Steps of the whole run."""
    checkpoint_every: int = 4
    """Steps between checkpoints; few, so that many kills come amid a save."""
    longest: float = 2.0
    """Seconds that a life lasts at most after its first step. One life in four ends before its first step."""
    data: OptionalStr = None
    """Data to train on; a generated text if not given."""
    seed: int = 0
    """Decides the moments."""
    json: OptionalStr = None
    """Write the result as JSON to this file, or to standard output if it is -."""


class Lives:
    """One run, lived in pieces, in a folder."""

    def __init__(self, options: KillOptions, folder: Path, data: str, name: str):
        self.output, self.checkpoints = folder / name, folder / f"{name}-checkpoints"
        script = str(Path(__file__).with_name("train.py"))
        arguments = f"{SMALL} --steps {options.steps} --checkpoint-every {options.checkpoint_every}".split()
        where = ["--data", data, "--output", str(self.output), "--checkpoint-dir", str(self.checkpoints)]
        self._command = [sys.executable, script, *arguments, *where]
        self._log = folder / f"{name}.log"
        self._environment = os.environ | {
            "VOCABPP_CACHE": str(folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),  # a life is for training, not for compiling
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self) -> subprocess.Popen:
        self._said_before = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("a") as log:
            return subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    def stepped(self) -> bool:
        """Whether this life has done a step."""
        return b"  loss " in self._log.read_bytes()[self._said_before :]

    def finish(self) -> None:
        """Live to the end."""
        if status := self.start().wait():
            raise RuntimeError(f"training ended with status {status}:\n{self._log.read_text()[-2000:]}")

    def records(self) -> list[dict]:
        path = self.output / "metrics.jsonl"
        return read_records(path) if path.exists() else []

    def fingerprints(self) -> dict[str, int]:
        """Of every array in the last checkpoint."""
        record = read_record(self.checkpoints, steps_in(self.checkpoints)[-1])
        return {name: array["fingerprint"] for name, array in record["arrays"].items()}


def live_and_die(lives: Lives, seconds: float | None) -> dict:
    """One life: killed so many seconds after its first step, or, with None, somewhere on the way to it."""
    begun_at = max(steps_in(lives.checkpoints), default=0)
    process, start, killed_at = lives.start(), time.monotonic(), None if seconds is not None else random.uniform(0, 6)
    while process.poll() is None and (killed_at is None or time.monotonic() - start < killed_at):
        if killed_at is None and lives.stepped():
            killed_at = time.monotonic() - start + seconds
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    partial = any("orbax-checkpoint-tmp" in path.name for path in lives.checkpoints.glob("*"))
    last = max((record["step"] for record in lives.records()), default=0)
    return {"began": begun_at, "died": last, "kept": max(steps_in(lives.checkpoints), default=0), "in_save": partial}


def kill_test(options: KillOptions, folder: Path) -> dict:
    """Both runs; what was found."""
    random.seed(options.seed)
    data = options.data or str(folder / "text.txt")
    if options.data is None:
        words = [f"{consonant}{vowel}" for consonant in "bcdfgklmnp" for vowel in "aeiou"]
        Path(data).write_text(" ".join(random.choice(words) for _ in range(20_000)))
    whole, killed = Lives(options, folder, data, "whole"), Lives(options, folder, data, "killed")
    whole.finish()
    deaths = []
    while len(deaths) < options.kills:
        death = live_and_die(killed, random.uniform(0, options.longest) if random.random() > 0.25 else None)
        deaths.append(death)
        print(f"kill {len(deaths)}/{options.kills}: {death}", file=sys.stderr, flush=True)
    killed.finish()
    expected, found = (
        {record["step"]: (record["loss"], record["grad_norm"]) for record in lives.records()}
        for lives in (whole, killed)
    )
    return {
        **asdict(options),
        "deaths": deaths,
        "in_save": sum(death["in_save"] for death in deaths),
        "most_steps_lost": max((death["died"] - death["kept"] for death in deaths), default=0),
        "checkpoints_lost": sum(b["began"] < a["kept"] for a, b in zip(deaths, deaths[1:], strict=False)),
        "different_losses": sum(expected.get(step) != found.get(step) for step in expected.keys() | found.keys()),
        "different_arrays": sum(
            a != b for a, b in zip(*(x.fingerprints().values() for x in (whole, killed)), strict=True)
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse(KillOptions, __doc__, arguments)
    if options.kills < 1 or options.steps < 1:
        fail(f"kills is {options.kills} and steps {options.steps}; both must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        result = kill_test(options, Path(folder))
    write_json(options.json, result)
    if options.json != "-":
        print({name: value for name, value in result.items() if name != "deaths"})
    if result["checkpoints_lost"] or result["different_losses"] or result["different_arrays"]:
        fail("the run that was killed is not the run that was not", status=1)


if __name__ == "__main__":
    main()
