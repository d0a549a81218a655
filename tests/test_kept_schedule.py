"""A run that goes on runs the program that it began with."""

import json

from command_line.options import PipelineOptions
from training_run import kept_schedule
from training_run.train_options import TrainOptions
from vocabpp_jax.schedules.simulation.cost import load_gpu

OPTIONS = TrainOptions(pipeline=PipelineOptions(schedule="v-half", method="vocab-2", stages=2, microbatches=4))


def test_the_schedule_is_read_where_the_same_options_decided_it(tmp_path):
    config = OPTIONS.model.config()
    fitted = OPTIONS.pipeline.build(config, load_gpu("a100-80g"))
    record = {"schedule": kept_schedule.record(fitted, OPTIONS, config)}
    (tmp_path / "config.json").write_text(json.dumps(record, indent=2))
    plain = OPTIONS.pipeline.build(config)
    assert kept_schedule.decide_schedule(OPTIONS, config, tmp_path) == fitted != plain
    others = TrainOptions(pipeline=PipelineOptions(schedule="v-half", method="vocab-2", stages=2, microbatches=5))
    assert kept_schedule.decide_schedule(others, config, tmp_path) == others.pipeline.build(config)
    record["schedule"]["json"] = "{"
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert kept_schedule.decide_schedule(OPTIONS, config, tmp_path) == plain
    assert kept_schedule.decide_schedule(OPTIONS, config, tmp_path / "new") == plain
