"""Costs of passes: FLOPs, bytes, and seconds on a GPU from a roofline with few constants.

Symbols as in :mod:`.dimensions`, plus ``p`` devices and ``m`` microbatches. FLOPs count causal attention in full;
seconds count only the causal half. These are estimates for planning; for a run's actual memory ask the compiler.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..layers import even_split
from ..schedule import Schedule
from .dimensions import Sizes
from .durations import Durations
from .timeline import Timeline

GPUS = Path(__file__).parent / "gpus"


@dataclass(frozen=True)
class GPU:
    """A GPU and its network; the files in ``gpus/`` explain the fields. Units: FLOP/s, bytes, seconds."""

    name: str
    peak_flops: float
    memory_bytes: float
    memory_bandwidth: float
    gpus_per_node: int
    matmul_efficiency: float
    half_size: float
    attention_efficiency: float
    traffic_efficiency: float
    layer_traffic: float
    logit_traffic: float
    edge_traffic: float
    weight_traffic: float
    launch: float
    overhead: float
    contention: float
    intra_bandwidth: float
    inter_bandwidth: float
    intra_latency: float
    inter_latency: float
    target: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    """The compiler's description of it: a GpuTargetConfigProto as a table."""
    overlaps: bool = True
    """Whether collectives overlap with passes; on CPUs they do not."""

    def matmul(self, flops: float, smallest: float) -> float:
        """Seconds of matrix products with this many FLOPs and this smallest dimension."""
        reached = self.matmul_efficiency * smallest / (smallest + self.half_size)
        return flops / (self.peak_flops * reached) if flops else 0.0

    def traffic(self, bytes_moved: float) -> float:
        """Seconds to read and write this many bytes."""
        return bytes_moved / (self.memory_bandwidth * self.traffic_efficiency)

    def send(self, size: float, source: int, target: int) -> float:
        """Seconds to send ``size`` bytes from one device to another."""
        if source // self.gpus_per_node == target // self.gpus_per_node:
            return self.intra_latency + size / self.intra_bandwidth
        return self.inter_latency + size / self.inter_bandwidth

    def broadcast(self, size: float, p: int) -> float:
        """Seconds for ``size`` bytes to reach all ``p`` devices, in a pipelined chain."""
        latency, bandwidth = self._ring(p)
        return latency + size / bandwidth if p > 1 else 0.0

    def all_reduce(self, size: float, p: int) -> float:
        """Seconds to sum ``size`` bytes over ``p`` devices, in a ring: every byte crosses each link about twice."""
        latency, bandwidth = self._ring(p)
        return 2 * latency + 2 * (p - 1) / p * size / bandwidth if p > 1 else 0.0

    def _ring(self, p: int) -> tuple[float, float]:
        nodes = -(-p // self.gpus_per_node)
        hops = min(p, self.gpus_per_node) - 1
        bandwidth = self.intra_bandwidth if nodes == 1 else min(self.inter_bandwidth, self.intra_bandwidth)
        # NCCL's latency grows with the ring, by a fraction of a message's own latency per additional device.
        return self.intra_latency * (1 + 0.1 * hops) + self.inter_latency * (nodes - 1) * 0.5, bandwidth


def gpu_names() -> tuple[str, ...]:
    """The GPUs that have a file."""
    return tuple(sorted(path.stem for path in GPUS.glob("*.toml")))


_MAY_BE_ZERO = ("half_size", "weight_traffic", "launch", "overhead", "contention", "intra_latency", "inter_latency")


def load_gpu(name: str) -> GPU:
    """A GPU by name or name prefix, or from your own file like those in ``schedules/simulation/gpus``.

    Raises:
        ValueError: no such GPU, or a file with a missing or unknown field.
    """
    known = [gpu for gpu in gpu_names() if name and gpu.startswith(name.lower())]
    path = Path(name) if name.endswith(".toml") else GPUS / f"{known[0] if len(known) == 1 else name.lower()}.toml"
    if not path.is_file():
        raise ValueError(f"gpu is {name!r}; it must be one of {', '.join(gpu_names())}, or a .toml file like theirs")
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ValueError(f"{path} is not TOML: {problem}") from None
    known = {f.name for f in fields(GPU)}
    needed = {f.name for f in fields(GPU) if f.default_factory is MISSING and f.default is MISSING}
    if wrong := sorted((needed - set(values)) | (set(values) - known)):
        raise ValueError(
            f"{path} {'lacks' if wrong[0] in known else 'has the unknown field'} {wrong[0]!r}; "
            f"the fields are {', '.join(f.name for f in fields(GPU))}"
        )
    for f in fields(GPU):
        value, least = values.get(f.name), 0 if f.name in _MAY_BE_ZERO else 1e-30
        if f.type == "float" and not (type(value) in (int, float) and least <= value < math.inf):
            raise ValueError(
                f"{path} has {f.name} {value!r}; it must be a number {'of 0 or more' if least == 0 else 'above 0'}"
            )
        if f.type == "int" and not (type(value) is int and value > 0):
            raise ValueError(f"{path} has {f.name} {value!r}; it must be a whole number above 0")
        if f.type == "bool" and not isinstance(values.get(f.name, True), bool):
            raise ValueError(f"{path} has {f.name} {value!r}; it must be true or false")
    return GPU(**values)


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of a model's passes on a GPU.

    Attributes:
        sizes, gpu: the model and the GPU.
        activation_bytes: residuals from F to B, per layer and bsh element: None if norms and activation functions are
            recomputed (what the sizes say, two bytes per element), 34 as in Megatron without recomputation (Korthikanti
            et al. 2022, with flash attention).
        state_bytes: per parameter: weight, gradient, and Adam state together.
        table_bytes: bytes that IB moves per embedding element, in frameworks that add a dense gradient to the
            accumulated one: 8 in float32. A scatter-add of the rows in use moves none.
    """

    sizes: Sizes
    gpu: GPU
    activation_bytes: float | None = None
    state_bytes: float = 18.0
    table_bytes: float = 0.0

    # --- seconds ------------------------------------------------------------------------------------------------------

    def layer(self) -> tuple[float, float, float]:
        """Seconds of one layer's forward, input gradient and weight gradient."""
        z, gpu = self.sizes, self.gpu
        products = gpu.matmul(2 * z.tokens * z.layer_parameters, min(z.hidden, z.tokens))
        attention = 2 * z.scores / (gpu.peak_flops * gpu.attention_efficiency)
        traffic = gpu.traffic(gpu.layer_traffic * z.bsh)
        # Flash attention's backward recomputes the scores: 2.5 times the forward.
        weights = products + 0.5 * traffic + gpu.traffic(gpu.weight_traffic * z.layer_parameters)
        return products + attention + traffic, products + 2.5 * attention + 1.5 * traffic, weights

    def depth(self) -> tuple[float, float, float]:
        """Seconds of one depth of the tail, like :meth:`layer`."""
        z, gpu = self.sizes, self.gpu
        product = gpu.matmul(2 * z.tokens * z.projection_parameters, min(z.hidden, z.tokens))
        edge = gpu.traffic(gpu.edge_traffic * z.bsh)
        weights = product + gpu.traffic(gpu.weight_traffic * z.projection_parameters)
        return tuple(x + y for x, y in zip(self.layer(), (product + edge, product + edge, weights), strict=True))

    def stages(self, schedule: Schedule) -> np.ndarray:
        """Seconds of every stage's forward, input gradient and weight gradient, ``[3, stages]``."""
        z = self.sizes
        counts = np.asarray(stage_layers(schedule, z.layers, z.depths), float)
        times = np.multiply.outer(self.layer(), counts)
        times[:, -1] += z.depths * np.asarray(self.depth())
        return times

    def head(self, rows: float) -> float:
        """Seconds of a third of the LM head's products, 2bsh per row, for ``rows`` rows and all streams."""
        z = self.sizes
        return self.gpu.matmul(2 * z.streams * z.bsh * rows, min(z.hidden, rows, z.tokens))

    def vocabulary(self, rows: int, *, early: bool) -> dict[str, float]:
        """Seconds of the vocabulary passes over ``rows`` rows; with ``early``, S computes the input gradient (Algorithm
        2) instead of T."""
        z, gpu = self.sizes, self.gpu
        softmax = gpu.traffic(gpu.logit_traffic * z.streams * z.tokens * rows / 2)
        input_edge = gpu.traffic(gpu.edge_traffic * z.bsh) + gpu.launch
        edge = gpu.traffic(gpu.edge_traffic * z.streams * z.bsh) + gpu.launch
        product, in_S = self.head(rows), 2 if early else 1
        return {
            "S": in_S * product + softmax + edge,
            "T": (3 - in_S) * product + softmax + edge,
            "S1": product + softmax / 2 + edge / 2,
            "S2": softmax / 2 + edge / 2,
            "H": 3 * product + 2 * softmax + 2 * edge,
            "G": edge / 2,
            "IF": input_edge / 2,
            "IB": input_edge + gpu.traffic(self.table_bytes * z.hidden * rows),
        }

    def durations(self, schedule: Schedule) -> Durations:
        """Seconds of every pass, transfer and collective of a schedule."""
        z, gpu, p = self.sizes, self.gpu, schedule.p
        forward, inputs, weights = self.stages(schedule)
        B = inputs if schedule.splits_backward else inputs + weights
        rows = z.vocab_size if not schedule.sharded else -(-z.vocab_size // p)
        # Collectives that overlap with passes slow them down; synchronous ones do not.
        slower = 1 + gpu.contention * (p > 1 and schedule.sharded and schedule.method != "interlaced")
        stream = 2 * z.bsh
        vector = 4 * z.streams * z.tokens
        first, last = schedule.placement[0], schedule.placement[-1]
        # The tail's gradients for the embedding go to the first stage's device before they are broadcast.
        more = gpu.send(stream, last, first) if z.depths and first != last else 0.0
        return Durations(
            F=tuple(slower * (forward + gpu.launch)),
            B=tuple(slower * (B + gpu.launch)),
            W=tuple(slower * (weights + gpu.launch)),
            **self.vocabulary(rows, early=schedule.sums_before_T),
            embed_sum=gpu.all_reduce(stream, p),
            hidden_broadcast=gpu.broadcast(z.streams * stream, p),
            embed_grad_broadcast=gpu.broadcast(stream, p) + more,
            grad_sum=gpu.all_reduce(z.streams * stream, p),
            max=gpu.all_reduce(vector, p),
            stats=gpu.all_reduce(3 * vector, p),
            transfer=tuple(tuple(gpu.send(stream, a, b) for b in range(p)) for a in range(p)),
            overhead=gpu.overhead,
        )

    def mfu(self, m: int, p: int, seconds: float) -> float:
        """Model FLOPs utilization of an iteration on ``p`` GPUs, 0 to 1."""
        return self.sizes.iteration_flops(m) / (seconds * p * self.gpu.peak_flops)

    # --- bytes --------------------------------------------------------------------------------------------------------

    def cell_bytes(self, schedule: Schedule) -> dict[str, float]:
        """Bytes of one cell of every ring, for the stage with the most layers."""
        z = self.sizes
        layers = max(stage_layers(schedule, z.layers, z.depths))
        kept = 2.0 * z.kept_elements if self.activation_bytes is None else self.activation_bytes * z.bsh
        stream = 2.0 * z.bsh
        logits = 2 * z.tokens * -(-z.vocab_size // schedule.p)
        gradient = stream if schedule.sums_before_T else 0
        ends = {"inbox": stream, "outbox": stream, "X": z.streams * stream, "P": z.streams * (logits + gradient)}
        of_tail = self._stored(schedule, z.depths * (kept + 2 * stream), z.depths)
        ends |= {"ahead": stream, "behind": stream, "streams": z.depths * stream, "returned": z.depths * stream}
        return self._stored(schedule, kept * layers, layers) | ends | {f"tail_{k}": n for k, n in of_tail.items()}

    def _stored(self, schedule: Schedule, activations: float, layers: int) -> dict[str, float]:
        if not schedule.splits_backward:
            return {"residual": activations}
        # W mostly reads the inputs of the linear layers; dY of each comes from B.
        return {
            "residual": 0.25 * activations,
            "kept": 0.75 * activations,
            "carried": 18.0 * self.sizes.bsh * layers,
        }

    def state(self, schedule: Schedule) -> tuple[float, ...]:
        """Bytes of parameters, gradients and optimizer state, per device."""
        z, p = self.sizes, schedule.p
        counts = stage_layers(schedule, z.layers, z.depths)
        parameters = [0.0] * p
        for stage, device in enumerate(schedule.placement):
            parameters[device] += counts[stage] * z.layer_parameters
        first, last = schedule.placement[0], schedule.placement[-1]
        parameters[last] += z.depths * (z.layer_parameters + z.projection_parameters)
        if schedule.sharded:
            tables = 1 if z.tied else 2
            parameters = [n + tables * z.table_parameters / p for n in parameters]
        else:
            parameters[first] += z.table_parameters
            if not (z.tied and first == last):
                parameters[last] += z.table_parameters
            if z.depths and not z.tied and first != last:
                parameters[last] += z.table_parameters  # the tail's copy of the embedding
        return tuple(self.state_bytes * n for n in parameters)

    def peak_bytes(self, timeline: Timeline) -> tuple[float, ...]:
        """Bytes per device: state, the peak of the rings, and an unsharded head's logits."""
        z, schedule = self.sizes, timeline.schedule
        rings = timeline.peak_bytes(self.cell_bytes(schedule))
        logits = 0.0 if schedule.sharded else 6.0 * z.tokens * z.vocab_size
        head = schedule.placement[-1]
        return tuple(
            state + ring + (logits if d == head else 0.0)
            for d, (state, ring) in enumerate(zip(self.state(schedule), rings, strict=True))
        )


def stage_layers(schedule: Schedule, layers: int, depths: int = 0) -> tuple[int, ...]:
    """Layers of every stage: the schedule's, else an even split.

    In an even split, later stages get the extra layers, and each of ``depths`` counts as a layer of the last stage.

    Raises:
        ValueError: the schedule's layers do not add up to the model's, or there are fewer layers than stages.
    """
    if schedule.layer_counts is not None:
        if sum(schedule.layer_counts) != layers:
            raise ValueError(f"layers is {layers}; the schedule's stages hold {sum(schedule.layer_counts)}")
        return tuple(schedule.layer_counts)
    if layers < schedule.stages - (depths > 0 and schedule.stages > 1):
        raise ValueError(f"layers is {layers}; the schedule has {schedule.stages} stages, and each needs one")
    return even_split(layers, schedule.stages, depths)
