"""What XLA makes of a run's programs, for GPUs that need not be present: memory, copies, overlap."""

from ..pipeline.flags import FLAGS
from .hlo import Collective, Copy, Loop, instruction_count, loops, starts_late
from .programs import PROGRAMS, ProgramReport, Programs
from .target import UnsupportedTarget, devices
from .usage import StateBytes, state_bytes, used_bytes

__all__ = [
    "FLAGS",
    "Collective",
    "Copy",
    "Loop",
    "PROGRAMS",
    "ProgramReport",
    "Programs",
    "StateBytes",
    "UnsupportedTarget",
    "devices",
    "instruction_count",
    "loops",
    "starts_late",
    "state_bytes",
    "used_bytes",
]
