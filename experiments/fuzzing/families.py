"""The kinds of input, and a case generator for each: ``(random, inputs, folder) -> action``."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, get_type_hints

import code_size
import gallery
import numpy as np
import parity

import checkpoint
import memory
import overhead
import reproduce
import simulate
import speed
import train
from command_line.parsing import or_fail, parse
from fuzzing.cases import Action
from fuzzing.inputs import SHAPE, SMALL, Inputs
from fuzzing.mutate import bytes_of, json_of, text_of_json, value_of, word_of
from vocabpp_jax import models, schedules
from vocabpp_jax.data.megatron import HEADER, MAGIC
from vocabpp_jax.schedules.simulation import formats

Make = Callable[[Random, Inputs, Path], Action]
_OTHERS = (
    code_size.CodeSizeOptions,
    gallery.GalleryOptions,
    memory.MemoryOptions,
    overhead.OverheadOptions,
    parity.ParityOptions,
    reproduce.ReproduceOptions,
    speed.SpeedOptions,
)
_FILES = ["a.txt", "a.jsonl", "A.JSONL", "a.json", "a.parquet", "a", ".a", "README.md", "a.jsonl.gz", "b.csv", "ü.txt"]
RECORDS = b'{"text": "alpha beta"}\n{"text": "gamma"}\n' * 40


def trains(arguments: list[str]) -> Action:
    """The training command up to the point where it would compile."""

    def action() -> None:
        train.run_training = lambda run: None
        train.main(arguments)

    return action


def warm() -> None:
    """Do once what every case would repeat: read the options' descriptions, trace the small model."""
    for options in (train.TrainOptions, simulate.SimulateOptions, checkpoint.CheckpointOptions):
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            parse(options, "", [])
    models.build(parse(train.TrainOptions, "", SMALL).model.config())


def data(random: Random, inputs: Inputs, folder: Path) -> Action:
    """A data file or a folder of them, under any name."""
    source = folder / "data"
    many = random.random() < 0.4
    for name in random.sample(_FILES, random.choice((0, 1, 2, 4)) if many else 1):
        path = source / name if many else folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_document(random, inputs, path.suffix.lower()))
    if many and random.random() < 0.3 and source.is_dir():
        os.symlink(random.choice((source, folder / "nothing", inputs.folder / "text.txt")), source / "link")
    named = "data" if many else name
    return trains([*SMALL, "--data", named, *_some(random, "--damaged-data skip", "--document-masks")])


def _document(random: Random, inputs: Inputs, suffix: str) -> bytes:
    if suffix == ".parquet":
        return bytes_of(random, _parquet())
    if suffix == ".txt" and random.random() < 0.5:
        return bytes_of(random, inputs.text.read_bytes())
    if random.random() < 0.5:
        return bytes_of(random, RECORDS)
    values = [{"text": value_of(random) if random.random() < 0.3 else "alpha beta gamma"} for _ in range(30)]
    lines = [text_of_json(random, value) for value in values]
    return b"\n".join(lines) if random.random() < 0.7 else b"[" + b",".join(lines) + b"]"


def _parquet() -> bytes:
    import pyarrow  # optional dependency
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [f"document {i}" for i in range(50)]}), file, row_group_size=20)
    return file.getvalue()


def megatron(random: Random, inputs: Inputs, folder: Path) -> Action:
    """An indexed dataset whose files contradict themselves or each other."""
    lengths = np.array([random.choice((0, 1, 5, 40)) for _ in range(random.choice((1, 9, 60)))], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) * 2
    bounds = np.arange(len(lengths) + 1, dtype=np.int64)
    index = HEADER.pack(MAGIC, 1, 8, len(lengths), len(bounds))
    index += lengths.tobytes() + pointers.tobytes() + bounds.tobytes()
    tokens = np.random.default_rng(random.randrange(99)).integers(0, 300, lengths.sum()).astype(np.uint16).tobytes()
    (folder / "set.idx").write_bytes(bytes_of(random, index) if random.random() < 0.7 else index)
    (folder / "set.bin").write_bytes(bytes_of(random, tokens) if random.random() < 0.5 else tokens)
    flags = _some(random, "--damaged-data skip", "--document-masks")
    flags += ["--end-of-text", "x"] if random.random() < 0.03 else []
    return trains([*SMALL, "--data", random.choice(("set", "set.idx", "set.bin")), *flags])


