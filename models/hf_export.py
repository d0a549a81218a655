"""Export weights to a Hugging Face folder, copying what training does not change from the folder it started from."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vocabpp_jax.models.config import Config
from vocabpp_jax.models.decoder import build
from vocabpp_jax.models.hf_fields import read_json
from vocabpp_jax.models.hf_files import TAIL, canonical_name, save_tensors, write
from vocabpp_jax.models.hf_names import Architecture, architecture_of, by_kind, config_of
from vocabpp_jax.pipeline import Pipeline
from vocabpp_jax.pipeline.model_interface import Params
from vocabpp_jax.pipeline.weight_streaming import Path, canonical_leaves, leaves

DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
SHARD_BYTES = 5_000_000_000
_UNFINISHED = ".export-unfinished"  # marks a folder that we may clear
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
_ABOUT = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Source:
    """What an export keeps of the folder that training started from. Created by :func:`read_source`."""

    values: dict[str, Any]
    """Its ``config.json``."""
    files: Mapping[str, bytes]
    """Its tokenizer, ``generation_config.json`` and license, by name."""


def read_source(folder: str | File) -> Source:
    """Raises ValueError for a folder whose ``config.json`` or other files cannot be read."""
    folder = File(folder)
    return Source(read_json(folder / "config.json"), _files(folder, (*_TOKENIZER, *_ABOUT)))


def tokenizer_files(tokenizer: str | File) -> dict[str, bytes]:
    """A tokenizer file, as ``tokenizer.json``, and the files next to it that belong to it.

    Raises:
        ValueError: one of them cannot be read.
    """
    tokenizer = File(tokenizer)
    found = _files(tokenizer.parent, _TOKENIZER)
    found.pop(tokenizer.name, None)
    return found | {"tokenizer.json": _bytes(tokenizer)}


def check_save(
    folder: str | File,
    config: Config,
    pipe: Pipeline | None = None,
    *,
    dtype: str = "float32",
    source: Source | str | File | None = None,
) -> None:
    """Raise what :func:`save` would, before there is anything to save, and clear an earlier unfinished export. Call it
    in one process only."""
    plan = _Plan.of(folder, config, pipe, dtype, source)
    plan.claim()
    free = shutil.disk_usage(plan.partial).free
    plan.release()
    if free < sum(plan.sizes.values()):
        raise ValueError(
            f"export is {str(folder)!r}, which takes {sum(plan.sizes.values()) / 1e9:.3g} GB; its disk has "
            f"{free / 1e9:.3g} GB free"
        )


def save(
    folder: str | File,
    config: Config,
    params: Params,
    pipe: Pipeline | None = None,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    source: Source | str | File | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that ``transformers`` can read, streaming; several files and an index if one would be too large. A
    tail, which transformers does not read, goes to a separate file under canonical names.

    Args:
        folder: a new folder. It appears under its name once complete.
        params: a pipeline's parameters with ``pipe``, canonical ones without. Every process calls this; the first
            writes.
        dtype: of the weights in the file: float32, bfloat16 or float16.
        source: the folder that training started from. Its ``config.json`` is kept except for what training changed, and
            its other files are copied.
        tokenizer: files by name, of a tokenizer other than the source's (:func:`tokenizer_files`).
        values: further fields of ``config.json``, for example ``eos_token_id``.

    Raises:
        ValueError: a folder that exists, an unknown dtype, an architecture without a counterpart, or one that cannot
            express the model's soft cap.
        OSError: something cannot be written.
    """
    plan, writes = _Plan.of(folder, config, pipe, dtype, source), jax.process_index() == 0
    if writes:
        plan.claim()
    try:
        weights = leaves(params) if pipe is None else canonical_leaves(pipe.layout, params)
        kind, architecture = np.dtype(DTYPES[dtype]), plan.architecture
        named = (
            (name := architecture.tensor(p), _cast(name, _theirs(architecture, config, p, w), kind)) for p, w in weights
        )
        write(plan.partial, named, plan.sizes, shard_bytes, writes=writes)
        # The rest belongs to the tail.
        tail = {(name := canonical_name(p)): _cast(name, np.asarray(w), kind) for p, w in weights}
        if tail and writes:
            save_tensors(tail, plan.partial / TAIL)
        if writes:
            plan.write_rest(tokenizer, values or {})
    except BaseException:
        if writes:
            plan.release()
        raise
    if writes:
        plan.finish()


