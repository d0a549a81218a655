"""A planning request, and the enumeration of all choices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..pipeline.model_interface import Model
from ..schedules import METHODS, SCHEDULES, methods_of
from ..schedules import build as build_schedule
from ..schedules.layers import redistributed
from ..schedules.schedule import MOST_PASSES, Schedule
from ..schedules.simulation.cost import GPU, Sizes
from .layer_parts import LayerPart, layer_part

RESIDUALS = ("selective", "full")
"""What a layer may keep for its backward. ``everything`` is left out: it saves no matrix product and moves the bytes
that ``selective`` recomputes."""


@dataclass(frozen=True)
class Choice:
    """One way to train: the model's layout over the devices, the order of work, and what the backward keeps."""

    stages: int
    tensor: int
    data: int
    schedule: str
    method: str
    chunks: int | None
    microbatch_size: int
    residuals: str
    shard_optimizer: bool

    def __str__(self) -> str:
        chunks = f" of {self.chunks} chunks" if self.chunks else ""
        sharded = ", optimizer sharded" if self.shard_optimizer else ""
        return (
            f"{self.stages} × {self.tensor} × {self.data}, {self.schedule}{chunks}, {self.method}, microbatches of "
            f"{self.microbatch_size}, residuals {self.residuals}{sharded}"
        )

    def differs(self, other: Choice) -> tuple[str, ...]:
        """What differs: field names, with stages, tensor and data counted as one, as are schedule and chunks."""
        mine, its = self._parts, other._parts
        return tuple(name for name in mine if mine[name] != its[name])

    @property
    def _parts(self) -> dict[str, Any]:
        own = asdict(self)
        layout = tuple(own.pop(name) for name in ("stages", "tensor", "data"))
        return {"layout": layout, "schedule": (own.pop("schedule"), own.pop("chunks"))} | own