def tokenizers(random: Random, inputs: Inputs, folder: Path) -> Action:
    """A tokenizer.json and the configuration next to it."""
    model = inputs.model("gpt2")
    like = json.loads((model / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_bytes(text_of_json(random, like))
    if random.random() < 0.4:
        (folder / "tokenizer_config.json").write_bytes(text_of_json(random, {"eos_token": "<|endoftext|>"}))
    ends = ["--end-of-text", word_of(random, "<|endoftext|>", "a")] if random.random() < 0.2 else []
    return trains([*SMALL, "--data", str(inputs.text), "--tokenizer", "tokenizer.json", *ends])


def configurations(random: Random, inputs: Inputs, folder: Path) -> Action:
    """A config.json; only the architecture is read from it."""
    like = json.loads((inputs.model(random.choice(inputs.models)) / "config.json").read_text())
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_bytes(text_of_json(random, like))
    return trains([*SHAPE.split(), "--data", str(inputs.text), "--model", "./model", *_some(random, "--export out")])


def weights(random: Random, inputs: Inputs, folder: Path) -> Action:
    """A Hugging Face folder to start from, in one file or several."""
    name = random.choice(inputs.models)
    shutil.copytree(inputs.model(name), folder / "model")
    files = sorted((folder / "model").glob("*.safetensors"))
    index = folder / "model" / "model.safetensors.index.json"
    if index.exists() and random.random() < 0.4:
        index.write_bytes(text_of_json(random, json.loads(index.read_text())))
    elif random.random() < 0.1:
        random.choice(files).unlink()
    else:
        _change_safetensors(random, random.choice(files))
    start = ["--model", "./model", "--pretrained", "--tokenizer", str(inputs.model(name) / "tokenizer.json")]
    return trains([*SHAPE.split(), "--data", str(inputs.text), *start, *_some(random, "--export out", "--soft-cap 3")])


def _change_safetensors(random: Random, file: Path) -> None:
    raw = file.read_bytes()
    if random.random() < 0.5:
        file.write_bytes(bytes_of(random, raw))
        return
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps(json_of(random, json.loads(raw[8 : 8 + length]))).encode()
    size = len(header) if random.random() < 0.8 else random.choice((0, 1, 2**40, 2**63))
    file.write_bytes(struct.pack("<Q", size) + header + raw[8 + length :])


def checkpoints(random: Random, inputs: Inputs, folder: Path) -> Action:
    """A checkpoint folder with a file changed, missing or added; listed, verified, exported or resumed from."""
    shutil.copytree(inputs.checkpoints, folder / "kept")
    files = sorted(path for path in (folder / "kept").rglob("*") if path.is_file())
    records = [path for path in files if path.name == "metadata" and path.parent.name == "run"]
    some = random.sample(files, min(len(files), random.choice((1, 1, 3))))
    for path in some if random.random() < 0.6 else records[:1]:
        if path.name == "metadata" and random.random() < 0.7:
            path.write_bytes(text_of_json(random, json.loads(path.read_bytes())))
        elif random.random() < 0.2:
            path.unlink()
        else:
            path.write_bytes(bytes_of(random, path.read_bytes()))
    if random.random() < 0.2:
        (folder / "kept" / word_of(random, "7", "007", "x").replace("/", "")[:100].strip(".") or "8").mkdir(
            exist_ok=True
        )
    match random.randrange(4):
        case 0:
            return _reported("list", "kept")
        case 1:
            return _reported("verify", "kept")
        case 2:
            return _reported("export", "kept", "--output", random.choice(("out", "out.safetensors", "kept")))
    kept = ["--checkpoint-dir", "kept", "--output", "out"]
    return trains([*SMALL, "--data", str(inputs.text), "--steps", "2", *kept, *_some(random, "--accept-changes")])


def _reported(*arguments: str) -> Action:
    return lambda: checkpoint.main(list(arguments))


def files_of_numbers(random: Random, inputs: Inputs, folder: Path) -> Action:
    """Schedules as CSV and JSON, measured pass times, a GPU file."""
    kind = random.randrange(4)
    if kind < 2:
        name = ("times.csv", "gpu.toml")[kind]
        raw = (inputs.folder / name).read_bytes()
        (folder / name).write_bytes(bytes_of(random, raw) if random.random() < 0.5 else _renumbered(random, raw))
        small = "--stages 2 --microbatches 2 --model gpt-tiny --layers 8 --json result.json".split()
        chosen = ["--times", name, "--method", "vocab-2"] if kind == 0 else ["--gpu", f"./{name}"]
        return lambda: _quietly(lambda: simulate.main([*small, *chosen]))
    if kind == 2:
        raw = bytes_of(random, (inputs.folder / "schedule.csv").read_bytes())
        read = random.choice((formats.from_csv, formats.schedule_from_csv))
    else:
        raw = text_of_json(random, inputs.schedule)

        def read(text: str) -> None:
            schedules.check(formats.from_json(text))

    text = raw.decode(errors="replace")
    return lambda: or_fail(lambda: read(text)) and None


def _renumbered(random: Random, raw: bytes) -> bytes:
    """The text with one of its numbers replaced."""
    text = raw.decode()
    at = random.choice(list(re.finditer(r"[0-9.]+", text)))
    return (text[: at.start()] + json.dumps(value_of(random)) + text[at.end() :]).encode()


def _quietly(action: Action) -> None:
    """Without the report, which would be a valid answer."""
    with contextlib.redirect_stdout(io.StringIO()):
        action()


def command_lines(random: Random, inputs: Inputs, folder: Path) -> Action:
    """Options with unexpected values."""
    if random.random() < 0.2:
        return _parses(random, inputs)
    command = random.choice(("train", "train", "simulate", "checkpoint"))
    options = {"train": train.TrainOptions, "simulate": simulate.SimulateOptions}.get(command)
    if options is None:
        words = [
            word_of(random, "list", "verify", "export", str(inputs.checkpoints)) for _ in range(random.randrange(4))
        ]
        flags = [
            w
            for flag in ("--step", "--output", "--shard-gb")
            if random.random() < 0.3
            for w in (flag, word_of(random, "2"))
        ]
        return _reported(*words, *flags)
    arguments = [*SMALL, "--data", str(inputs.text)] if command == "train" else "--stages 2 --microbatches 2".split()
    fields = _fields(options)
    for name in random.sample(sorted(fields), min(len(fields), random.choice((1, 1, 2, 4)))):
        arguments.append(f"--{name.replace('_', '-')}")
        if fields[name] is not bool:
            arguments.append(word_of(random, *_good(name, inputs)))
    if random.random() < 0.1:
        arguments.insert(random.randrange(len(arguments)), word_of(random))
    return trains(arguments) if command == "train" else (lambda: _quietly(lambda: simulate.main(arguments)))


def _parses(random: Random, inputs: Inputs) -> Action:
    """The options of a slow command that has no other input; they are only parsed."""
    options = random.choice(_OTHERS)
    fields = _fields(options)
    arguments = []
    for name in random.sample(sorted(fields), min(len(fields), random.choice((1, 2, 4)))):
        arguments += [
            f"--{name.replace('_', '-')}",
            *([] if fields[name] is bool else [word_of(random, *_good(name, inputs))]),
        ]
    return lambda: parse(options, "", arguments) and None


def _fields(options: type) -> dict[str, Any]:
    found = {}
    for name, hint in get_type_hints(options).items():
        found |= _fields(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    for joins in ("coordinator", "processes", "process_id", "distributed", "heartbeat_timeout", "join_timeout"):
        found.pop(joins, None)  # these wait for other processes
    return found


def _good(name: str, inputs: Inputs) -> tuple[str, ...]:
    named = {
        "schedule": schedules.SCHEDULES,
        "method": schedules.METHODS,
        "model": ("gpt-tiny", "LLAMA-tiny", "4b", str(inputs.model("llama"))),
        "data": (str(inputs.text), str(inputs.folder), "stdlib"),
        "checkpoint_dir": (str(inputs.checkpoints), "new"),
        "tokenizer": (str(inputs.model("gpt2") / "tokenizer.json"),),
        "times": (str(inputs.folder / "times.csv"),),
        "gpu": ("A100", "h100"),
    }
    return tuple(named.get(name, ("1", "2", "4", "0.5", "out")))


def _some(random: Random, *flags: str) -> list[str]:
    return [word for flag in flags if random.random() < 0.3 for word in flag.split()]


FAMILIES: dict[str, Make] = {
    make.__name__.replace("_", "-"): make
    for make in (data, megatron, tokenizers, configurations, weights, checkpoints, files_of_numbers, command_lines)
}
REPORTS = ("checkpoints", "command-lines")
"""Families whose commands may print a report before they say what is damaged."""
