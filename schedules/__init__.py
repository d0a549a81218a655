"""Pipeline schedules as data, and their lowering to one program. Pure Python; knows no jax."""

from .blocks import Block
from .build import METHODS, SCHEDULES, build, evaluation, methods_of, repeat
from .program import Instruction, Program, Segment, lower
from .schedule import Pass, Schedule, Step, Vocabulary

__all__ = ["METHODS", "SCHEDULES", "Block", "Instruction", "Pass", "Program", "Schedule", "Segment", "Step",
           "Vocabulary", "build", "evaluation", "lower", "methods_of", "repeat"]
