"""Compile targets for GPUs that are not present."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from ..schedules.simulation.cost import GPU


class UnsupportedTarget(ValueError):
    """This machine cannot compile for the requested GPU."""


def devices(gpu: GPU, count: int) -> list[jax.Device]:
    """Descriptions of ``count`` GPUs in full nodes, to build a mesh from. Needs jax's GPU packages but no GPU.

    Raises:
        UnsupportedTarget: those packages are not installed, or the GPU's file does not describe it to a compiler.
        ValueError: ``count`` is more than one node, and the last node is not full.
    """
    nodes, rest = divmod(count, gpu.gpus_per_node)
    if nodes and rest:
        raise ValueError(
            f"stages times data_parallel is {count}; on {gpu.name} it must be below {gpu.gpus_per_node}, the GPUs of a "
            "node, or a multiple of that"
        )
    if not gpu.target:
        raise UnsupportedTarget(f"gpu is {gpu.name}; its file has no table [target], so nothing can be compiled for it")
    layout = f"1x{nodes}x{gpu.gpus_per_node}" if nodes else f"1x1x{count}"
    try:
        found = topologies.get_topology_desc(
            gpu.name.lower(), "cuda", target_config=_text(gpu.target), topology=layout
        ).devices
    except NotImplementedError as problem:
        raise UnsupportedTarget(
            f"compiling for {gpu.name} needs jax's GPU packages: pip install 'vocabpp-jax[cuda12]' ({problem})"
        ) from None
    except RuntimeError as problem:
        raise UnsupportedTarget(
            f"gpu is {gpu.name}; its file's table [target] must be XLA's GpuTargetConfigProto "
            f"({str(problem).splitlines()[0]})"
        ) from None
    return list(found)


def _text(table: Mapping[str, Any]) -> str:
    """A table as a protocol buffer in text form."""

    def field(name: str, value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{name} {{ {_text(value)} }}"
        return f'{name}: "{value}"' if isinstance(value, str) else f"{name}: {value}"

    return " ".join(field(name, value) for name, value in table.items())
