"""Kill a small training run at random moments, restart it each time, and check that nothing was lost.

Trains once without interruption, then again with kills. Every restart must resume from the last checkpoint that was
complete when the run died; in the end, the losses of all steps and the fingerprints of all arrays must equal those of
the uninterrupted run. With ``--processes 2``, one of two processes is also killed, stopped or made to fail at a random
phase of each restart: the others must end in time, with a sentence, and the next start must resume. Exits with status 1
otherwise.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from command_line.parsing import OptionalStr, fail, parse, write_json
from speed_measure.processes import free_port
from training_run.kill_faults import FAULTS, ONLY_FIRST, PHASES
from vocabpp_jax.checkpoints import read_record, steps_in
from vocabpp_jax.runtime.metrics import read_records

SMALL = (
    "--vocab-size 300 --layers 2 --hidden 32 --heads 2 --seq 16 --stages 2 --data-parallel 1 --microbatches 3 "
    "--eval-batches 1 --eval-every 1000000"
)
HERE = Path(__file__).parent
HEARTBEAT, JOIN = 10, 60
"""Seconds after which a silent process counts as lost, and within which all must have started."""


@dataclass(frozen=True)
class KillOptions:
    """How many kills, and how harsh."""

    kills: int = 20
    """SIGKILLs, each at a random moment of the run."""
    processes: int = 1
    """Processes of the run. With several, each kill is followed by a start in which one of them fails to restore."""
    steps: int = 300
    """Steps of the whole run."""
    checkpoint_every: int = 4
    """Steps between checkpoints; few, so that many kills hit a save in progress."""
    longest: float = 2.0
    """Maximum seconds from the first step to a kill. Once there is a checkpoint, one kill in four comes before the
    first step."""
    timeout: float = 60.0
    """Seconds within which the other processes must have ended after one has failed."""
    data: OptionalStr = None
    """Data to train on; default: a generated text."""
    seed: int = 0
    """Random seed; determines the moments."""
    json: OptionalStr = None
    """Write the result as JSON to this file, or to standard output if it is -."""


class Lives:
    """One run in a folder, started and killed repeatedly."""

    def __init__(self, options: KillOptions, folder: Path, data: str, name: str):
        self.output, self.checkpoints = folder / name, folder / f"{name}-checkpoints"
        arguments = f"{SMALL} --steps {options.steps} --checkpoint-every {options.checkpoint_every}".split()
        where = ["--data", data, "--output", str(self.output), "--checkpoint-dir", str(self.checkpoints)]
        self._arguments, self._processes = [*arguments, *where], options.processes
        self._logs = [folder / f"{name}-{rank}.log" for rank in range(options.processes)]
        self.mark = folder / f"{name}-fault"
        self._environment = os.environ | {
            "VOCABPP_CACHE": str(folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),  # the test is about training, not compiling
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, fault: dict | None = None) -> list[subprocess.Popen]:
        """Start the run again, optionally with a process that fails as kill_faults.py's KILL_FAULT says."""
        script, environment = [str(HERE / "train.py")], dict(self._environment)
        if fault is not None:
            self.mark.unlink(missing_ok=True)
            script = [
                "-c",
                f"import sys; sys.path[0] = {str(HERE)!r}; from training_run import kill_faults as f; f.main()",
            ]
            environment["KILL_FAULT"] = json.dumps(fault | {"mark": str(self.mark)})
        command, port = [sys.executable, *script, *self._arguments], free_port()
        started = []
        for rank, log in enumerate(self._logs):
            cluster = f"--coordinator localhost:{port} --processes {self._processes} --process-id {rank}"
            timeouts = f"--heartbeat-timeout {HEARTBEAT} --join-timeout {JOIN}"
            more = f"{cluster} {timeouts}".split() if self._processes > 1 else []
            with log.open("w") as file:
                started.append(subprocess.Popen([*command, *more], env=environment, stdout=file, stderr=file))
        return started

    def said(self, rank: int) -> str:
        """The output of a process of this start."""
        return self._logs[rank].read_text(errors="replace")

    def stepped(self) -> bool:
        """Whether this start has completed a step."""
        return "  loss " in self.said(0)

    def finish(self) -> float:
        """Run to the end; returns the seconds to the first step."""
        processes, start, stepped_at = self.start(), time.monotonic(), 0.0
        while any(process.poll() is None for process in processes):
            time.sleep(0.01)
            if not stepped_at and self.stepped():
                stepped_at = time.monotonic()
        if statuses := [process.returncode for process in processes if process.returncode]:
            raise RuntimeError(f"training ended with status {statuses}:\n{self.said(0)[-2000:]}")
        return stepped_at - start

    def records(self) -> list[dict]:
        path = self.output / "metrics.jsonl"
        return read_records(path) if path.exists() else []

    def kept(self) -> int:
        """The step of the last checkpoint."""
        return max(steps_in(self.checkpoints), default=0)

    def fingerprints(self) -> dict[str, int]:
        """The fingerprint of every array in the last checkpoint."""
        record = read_record(self.checkpoints, self.kept())
        return {name: array["fingerprint"] for name, array in record["arrays"].items()}


