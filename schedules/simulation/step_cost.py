"""The cost of a whole training step on three mesh axes: ``pipe``, ``tensor`` within a stage, ``data`` for copies.

:mod:`.cost` covers only the passes of a pipeline. Here a layer's matrices are sharded over ``tensor``, which sums the
stream twice in a layer's forward and twice in its backward; gradients are summed over ``data`` once per step; and the
optimizer reads and writes all of the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..schedule import Schedule
from .cost import GPU, Cost, stage_layers
from .simulator import Durations

OPTIMIZER_BYTES = 40.0
"""Bytes moved per parameter, once per step: gradient, weight and both moments read, the last three written (28), the
gradient read once for its norm and zeroed (8), the copy in the compute dtype written and read (4)."""
SHARDED_BYTES = 28.0
"""The part of them that optimizer sharding divides by the data axis."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step's passes, sums and update.

    Attributes:
        cost: of the whole model on one GPU.
        tensor, data: sizes of those axes. Devices along ``tensor`` are neighbors, then come the stages, then the
            copies.
        shard_optimizer: whether master weights and moments are sharded over ``data``.
        recompute: whether a backward first recomputes all of a layer's forward.
        share: each ``tensor`` device's share of a layer's elementwise traffic: 1/tensor if all of it is sharded.
    """

    cost: Cost
    tensor: int = 1
    data: int = 1
    shard_optimizer: bool = False
    recompute: bool = False
    share: float = 1.0

    @cached_property
    def _local(self) -> Cost:
        """One device's part of a layer; its pipeline neighbors are ``tensor`` devices away."""
        z, gpu = self.cost.sizes, self.cost.gpu
        part = replace(z, matrices=-(-z.layer_parameters // self.tensor), attended=z.scores / z.tokens / self.tensor)
        near = replace(
            gpu,
            gpus_per_node=max(1, gpu.gpus_per_node // self.tensor),
            layer_traffic=gpu.layer_traffic * self.share,
        )
        return replace(self.cost, sizes=part, gpu=near)

    def durations(self, schedule: Schedule) -> Durations:
        """Seconds of every pass, transfer and collective of a schedule."""
        found = self._local.durations(schedule)
        z, gpu, T, p = self.cost.sizes, self.cost.gpu, self.tensor, schedule.p
        counts = np.asarray(stage_layers(schedule, z.layers), float)
        sums = counts * self._layer_sums
        again = counts * self._local.layer()[0] + sums if self.recompute else 0.0 * counts
        more = {"F": sums, "B": sums + again, "W": again if schedule.splits_backward else 0.0 * counts}
        found = replace(found, **{name: tuple(np.add(getattr(found, name), x).tolist()) for name, x in more.items()})
        found = replace(found, transfer=self._transfers(schedule))
        if T == 1 or not schedule.sharded:
            return found
        stream, vector = 2 * z.bsh, 4 * z.tokens
        rows = -(-z.vocab_size // (p * T))
        return replace(
            found,
            **self.cost.vocabulary(rows, early=schedule.sums_before_T),
            embed_sum=gpu.all_reduce(stream, p * T),
            grad_sum=gpu.all_reduce(stream, p * T),
            max=gpu.all_reduce(vector, p * T),
            stats=gpu.all_reduce(3 * vector, p * T),
        )

    def tensor_sums(self, schedule: Schedule) -> float:
        """Seconds of a microbatch's sums over ``tensor``, averaged over devices; nothing overlaps with them."""
        times = (2 + self.recompute * (2 if schedule.splits_backward else 1)) * self.cost.sizes.layers / schedule.p
        return times * self._layer_sums

    @property
    def _layer_sums(self) -> float:
        """Seconds of the two sums in a layer's forward, and of those in its backward."""
        return 2 * self.cost.gpu.all_reduce(2 * self.cost.sizes.bsh, self.tensor)

    def _transfers(self, schedule: Schedule) -> tuple[tuple[float, ...], ...]:
        """Transfer times of every pair of stages, in the copy in which they are furthest apart."""
        z, gpu, T = self.cost.sizes, self.cost.gpu, self.tensor
        devices = np.arange(self.data * schedule.p).reshape(self.data, schedule.p) * T
        nodes = devices // gpu.gpus_per_node
        apart = (nodes[:, :, None] != nodes[:, None, :]).any(axis=0)
        inside, between = gpu.send(2 * z.bsh, 0, 0), gpu.send(2 * z.bsh, 0, gpu.gpus_per_node)
        return tuple(map(tuple, np.where(apart, between, inside).tolist()))

    def gradient_sums(self, parameters: float, p: int) -> float:
        """Seconds to sum the float32 gradients of a device's parameters over ``data``, after the last of them; with
        optimizer sharding, to reduce-scatter the gradients and all-gather the weights in two bytes."""
        bytes_moved = parameters * ((4 + 2) / 2 if self.shard_optimizer else 4)
        return _strided(self.cost.gpu, self.data, p * self.tensor).all_reduce(bytes_moved, self.data)

    def update(self, parameters: float) -> float:
        """Seconds of the optimizer, the gradient norm and the cast of the weights."""
        divided = SHARDED_BYTES * (1 - 1 / self.data) if self.shard_optimizer else 0.0
        return self.cost.gpu.traffic((OPTIMIZER_BYTES - divided) * parameters)


def _strided(gpu: GPU, members: int, stride: int) -> GPU:
    """The GPU as seen by a group whose members are ``stride`` devices apart.

    Fewer members are in one node, and they share its network adapters with the other groups, each of which has as many.
    """
    there = max(1, gpu.gpus_per_node // stride)
    between = min(gpu.intra_bandwidth, gpu.inter_bandwidth * min(there, members))
    return replace(gpu, gpus_per_node=there, inter_bandwidth=between)
