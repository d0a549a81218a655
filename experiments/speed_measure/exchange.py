"""Weights and batches in files that any framework can read: only numpy, no jax or torch.

``weights.npz`` holds the canonical parameters by their path, for example ``blocks.0.attention.qkv.kernel [in, out]``;
``batches.npz`` holds ``tokens`` and ``labels``, int32 ``[steps, m, B, L]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

ADAM = {"b1": 0.9, "b2": 0.95, "eps": 1e-8}
"""Adam on both sides, at a constant rate, without decay or clipping."""


def write(folder: Path, weights: dict[str, np.ndarray], batches: dict[str, np.ndarray]) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "weights.npz", **weights)
    np.savez(folder / "batches.npz", **batches)


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """The parameters by their path."""
    with np.load(folder / "weights.npz") as file:
        return dict(file)


def read_batches(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The batch of every step, ``[m, B, L]``."""
    with np.load(folder / "batches.npz") as file:
        tokens, labels = file["tokens"], file["labels"]
    for step in range(len(tokens)):
        yield {"tokens": tokens[step], "labels": labels[step]}


def make_batches(steps: int, m: int, batch: int, seq: int, vocab_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Learnable text: three out of four tokens are determined by the previous one."""
    random = np.random.default_rng(seed)
    follower = random.permutation(vocab_size)
    shape = (steps, m, batch)
    text = np.empty((*shape, seq + 1), np.int32)
    text[..., 0] = random.integers(0, vocab_size, shape)
    for n in range(seq):
        surprise = random.random(shape) < 0.25
        text[..., n + 1] = np.where(surprise, random.integers(0, vocab_size, shape), follower[text[..., n]])
    return {"tokens": text[..., :-1], "labels": text[..., 1:]}
