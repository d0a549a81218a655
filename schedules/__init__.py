"""Pipeline schedules as data, and their lowering to one program. Pure Python; knows no jax."""

from .blocks import Block
from .build import METHODS, SCHEDULES, build, evaluation, methods_of, repeat
from .check import ScheduleError, check
from .layers import even_split, head_in_layers, optimal_split, published_split
from .lowering.check_program import check_program
from .lowering.program import Instruction, Program, Segment, lower
from .orders import from_orders
from .place import place
from .reorder import reorder
from .schedule import Pass, Schedule, Step, Vocabulary
from .simulation.simulator import COMPILED, FREE, ON_CPUS, Durations, Rules, simulate
from .simulation.timeline import Timeline
from .vocabulary import sums_before_T

__all__ = [
    "COMPILED",
    "FREE",
    "METHODS",
    "ON_CPUS",
    "SCHEDULES",
    "Block",
    "Durations",
    "Instruction",
    "Pass",
    "Program",
    "Rules",
    "Schedule",
    "ScheduleError",
    "Segment",
    "Step",
    "Timeline",
    "Vocabulary",
    "build",
    "check",
    "check_program",
    "evaluation",
    "even_split",
    "from_orders",
    "head_in_layers",
    "lower",
    "methods_of",
    "optimal_split",
    "place",
    "published_split",
    "reorder",
    "repeat",
    "simulate",
    "sums_before_T",
]
