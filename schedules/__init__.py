"""Pipeline schedules as data, and their lowering to one program. Pure Python, without jax."""

from .blocks import Block
from .build import METHODS, SCHEDULES, build, evaluation, methods_of
from .check import ScheduleError, check
from .fit import fit
from .instructions import COLLECTIVES, KINDS
from .layers import even_split, head_in_layers, optimal_split, published_split
from .lowering.check_program import check_program
from .lowering.program import Instruction, Program, Segment, lower
from .orders import from_orders
from .reorder import reorder
from .repeat import repeat
from .schedule import Order, Pass, Schedule, Step, Vocabulary
from .simulation.durations import Durations
from .simulation.simulator import COMPILED, FREE, GPU, ON_CPUS, Rules, simulate
from .simulation.timeline import Timeline

__all__ = [
    "COLLECTIVES",
    "COMPILED",
    "FREE",
    "GPU",
    "KINDS",
    "METHODS",
    "ON_CPUS",
    "SCHEDULES",
    "Block",
    "Durations",
    "Instruction",
    "Order",
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
    "fit",
    "from_orders",
    "head_in_layers",
    "lower",
    "methods_of",
    "optimal_split",
    "published_split",
    "reorder",
    "repeat",
    "simulate",
]
