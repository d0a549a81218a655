"""Small valid inputs of every kind, for the fuzzer to mutate."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import train
from vocabpp_jax import models
from vocabpp_jax.data import train_tokenizer
from vocabpp_jax.models import huggingface
from vocabpp_jax.schedules import build
from vocabpp_jax.schedules.simulation import formats

SHAPE = "--stages 2 --data-parallel 1 --microbatches 1 --microbatch-size 1 --seq 8 --eval-batches 1"
SMALL = f"{SHAPE} --layers 2 --hidden 16 --heads 2 --vocab-size 300".split()
_SIZES = {"layers": 2, "hidden": 16, "heads": 2, "seq": 16, "vocab_size": 300}
_NAMES = {"gpt2": "gpt-tiny", "llama": "llama-3.1-8b", "qwen": "qwen3-0.6b", "gemma": "gemma-tiny"}
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Inputs:
    """Where they are."""

    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def model(self, name: str) -> Path:
        """A Hugging Face folder: gpt2, llama, qwen or gemma."""
        return self.folder / name

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(_NAMES)

    @property
    def schedule(self) -> dict[str, Any]:
        return json.loads((self.folder / "schedule.json").read_text())


def make_inputs(folder: Path) -> None:
    """Write all of them. Trains a small model for two steps."""
    inputs = Inputs(folder)
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta", "\n"], 4000)
    inputs.text.write_text(" ".join(words))
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*SMALL, "--data", "text.txt", "--steps", "2", "--checkpoint-dir", "checkpoints"])
    tokenizer = train_tokenizer([inputs.text.read_text()], 300).to_str()
    for name, size in _NAMES.items():
        fields = _SIZES if name == "gpt2" else _SIZES | {"kv_heads": 2, "head_size": 8, "inner": 24, "dtype": "float32"}
        config = models.named(size, **fields)
        params = jax.tree.map(lambda s: np.full(s.shape, 0.01, np.float32), models.build(config).param_shapes())
        huggingface.save(inputs.model(name), config, params, shard_bytes=10**9 if name == "gpt2" else 8000)
        (inputs.model(name) / "tokenizer.json").write_text(tokenizer)
        (inputs.model(name) / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    shutil.copy(REPOSITORY / "docs/paper/pass_times_8xA100.csv", folder / "times.csv")
    shutil.copy(REPOSITORY / "schedules/simulation/gpus/a100-80g.toml", folder / "gpu.toml")
    schedule = build("zb-h1", "baseline", p=2, m=2)
    (folder / "schedule.csv").write_text(formats.to_csv(schedule, vocabulary=False))
    (folder / "schedule.json").write_text(formats.to_json(schedule))