def live_and_die(lives: Lives, after_start: float | None, after_step: float) -> dict:
    """Start and kill the run: ``after_start`` seconds after its start or, if None, ``after_step`` seconds after its
    first step; with several processes and nothing to restore yet, after the first checkpoint."""
    begun_at = lives.kept()
    processes, start = lives.start(), time.monotonic()
    killed_at = after_start
    while processes[0].poll() is None and (killed_at is None or time.monotonic() - start < killed_at):
        if killed_at is None and lives.stepped() and (lives.kept() or len(processes) == 1):
            killed_at = time.monotonic() - start + after_step
        time.sleep(0.01)
    end(processes)
    partial = any("orbax-checkpoint-tmp" in path.name for path in lives.checkpoints.glob("*"))
    last = max((record["step"] for record in lives.records()), default=0)
    return {"began": begun_at, "died": last, "kept": lives.kept(), "in_save": partial}


def random_fault(processes: int) -> dict:
    """A random process, the phase of restoring in which it fails, and how."""
    phase, victim = random.choice(list(PHASES)), random.randrange(processes)
    return {"phase": phase, "what": random.choice(FAULTS), "process": 0 if phase in ONLY_FIRST else victim}


def fail_to_restore(lives: Lives, options: KillOptions, fault: dict) -> dict:
    """A start in which one process fails before the first step; whether the others ended in time, with a sentence."""
    kept, processes = lives.kept(), lives.start(fault)
    others = [rank for rank in range(options.processes) if rank != fault["process"]]
    while not lives.mark.exists() and not lives.stepped() and all(p.poll() is None for p in processes):
        time.sleep(0.01)
    failed_at, reached = time.monotonic(), lives.mark.exists()
    while any(processes[rank].poll() is None for rank in others) and time.monotonic() - failed_at < options.timeout:
        time.sleep(0.01)
    seconds = time.monotonic() - failed_at
    statuses = [processes[rank].poll() for rank in others]
    end(processes)
    said = [lives.said(rank) for rank in others]
    in_time, told = None not in statuses, all("\nerror: " in "\n" + text for text in said)
    clean = not any("Traceback" in text for text in said)
    good = reached and in_time and 0 not in statuses and told and clean and lives.kept() == kept
    return fault | {"kept": kept, "statuses": statuses, "seconds": round(seconds, 1), "good": good}


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()


def kill_test(options: KillOptions, folder: Path) -> dict:
    """Run both and return what was found."""
    random.seed(options.seed)
    data = options.data or str(folder / "text.txt")
    if options.data is None:
        words = [f"{consonant}{vowel}" for consonant in "bcdfgklmnp" for vowel in "aeiou"]
        Path(data).write_text(" ".join(random.choice(words) for _ in range(20_000)))
    whole, killed = Lives(options, folder, data, "whole"), Lives(options, folder, data, "killed")
    to_first_step = whole.finish()
    deaths, failures = [], []
    while len(deaths) < options.kills:
        early = random.uniform(0, to_first_step) if killed.kept() and random.random() < 0.25 else None
        deaths.append(live_and_die(killed, early, random.uniform(0, options.longest)))
        print(f"kill {len(deaths)}/{options.kills}: {deaths[-1]}", file=sys.stderr, flush=True)
        if options.processes > 1 and killed.kept():
            failures.append(fail_to_restore(killed, options, random_fault(options.processes)))
            print(f"    then: {failures[-1]}", file=sys.stderr, flush=True)
            if not failures[-1]["good"]:
                print("\n".join(killed.said(rank) for rank in range(options.processes)), file=sys.stderr, flush=True)
    killed.finish()
    expected, found = (
        {record["step"]: (record["loss"], record["grad_norm"]) for record in lives.records()}
        for lives in (whole, killed)
    )
    return {
        **asdict(options),
        "deaths": deaths,
        "failures": failures,
        "in_save": sum(death["in_save"] for death in deaths),
        "most_steps_lost": max((death["died"] - death["kept"] for death in deaths), default=0),
        "checkpoints_lost": sum(b["began"] < a["kept"] for a, b in zip(deaths, deaths[1:], strict=False)),
        "failed_to_restore": len(failures),
        "not_told": sum(not failure["good"] for failure in failures),
        "slowest_to_end": max((failure["seconds"] for failure in failures), default=0.0),
        "different_losses": sum(expected.get(step) != found.get(step) for step in expected.keys() | found.keys()),
        "different_arrays": sum(
            a != b for a, b in zip(*(x.fingerprints().values() for x in (whole, killed)), strict=True)
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse(KillOptions, __doc__, arguments)
    for name in ("kills", "steps", "processes"):
        if getattr(options, name) < 1:
            fail(f"{name} is {getattr(options, name)}; it must be at least 1")
    if options.processes > 2:
        fail(f"processes is {options.processes}; the run has two stages, so at most 2")
    with tempfile.TemporaryDirectory() as folder:
        result = kill_test(options, Path(folder))
    write_json(options.json, result)
    if options.json != "-":
        print({name: value for name, value in result.items() if name not in ("deaths", "failures")})
    bad = ("checkpoints_lost", "not_told", "different_losses", "different_arrays")
    if any(result[name] for name in bad):
        fail("the run that was killed differs from the run that was not", status=1)


if __name__ == "__main__":
    main()