@dataclass(frozen=True)
class Request:
    """A model, the GPUs to train it on, and the batch of a step.

    Attributes:
        sizes: the model's dimensions, for microbatches of one sequence.
        models: the model as a pipeline sees it, by residuals choice.
        dtype: the compute dtype.
        gpu, gpus: the kind of GPU, and how many.
        memory_bytes: per GPU, for the compiled program.
        global_batch: sequences per step, over all data-parallel copies.
        max_tensor: the largest tensor axis; it never leaves a node.
        schedules, methods, microbatch_sizes, stages: the options to choose from; () allows everything for the last two.
        shard_optimizer: whether a choice may shard master weights and moments over ``data``.
        redis_split: a rule of :data:`vocabpp_jax.schedules.layers.SPLITS`.

    Raises:
        ValueError: a number below 1, or an unknown name.
    """

    sizes: Sizes
    models: Mapping[str, Model]
    dtype: str
    gpu: GPU
    gpus: int
    memory_bytes: float
    global_batch: int
    max_tensor: int = 8
    schedules: tuple[str, ...] = SCHEDULES
    methods: tuple[str, ...] = METHODS
    microbatch_sizes: tuple[int, ...] = ()
    stages: tuple[int, ...] = ()
    shard_optimizer: bool = True
    redis_split: str = "optimal"

    def __post_init__(self) -> None:
        for name in ("gpus", "global_batch", "max_tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("microbatch_sizes", "stages"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} has {min(getattr(self, name))}; each must be at least 1")
        if self.model.tail:
            raise ValueError(
                f"mtp_depth is {self.model.tail.depths}; the planner only supports models that predict the next token"
            )
        if not self.memory_bytes > 0:
            raise ValueError(f"memory is {self.memory_bytes}; it must be above 0")
        for name, names in (("schedules", SCHEDULES), ("methods", METHODS)):
            for value in getattr(self, name):
                if value not in names:
                    raise ValueError(f"{name} has {value!r}; they are {', '.join(names)}")

    @property
    def model(self) -> Model:
        """The model, with any residuals choice."""
        return next(iter(self.models.values()))

    def microbatches(self, choice: Choice) -> int:
        """Microbatches per step."""
        return self.global_batch // (choice.data * choice.microbatch_size)

    def schedule(self, choice: Choice, m: int) -> Schedule:
        """The schedule of a choice for ``m`` microbatches, its block repeated."""
        return build_schedule(**self.arguments(choice, m))

    def arguments(self, choice: Choice, m: int) -> dict[str, Any]:
        """The arguments of :func:`vocabpp_jax.schedules.build` for a choice."""
        return {
            "schedule": choice.schedule,
            "method": choice.method,
            "p": choice.stages,
            "m": m,
            "chunks": choice.chunks,
            "layer_counts": self.layer_counts(choice),
            "overlap": self.gpu.overlaps,
        }

    def layer_counts(self, choice: Choice) -> tuple[int, ...] | None:
        """Layers of every stage where they are uneven: with method redis."""
        if choice.method != "redis":
            return None
        z = self.sizes
        return redistributed(self.redis_split, layers=z.layers, stages=choice.stages, rho=z.ends_in_layers)

    def layer_part(self, tensor: int, residuals: str, split: bool) -> LayerPart:
        """What one of ``tensor`` devices holds of a layer."""
        platform = "gpu" if self.gpu.overlaps else "cpu"
        return layer_part(self.models[residuals], self.sizes.seq, self.dtype, tensor, split, platform)

    # --- enumeration -------------------------------------------------------------------------------------------------

    def choices(self) -> list[Choice]:
        """Everything that can run, whether or not it fits.

        Raises:
            ValueError: nothing can.
        """
        found = [
            Choice(*layout, *order, size, residuals, sharded)
            for layout in self.layouts()
            for size in self._sizes(layout[2])
            if layout[0] * (self.global_batch // (layout[2] * size)) <= MOST_PASSES
            for order in self._orders(layout[0])
            for residuals in self.models
            for sharded in ((False, True) if layout[2] > 1 and self.shard_optimizer else (False,))
        ]
        if not found:
            raise ValueError(self._why_nothing())
        return found

    def layouts(self) -> list[tuple[int, int, int]]:
        """Stages, tensor, data: all triples whose product is the number of GPUs, with at least one layer per stage."""
        node = self.gpu.gpus_per_node
        tensors = [T for T in _divisors(self.gpus) if T <= self.max_tensor and node % T == 0 and self._splits(T)]
        found = [(p, T, self.gpus // (p * T)) for T in tensors for p in _divisors(self.gpus // T)]
        return [(p, T, d) for p, T, d in found if p <= self.sizes.layers and p in (self.stages or (p,))]

    def _splits(self, tensor: int) -> bool:
        split = self.model.tensor
        return tensor == 1 or (split is not None and split.parts % tensor == 0)

    def _sizes(self, data: int) -> tuple[int, ...]:
        """Microbatch sizes with which ``data`` copies divide the batch: powers of two, unless they are given."""
        each, rest = divmod(self.global_batch, data)
        powers = tuple(2**n for n in range(7))
        return () if rest else tuple(size for size in self.microbatch_sizes or powers if each % size == 0)

    def _orders(self, stages: int) -> Iterator[tuple[str, str, int | None]]:
        """Schedule, method and chunks."""
        layers = self.sizes.layers
        for name in self.schedules:
            interleaved = name == "interleaved-1f1b"
            chunks = [c for c in (2, 3, 4, 6, 8) if c * stages <= layers] if interleaved else [None]
            if name.startswith("v-") and 2 * stages > layers or stages == 1 and name != "1f1b":
                continue
            for method, count in itertools.product((m for m in self.methods if m in methods_of(name)), chunks):
                if stages > 1 or method == "baseline":
                    yield name, method, count

    def _why_nothing(self) -> str:
        """What is wrong, and the nearest request that would do."""
        layers, layouts = self.sizes.layers, self.layouts()
        if not layouts:
            possible = [n for n in range(1, self.gpus) if replace(self, gpus=n).layouts()]
            nearest = f"; the nearest number below is {possible[-1]}" if possible else ""
            return (
                f"gpus is {self.gpus}; no stages of {layers} layers, times a tensor axis that divides "
                f"{getattr(self.model.tensor, 'parts', 1)} heads and a node of {self.gpu.gpus_per_node}, times copies "
                f"use all of them{nearest}"
            )
        ways = sorted({d for _, _, d in layouts})
        if not any(self._sizes(d) for d in ways):
            smallest = self.microbatch_sizes or (1,)
            steps = [d * size for d in ways for size in smallest]
            nearest = min((max(1, round(self.global_batch / n)) * n for n in steps), key=self._distance)
            sizes = f" times microbatches of {', '.join(map(str, smallest))}" if self.microbatch_sizes else ""
            return (
                f"global_batch is {self.global_batch}; on {self.gpus} GPUs the copies of the model are "
                f"{', '.join(map(str, ways))}{sizes}, and none divides it; the nearest batch that one divides is "
                f"{nearest}"
            )
        return (
            f"schedules is {' '.join(self.schedules)} and methods {' '.join(self.methods)}; none runs on "
            f"{', '.join(str(p) for p in sorted({p for p, _, _ in layouts}))} stages of {layers} layers: give more"
        )

    def _distance(self, batch: int) -> int:
        return abs(batch - self.global_batch)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
