"""Settings of ``xla_gpu_enable_command_buffer``: what runs as CUDA graphs."""

from __future__ import annotations

from typing import Any

_KINDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
SETTINGS: dict[str, str | None] = {"default": None, "none": "", "loops": f"{_KINDS},WHILE,CONDITIONAL"}
"""jaxlib's default, no graphs, and graphs that also contain loops."""


def command_buffers(setting: str) -> dict[str, Any]:
    """The compiler options of a setting."""
    value = SETTINGS[setting]
    return {} if value is None else {"xla_gpu_enable_command_buffer": value}
