"""The same GPT in PyTorch, cut into stages for ``torch.distributed.pipelining``.

Shapes: B batch, L length, D model width, H heads, K head width, V vocabulary. A linear's weight is ``[out, in]`` here
and ``[in, out]`` in the canonical parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble
from torch.nn import functional

from vocabpp_jax.schedules.layers import even_split

NORM_EPSILON = 1e-5
SCHEDULES = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved-1f1b": ScheduleInterleaved1F1B,
    "v-zb": ScheduleZBVZeroBubble,
}
"""PyTorch's schedules by our names; the last is its zero-bubble V."""


@dataclass(frozen=True)
class Shape:
    """The model dimensions that the module needs."""

    layers: int
    hidden: int
    heads: int
    vocab_size: int


class Block(nn.Module):
    """One pre-norm layer: ``x [B, L, D] -> [B, L, D]``."""

    def __init__(self, shape: Shape):
        super().__init__()
        D = shape.hidden
        self.heads = shape.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(D, NORM_EPSILON), nn.LayerNorm(D, NORM_EPSILON)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        B, L, D = x_BLD.shape
        qkv_3BHLK = (
            self.qkv(self.attention_norm(x_BLD)).view(B, L, self.heads, 3, D // self.heads).permute(3, 0, 2, 1, 4)
        )
        a_BHLK = functional.scaled_dot_product_attention(*qkv_3BHLK, is_causal=True)
        x_BLD = x_BLD + self.out(a_BHLK.transpose(1, 2).reshape(B, L, D))
        return x_BLD + self.down(functional.gelu(self.up(self.mlp_norm(x_BLD)), approximate="tanh"))


class Stage(nn.Module):
    """Consecutive layers, with the embedding on the first stage and the head on the last.

    Parameters are loaded from the canonical ones by path; the rest of the model is not created.
    """

    def __init__(self, shape: Shape, weights: Mapping[str, np.ndarray], stage: int, stages: int):
        super().__init__()
        counts = even_split(shape.layers, stages)
        first = sum(counts[:stage])
        self.tokens = self.positions = self.head = None
        if stage == 0:
            self.tokens = nn.Embedding.from_pretrained(_tensor(weights["embed.tokens"]), freeze=False)
            self.positions = nn.Parameter(_tensor(weights["embed.positions"]))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(counts[stage]))
        for n, block in enumerate(self.blocks, first):
            _load_block(block, weights, f"blocks.{n}")
        if stage == stages - 1:
            if "head" not in weights:
                raise ValueError("tie_embeddings is set; torch.distributed.pipelining cannot tie two stages' weights")
            self.final = nn.LayerNorm(shape.hidden, NORM_EPSILON)
            _load(self.final, weights, "final")
            self.head = nn.Linear(shape.hidden, shape.vocab_size, bias=False)
            self.head.weight = nn.Parameter(_tensor(weights["head"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tokens is not None:
            x = self.tokens(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(self.final(x))


def token_loss(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of a microbatch; the schedules divide by the number of microbatches."""
    return functional.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten())


def pipeline(
    name: str, shape: Shape, weights: Mapping[str, np.ndarray], m: int, rank: int, p: int, device: torch.device
) -> tuple[object, list[Stage]]:
    """This rank's stages and the schedule that runs them.

    Raises:
        ValueError: a schedule that PyTorch does not have, or too few layers for its stages.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}; PyTorch's are {', '.join(SCHEDULES)}")
    chunks = 1 if name in ("gpipe", "1f1b") else 2
    stages = p * chunks
    if shape.layers < stages:
        raise ValueError(f"layers is {shape.layers}; {name} on {p} devices has {stages} stages, and each needs one")
    mine = [rank, stages - 1 - rank] if name == "v-zb" else [rank + p * c for c in range(chunks)]
    modules = [Stage(shape, weights, stage, stages).to(device) for stage in mine]
    made = [PipelineStage(module, stage, stages, device) for stage, module in zip(mine, modules, strict=True)]
    return SCHEDULES[name](made[0] if chunks == 1 else made, m, loss_fn=token_loss), modules


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def _load(module: nn.Linear | nn.LayerNorm, weights: Mapping[str, np.ndarray], path: str) -> None:
    linear = isinstance(module, nn.Linear)
    weight = weights[f"{path}.kernel"].T if linear else weights[f"{path}.scale"]
    module.weight = nn.Parameter(_tensor(np.ascontiguousarray(weight)))
    module.bias = nn.Parameter(_tensor(weights[f"{path}.bias"]))


def _load_block(block: Block, weights: Mapping[str, np.ndarray], path: str) -> None:
    for module, name in (
        (block.attention_norm, "attention.norm"),
        (block.qkv, "attention.qkv"),
        (block.out, "attention.out"),
        (block.mlp_norm, "mlp.norm"),
        (block.up, "mlp.up"),
        (block.down, "mlp.down"),
    ):
        _load(module, weights, f"{path}.{name}")
