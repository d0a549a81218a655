"""The case of letters matters in no name."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import CheckpointOptions
from command_line.names import with_names
from command_line.options import ModelOptions
from command_line.parsing import parse
from simulate import SimulateOptions
from speed import SpeedOptions
from training_run.train_options import TrainOptions
from vocabpp_jax import models, schedules
from vocabpp_jax.schedules.simulation.cost import load_gpu
from vocabpp_jax.schedules.spelling import as_spelt

cases = st.lists(st.booleans(), min_size=20, max_size=20)


def in_case(name, upper):
    return "".join(c.upper() if up else c.lower() for c, up in zip(name, upper, strict=False)) + name[len(upper) :]


@given(st.sampled_from(sorted(models.SIZES)), cases)
def test_models(name, upper):
    assert models.named(in_case(name, upper)) == models.SIZES[name]


@given(st.sampled_from(schedules.SCHEDULES), st.sampled_from(["baseline", "vocab-1", "vocab-2"]), cases)
def test_schedules_and_methods(schedule, method, upper):
    built = schedules.build(in_case(schedule, upper), in_case(method, upper), p=2, m=2)
    assert built == schedules.build(schedule, method, p=2, m=2)


def test_gpus():
    assert load_gpu("A100-80G") == load_gpu("a100-80g") == load_gpu("A100")


def test_the_options_of_training_hold_names_as_they_are_spelt():
    line = "--model 4b --schedule V-Half --METHOD=x --dtype BFloat16 --residuals Full --redis-split Optimal"
    line = line.replace("--METHOD=x", "--method Vocab-1") + " --damaged_data=SKIP --data STDLIB"
    options = parse(TrainOptions, "", line.split())
    assert (options.model.model, options.model.dtype, options.model.residuals) == ("4B", "bfloat16", "full")
    assert (options.pipeline.schedule, options.pipeline.method) == ("v-half", "vocab-1")
    assert (options.pipeline.redis_split, options.data.damaged_data) == ("optimal", "skip")
    assert options.data.data == "stdlib" and options.model.config().hidden == models.SIZES["4B"].hidden


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("--stages 2", "on"),
        ("--shard-optimizer", "on"),
        ("--shard_optimizer --stages 2", "on"),
        ("--shard-optimizer OFF --stages 2", "off"),
        ("--shard-optimizer=off", "off"),
    ],
)
def test_what_is_on_or_off_is_on_where_it_stands_alone(line, meant):
    assert parse(TrainOptions, "", line.split()).pipeline.shard_optimizer == meant


def test_the_options_of_other_commands():
    assert parse(SimulateOptions, "", ["--rules", "On-CPUs", "--model", "21b"]).rules == "on-cpus"
    assert parse(CheckpointOptions, "", ["VERIFY", "List"]).action == "verify"
    assert parse(CheckpointOptions, "", ["verify", "List"]).folder == "List"
    assert parse(SpeedOptions, "", ["--methods", "BASELINE", "Vocab-2", "--schedules", "1F1B"]).methods == (
        "baseline",
        "vocab-2",
    )


def test_what_is_no_name_keeps_its_case(tmp_path):
    assert as_spelt("Nothing", ["other"]) == "Nothing"
    options = parse(TrainOptions, "", ["--model", str(tmp_path / "4B"), "--output", "Skip", "--data", "Refuse/Texts"])
    assert options.model.model.endswith("4B") and options.output == "Skip" and options.data.data == "Refuse/Texts"
    assert parse(ModelOptions, "", ["--model", "Gpt-Tiny"]).folder is None


@dataclass(frozen=True)
class Inner:
    kind: Literal["Left", "right"] = "right"


@dataclass(frozen=True)
class Outer:
    action: Annotated[Literal["Go", "stop"], tyro.conf.Positional]
    where: Annotated[str, tyro.conf.Positional]
    text: str = ""
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        (["GO", "Stop"], ["Go", "Stop"]),
        (["--text", "go", "STOP", "x"], ["--text", "go", "stop", "x"]),
        (["go", "x", "--kind", "LEFT"], ["Go", "x", "--kind", "Left"]),
        (["go", "x", "--kind=LEFT", "--text=LEFT"], ["Go", "x", "--kind=Left", "--text=LEFT"]),
        ([], []),
    ],
)
def test_only_the_values_of_a_choice_are_respelt(given_, meant):
    assert with_names(Outer, given_) == meant
