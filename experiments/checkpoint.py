"""List the checkpoints of a folder, verify them, or export the parameters of one as safetensors."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # inspecting files needs no GPU

from command_line.parsing import BucketPath, OptionalInt, OptionalStr, fail, or_fail, parse, write_json
from vocabpp_jax.checkpoints import inspection
from vocabpp_jax.runtime.hosts import quiet_libraries


@dataclass(frozen=True)
class CheckpointOptions:
    """What to do with which folder."""

    action: Annotated[Literal["list", "verify", "export"], tyro.conf.Positional]
    """list: show the checkpoints. verify: read everything and check every array against its fingerprint. export: write
    the parameters as safetensors, under their canonical names."""
    folder: Annotated[BucketPath, tyro.conf.Positional]
    """The folder given as --checkpoint-dir."""
    step: OptionalInt = None
    """Which checkpoint. Default: all for list and verify, the newest for export."""
    output: OptionalStr = None
    """With export: the .safetensors file, or a folder for several."""
    shard_gb: float = 4.0
    """With export: maximum size of a file in GiB."""
    json: OptionalStr = None
    """Write the result as JSON to this file, or to standard output if it is -."""


def chosen(options: CheckpointOptions) -> list[inspection.Entry]:
    """The checkpoints that the options select."""
    found = inspection.entries(options.folder)
    if options.step is None:
        return found
    named = [entry for entry in found if entry.step == options.step]
    if not named:
        steps = ", ".join(str(entry.step) for entry in found)
        raise ValueError(f"step is {options.step}; {options.folder} has checkpoints of the steps {steps}")
    return named


def run(options: CheckpointOptions) -> dict:
    """Run the command and return the result as JSON values."""
    found = chosen(options)
    if options.action == "list":
        return {"checkpoints": [row(entry) for entry in found]}
    if options.action == "verify":
        return {"checkpoints": [row(entry) | {"problems": verified(options.folder, entry.step)} for entry in found]}
    if options.output is None:
        raise ValueError("export needs --output, a .safetensors file or a folder")
    if not options.shard_gb > 0:
        raise ValueError(f"shard_gb is {options.shard_gb}; it must be above 0")
    files = inspection.export(options.folder, found[-1].step, options.output, int(options.shard_gb * 2**30))
    return {"step": found[-1].step, "files": [str(file) for file in files]}


def row(entry: inspection.Entry) -> dict:
    """A checkpoint's numbers, for JSON and the table."""
    if entry.record is None:
        return {"step": entry.step, "problem": entry.problem}
    numbers = {"rows": entry.record["rows"], "parameters": entry.parameters, "bytes": entry.bytes}
    return {"step": entry.step} | numbers | {"arrays": len(entry.record["arrays"])}


def verified(folder: str, step: int) -> list[str]:
    """The problems of a checkpoint, showing progress on a terminal."""

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\rstep {step}: {done}/{of} arrays", end="" if done < of else "\n", file=sys.stderr, flush=True)

    return inspection.verify(folder, step, progress)


def show(options: CheckpointOptions, result: dict) -> None:
    """Print the result for people."""
    for entry in result.get("checkpoints", []):
        if "problem" in entry:
            print(f"step {entry['step']:>8}  {entry['problem']}")
            continue
        state = "  whole" if entry.get("problems") == [] else ""
        print(
            f"step {entry['step']:>8}  {entry['rows']:>12,} sequences seen  {entry['parameters']:>14,} parameters  "
            f"{entry['bytes'] / 2**20:>10,.1f} MiB in {entry['arrays']} arrays{state}"
        )
        for problem in entry.get("problems", []):
            print(f"    {problem}")
    for file in result.get("files", []):
        print(f"written: {file}, the parameters of step {result['step']}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exits with status 1 if verify finds damage."""
    options = parse(CheckpointOptions, __doc__, arguments)
    quiet_libraries()
    result = or_fail(lambda: run(options))
    if options.json != "-":
        show(options, result)
    write_json(options.json, result)
    bad = [e["step"] for e in result.get("checkpoints", []) if e.get("problem") or e.get("problems")]
    if options.action == "verify" and bad:
        fail(f"damaged: the checkpoints of step {', '.join(map(str, bad))} in {options.folder}", status=1)


if __name__ == "__main__":
    main()