@dataclass(frozen=True)
class _Plan:
    """A valid export: what to write, and where."""

    folder: File
    architecture: Architecture
    config: Config
    dtype: str
    source: Source | None

    @classmethod
    def of(cls, folder, config, pipe, dtype, source) -> _Plan:
        """Raises ValueError if the export is not possible."""
        folder, architecture = File(folder), architecture_of(config)
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        if folder.exists() or folder.is_symlink():
            raise ValueError(f"export is {str(folder)!r}, which already exists; give a new folder")
        if source is not None and not isinstance(source, Source):
            source = read_source(source)
        cap = config.loss.soft_cap if pipe is None else pipe.model.loss.soft_cap
        return cls(folder, architecture, _with_cap(config, cap, architecture), dtype, source)

    @property
    def partial(self) -> File:
        return self.folder.with_name(self.folder.name + ".partial")

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor, in the order of writing."""
        itemsize, shapes = np.dtype(DTYPES[self.dtype]).itemsize, leaves(build(self.config).param_shapes())
        return {self.architecture.tensor(path): math.prod(shape.shape) * itemsize for path, shape in shapes}

    def claim(self) -> None:
        """Create the folder for the unfinished export, replacing one left by an earlier export."""
        if (self.partial / _UNFINISHED).is_file():
            self.release()
        try:
            self.partial.mkdir(parents=True)
            (self.partial / _UNFINISHED).touch()
        except FileExistsError:
            raise ValueError(f"{self.partial} exists and was not left by an export; remove it") from None
        except OSError as problem:
            raise ValueError(f"export is {str(self.folder)!r}, which cannot be written ({problem.strerror})") from None

    def release(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def write_rest(self, tokenizer: Mapping[str, bytes] | None, values: Mapping[str, Any]) -> None:
        """Write config.json and the files that accompany the weights."""
        files = dict(self.source.files) if self.source else {}
        if tokenizer is not None:
            files = {name: raw for name, raw in files.items() if not _matches(name, _TOKENIZER)} | dict(tokenizer)
        for name, raw in files.items():
            (self.partial / name).write_bytes(raw)
        (self.partial / "config.json").write_text(json.dumps(self.values() | dict(values), indent=2) + "\n")

    def values(self) -> dict[str, Any]:
        """The fields of config.json: the source's, except where the meaning has changed."""
        ours = _values(self.architecture, self.config)
        if self.source is None:
            # If these were left out, transformers would assume the published models' tokens.
            found = ours | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        else:
            before = config_of(self.source.values)
            was = _values(*before)
            if self.config.positions is None:  # the training length may be less than what the model supports
                ours["max_position_embeddings"] = max(self.config.seq, before[1].seq)
            found = self.source.values | {name: value for name, value in ours.items() if value != was.get(name)}
            if ours.get("rope_scaling"):  # one form for transformers 5 and later, one for earlier versions
                found |= {name: ours[name] for name in ("rope_parameters", "rope_scaling", "rope_theta")}
        return found | {"dtype": self.dtype, "torch_dtype": self.dtype}

    def finish(self) -> None:
        """Rename the folder to its final name; if that has been taken meanwhile, the weights stay where they are."""
        (self.partial / _UNFINISHED).unlink()
        try:
            if self.folder.exists():
                raise FileExistsError(None, "File exists")
            os.rename(self.partial, self.folder)
        except OSError as problem:
            said = f"{problem.strerror}; the weights are complete in {self.partial}"
            raise OSError(problem.errno, said, str(self.folder)) from None


def _with_cap(config: Config, cap: float | None, architecture: Architecture) -> Config:
    """The configuration with the model's soft cap."""
    if cap == config.loss.soft_cap:
        return config
    if "logit_cap" in {field.name for field in fields(config)}:
        return replace(config, logit_cap=cap)
    raise ValueError(
        f"soft_cap is {cap}, which the config.json of a {architecture.name} cannot say; leave it out, or do not export"
    )


def _values(architecture: Architecture, config: Config) -> dict[str, Any]:
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    } | architecture.json(config)


def _files(folder: File, patterns: tuple[str, ...]) -> dict[str, bytes]:
    return {file.name: _bytes(file) for file in sorted(folder.iterdir()) if _matches(file.name, patterns)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _bytes(file: File) -> bytes:
    try:
        return file.read_bytes()
    except OSError as problem:
        raise ValueError(f"{file} cannot be read ({problem.strerror})") from None


def _cast(name: str, weight: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Raises ValueError if a weight overflows the dtype of the file."""
    with np.errstate(over="ignore"):
        cast = weight.astype(kind)
    if kind == np.float16 and np.isinf(cast).sum() > np.isinf(weight).sum():
        raise ValueError(
            f"tensor {name!r} has weights of up to {np.abs(weight).max():.3g}, beyond float16; use bfloat16"
        )
    return cast


def _theirs(architecture: Architecture, config: Config, path: Path, weight: Any) -> np.ndarray:
    """One of our leaves in the layout they store."""
    weight = np.asarray(weight)
    if architecture.reordered(path):
        return by_kind(weight, config.heads)
    return weight.T if architecture.is_transposed(path) else weight
