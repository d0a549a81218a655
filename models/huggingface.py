"""Weights from Hugging Face folders and back: ``config.json`` and safetensors, streamed, names exactly theirs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vocabpp_jax.models.config import Config
from vocabpp_jax.models.decoder import build
from vocabpp_jax.models.hf_files import Tensors, write
from vocabpp_jax.models.hf_names import ARCHITECTURES, Architecture, architecture_of, by_head, by_kind
from vocabpp_jax.pipeline import Pipeline
from vocabpp_jax.pipeline.model_interface import Params
from vocabpp_jax.pipeline.weight_streaming import Index, Path, assemble, canonical_leaves, leaves

_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")  # no parameters: older versions stored them
_DTYPES = {"float32": np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}
SHARD_BYTES = 5_000_000_000


def load_config(folder: str | File) -> Config:
    """The configuration in a folder's ``config.json``.

    Raises:
        ValueError: no such file, an architecture or a setting that is not supported, a field that is missing.
    """
    return _read_config(File(folder))[1]


def load(folder: str | File, pipe: Pipeline) -> Params:
    """A folder's weights as a pipeline's parameters, float32, each device's part read on its own.

    The pipeline's model is that of :func:`load_config`, or differs from it in what has no weights (``seq`` where
    positions are rotary, ``dtype``, ``residuals``).

    Raises:
        ValueError: what :func:`load_config` refuses; a tensor that is missing, of another shape, or that nothing here
            takes; a truncated file. All of it is found before the first weight is read.
    """
    return assemble(pipe, check(folder, pipe))


def check(folder: str | File, pipe: Pipeline) -> Callable[[Path, Index], np.ndarray]:
    """Raises what :func:`load` would, without reading a weight; returns what reads them."""
    architecture, config = _read_config(File(folder))
    return _reader(File(folder), architecture, config, pipe.model.param_shapes())


def load_canonical(folder: str | File) -> tuple[Config, Params]:
    """A folder's configuration and weights as canonical parameters in this host's memory. Raises as :func:`load`."""
    architecture, config = _read_config(File(folder))
    shapes = build(config).param_shapes()
    read = _reader(File(folder), architecture, config, shapes)
    flat = [read(path, tuple(slice(0, n) for n in shape.shape)) for path, shape in leaves(shapes)]
    return config, jax.tree.unflatten(jax.tree.structure(shapes), flat)


def save(
    folder: str | File,
    config: Config,
    params: Params,
    pipe: Pipeline | None = None,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that ``transformers`` reads, streamed; several files and an index where one would be too large.

    Args:
        folder: a new one. It appears under its name once it is complete.
        params: a pipeline's parameters with ``pipe``, canonical ones without. Every process calls; the first writes.
        dtype: of the weights in the file: float32, bfloat16 or float16.

    Raises:
        ValueError: a folder that exists, an unknown dtype, an architecture that has no counterpart.
    """
    folder, architecture = File(folder), architecture_of(config)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
    if folder.exists():
        raise ValueError(f"{folder} exists; give a folder that does not, nothing is overwritten")
    kind, writes = np.dtype(_DTYPES[dtype]), jax.process_index() == 0
    sizes = {
        architecture.tensor(path): math.prod(shape.shape) * kind.itemsize
        for path, shape in leaves(build(config).param_shapes())
    }
    partial = folder.with_name(folder.name + ".partial")
    if writes:
        partial.mkdir(parents=True)
    weights = leaves(params) if pipe is None else canonical_leaves(pipe.layout, params)
    named = ((architecture.tensor(p), _theirs(architecture, config, p, w).astype(kind)) for p, w in weights)
    write(partial, named, sizes, shard_bytes, writes=writes)
    if writes:
        (partial / "config.json").write_text(json.dumps(_json(architecture, config, dtype), indent=2) + "\n")
        partial.rename(folder)


def _json(architecture: Architecture, config: Config, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
        "dtype": dtype,
    } | architecture.json(config)


def _read_config(folder: File) -> tuple[Architecture, Config]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json")
    try:
        values = json.loads(file.read_text())
    except json.JSONDecodeError as problem:
        raise ValueError(f"{file} is not JSON: {problem}") from None
    name = (values.get("architectures") or [None])[0]
    if name not in ARCHITECTURES:
        raise ValueError(f"{file} has architecture {name!r}; it must be one of {', '.join(ARCHITECTURES)}")
    try:
        return ARCHITECTURES[name], ARCHITECTURES[name].config(values)
    except KeyError as missing:
        raise ValueError(f"{file} lacks the field {missing}, which a {name} has") from None


def _reader(
    folder: File, architecture: Architecture, config: Config, shapes: Params
) -> Callable[[Path, Index], np.ndarray]:
    """``(path, index) -> array`` for the canonical leaves of ``shapes``, once all of them are known to be there."""
    tensors = Tensors(folder)
    entries = tensors.entries
    bare = not any(name.startswith(architecture.prefix) for name in entries)

    def stored(path: Path) -> str:
        name = architecture.tensor(path)
        return name.removeprefix(architecture.prefix) if bare else name

    wanted = {stored(path): path for path, _ in leaves(shapes)}
    for path, shape in leaves(shapes):
        theirs = shape.shape[::-1] if architecture.turned(path) else shape.shape
        name = stored(path)
        if name not in entries:
            raise ValueError(f"{folder} has no tensor {name!r}, which is to be of shape {list(theirs)}")
        if entries[name].shape != theirs:
            raise ValueError(
                f"tensor {name!r} in {entries[name].file.name} has shape {list(entries[name].shape)}; "
                f"the model's is {list(theirs)}"
            )
    tied = {stored(("head",))} if config.tie_embeddings else set()
    for name in entries:
        if name not in wanted and name not in tied and not _BUFFERS.search(name):
            raise ValueError(
                f"{entries[name].file.name} has a tensor {name!r} of shape {list(entries[name].shape)}, "
                f"which a {architecture.name} of this configuration does not have"
            )

    def read(path: Path, index: Index) -> np.ndarray:
        name = stored(path)
        if architecture.reordered(path):
            return by_head(tensors.read(name, tuple(slice(None) for _ in index)), config.heads)[index]
        return tensors.read(name, index[::-1]).T if architecture.turned(path) else tensors.read(name, index)

    return read


def _theirs(architecture: Architecture, config: Config, path: Path, weight: Any) -> np.ndarray:
    """One of our leaves as they store it."""
    weight = np.asarray(weight)
    if architecture.reordered(path):
        return by_kind(weight, config.heads)
    return weight.T if architecture.turned(path) else weight
