"""Load and save Hugging Face folders: ``config.json`` and safetensors, streamed, with exactly their names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import jax
import numpy as np

from vocabpp_jax.models.config import Config
from vocabpp_jax.models.decoder import build
from vocabpp_jax.models.hf_export import Source, check_save, read_source, save, tokenizer_files
from vocabpp_jax.models.hf_fields import read_json
from vocabpp_jax.models.hf_files import TAIL, Tensors, canonical_name
from vocabpp_jax.models.hf_names import Architecture, by_head, config_of
from vocabpp_jax.pipeline import Pipeline
from vocabpp_jax.pipeline.model_interface import Params
from vocabpp_jax.pipeline.weight_streaming import Index, Path, assemble, leaves

__all__ = [
    "Source",
    "check",
    "check_save",
    "load",
    "load_canonical",
    "load_config",
    "read_source",
    "save",
    "tokenizer_files",
]

# buffers, not parameters: older versions stored them
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


def load_config(folder: str | File) -> Config:
    """The configuration in a folder's ``config.json``.

    Raises:
        ValueError: no such file, an unsupported architecture or setting, or a missing field.
    """
    return config_of(*_config_json(folder))[1]


def load(folder: str | File, pipe: Pipeline) -> Params:
    """A folder's weights as a pipeline's float32 parameters; only each device's part is read.

    The pipeline's model is that of :func:`load_config`, or differs only in what has no weights (``seq`` with rotary
    positions, ``dtype``, ``residuals``).

    Raises:
        ValueError: what :func:`load_config` rejects; a tensor that is missing, of another shape, or unused here; a
            truncated file. All of it is detected before the first weight is read.
    """
    return assemble(pipe, check(folder, pipe))


def check(folder: str | File, pipe: Pipeline) -> Callable[[Path, Index], np.ndarray]:
    """Raise what :func:`load` would, without reading a weight; returns the reader."""
    architecture, config = config_of(*_config_json(folder))
    shapes = pipe.model.param_shapes()
    tail = shapes.pop("tail", None)
    main = _reader(File(folder), architecture, config, shapes)
    if tail is None:
        return main
    further = _tail_reader(File(folder), {"tail": tail})
    return lambda path, index: (further if path[0] == "tail" else main)(path, index)


def load_canonical(folder: str | File) -> tuple[Config, Params]:
    """A folder's configuration and its weights as canonical parameters in host memory. Raises as :func:`load`."""
    architecture, config = config_of(*_config_json(folder))
    shapes = build(config).param_shapes()
    read = _reader(File(folder), architecture, config, shapes)
    flat = [read(path, tuple(slice(0, n) for n in shape.shape)) for path, shape in leaves(shapes)]
    return config, jax.tree.unflatten(jax.tree.structure(shapes), flat)


def _config_json(folder: str | File) -> tuple[dict[str, Any], str]:
    """The values in its config.json, and the file's name for messages."""
    file = File(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json")
    return read_json(file), str(file)


def _tail_reader(folder: File, shapes: Params) -> Callable[[Path, Index], np.ndarray]:
    """``(path, index) -> array`` for the multi-token-prediction tail, after checking that all of it is there."""
    if not (folder / TAIL).is_file():
        raise ValueError(
            f"mtp_depth is {len(shapes['tail'])} and {folder} has no {TAIL}, which is where an export stores the "
            "multi-token-prediction weights: set mtp_depth to 0"
        )
    tensors, wanted = Tensors(folder, TAIL), {canonical_name(path): shape.shape for path, shape in leaves(shapes)}
    tensors.check(folder / TAIL, wanted)
    if further := sorted(tensors.entries.keys() - wanted):
        raise ValueError(f"{folder / TAIL} has a tensor {further[0]!r}; mtp_depth is {len(shapes['tail'])}")
    return lambda path, index: tensors.read(canonical_name(path), index)


def _reader(
    folder: File, architecture: Architecture, config: Config, shapes: Params
) -> Callable[[Path, Index], np.ndarray]:
    """``(path, index) -> array`` for the canonical leaves of ``shapes``, after checking that all are there."""
    tensors = Tensors(folder)
    entries = tensors.entries
    bare = not any(name.startswith(architecture.prefix) for name in entries)

    def stored(path: Path) -> str:
        name = architecture.tensor(path)
        return name.removeprefix(architecture.prefix) if bare else name

    wanted = {
        stored(path): shape.shape[::-1] if architecture.is_transposed(path) else shape.shape
        for path, shape in leaves(shapes)
    }
    tensors.check(folder, wanted)
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
        return tensors.read(name, index[::-1]).T if architecture.is_transposed(path) else tensors.read(name, index)

    return read
