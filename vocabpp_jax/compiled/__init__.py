"""What a compiler makes of a train step for GPUs that need not be there: memory, copies, overlap."""

from ..pipeline.flags import FLAGS
from .hlo import Collective, Copy, Loop, instruction_count, loops
from .target import UnsupportedTarget, compile_step, devices
from .usage import StateBytes, state_bytes, used_bytes

__all__ = [
    "FLAGS",
    "Collective",
    "Copy",
    "Loop",
    "StateBytes",
    "UnsupportedTarget",
    "compile_step",
    "devices",
    "instruction_count",
    "loops",
    "state_bytes",
    "used_bytes",
]
