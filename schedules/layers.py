"""Transformer layers per stage for method redis, where the LM head counts as several layers.

Relative to a GPT layer's forward FLOPs ``bsh (24h + 4s)``, the head's ``2bshV`` are ``rho = 6V / (72h + 12s)`` layers.
The embedding costs next to nothing.
"""

from __future__ import annotations

from math import ceil


def head_in_layers(hidden: int, seq_length: int, vocab_size: int) -> float:
    """``rho`` of a GPT: the FLOPs of the LM head over those of one layer."""
    return 6 * vocab_size / (72 * hidden + 12 * seq_length)


def even_split(layers: int, stages: int, depths: int = 0) -> tuple[int, ...]:
    """The same number for every stage; the last stages get the extra ones.

    Each depth of a tail, which is on the last stage (see :attr:`.Schedule.depths`), counts as one of its layers.
    """
    if stages < 1 or layers < 0:
        raise ValueError(f"layers is {layers} and stages {stages}; give 0 layers or more and 1 stage or more")
    last = max(0, -(-(layers + depths) // stages) - depths)
    if stages == 1 or last > layers:
        return (*(0,) * (stages - 1), layers)
    others, rest = stages - 1, layers - last
    return (*(rest // others + (stage >= others - rest % others) for stage in range(others)), last)


def published_split(layers: int, stages: int, rho: float) -> tuple[int, ...]:
    """The split of the published experiments: ``max(0, ceil((L + rho) / p - rho))`` layers on the last stage."""
    return _with_last(layers, stages, min(layers, max(0, ceil((layers + rho) / stages - rho))))


def optimal_split(layers: int, stages: int, rho: float) -> tuple[int, ...]:
    """The split whose slowest stage has the fewest FLOPs; among those, the most even one."""

    def cost(split: tuple[int, ...]) -> tuple[float, float]:
        loads = [*split[:-1], split[-1] + rho]
        return max(loads), sum(load * load for load in loads)

    return min((_with_last(layers, stages, last) for last in range(layers + 1)), key=cost)


SPLITS = {"published": published_split, "optimal": optimal_split}


def redistributed(rule: str, *, layers: int, stages: int, rho: float) -> tuple[int, ...]:
    """Layers of every stage for method redis, by a rule of :data:`SPLITS`; ``rho`` is the head's FLOPs in layers."""
    if stages < 1:
        raise ValueError(f"stages is {stages}; a pipeline needs at least 1 device")
    return SPLITS[rule](layers, stages, rho)


def _with_last(layers: int, stages: int, last: int) -> tuple[int, ...]:
    return (layers,) if stages == 1 else (*even_split(layers - last, stages - 1), last)
