"""What happens before the first step: checks, the other processes, the data, and the checkpoint to resume from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from training_run.kept_schedule import decide_schedule
from training_run.train_export import plan_export
from training_run.train_options import TrainOptions, check_output, make_folder
from training_run.train_run import Run, sample, say_once
from vocabpp_jax import checkpoints
from vocabpp_jax.data import TokenizedCorpus, load_tokens
from vocabpp_jax.models import Config, huggingface
from vocabpp_jax.runtime import hosts
from vocabpp_jax.runtime.faults import LOST, Watchdog
from vocabpp_jax.training.optimizer import adamw


def join(options: TrainOptions) -> Config:
    """Check everything that needs no device, and find the other processes, if any."""
    try:
        options.check()
        config = options.model.config()
        options.pipeline.build(config, mtp_depth=options.model.mtp_depth)
    except ValueError as problem:
        options.cluster.tell_and_fail(problem)
    options.cluster.join(simulated_devices=options.pipeline.devices)
    return config


def prepare(options: TrainOptions, config: Config) -> Run:
    """Check everything, cheap things first, load the data, and find where to resume.

    Raises:
        ValueError: training cannot begin; all processes raise it together.
    """
    hosts.agree(lambda: None)  # receives a problem that another process had before it joined
    hosts.check_same("the options", options.shared())
    mesh = hosts.agree(options.pipeline.mesh)
    output = Path(hosts.from_first(str(options.output_folder())))
    schedule = decide_schedule(options, config, output)
    pipe = options.pipeline.place(options.model.build(), schedule, mesh, config.dtype)
    if options.pretrained:
        hosts.agree(lambda: huggingface.check(options.model.folder, pipe))
    optimizer = adamw(
        options.lr,
        options.steps,
        options.warmup_steps,
        weight_decay=options.weight_decay,
    )
    export = plan_export(options, config, pipe)
    run = Run(options, config, pipe, optimizer, read_tokens(options, config), output, None, None, export)
    hosts.agree(lambda: run.data(0))
    hosts.check_same("what decides the result", run.identity | sample(run.tokens))
    hosts.agree(lambda: jax.process_index() or (check_output(output, options, run.identity), make_folder(output)))
    if options.checkpoint.checkpoint_dir is None:
        return run
    folder, kept = options.checkpoint.checkpoint_dir, options.checkpoint
    writer = checkpoints.Writer(folder, kept.checkpoint_keep, kept.checkpoint_keep_every)
    try:
        with Watchdog(kept.hang_timeout, LOST):
            loaded = checkpoints.load(
                folder, run.canonical, run.identity, accept_changes=kept.accept_changes, say=say_once
            )
    except BaseException:
        writer.close()  # no save is in progress, so this does not wait for other processes
        raise
    return dataclasses.replace(run, loaded=loaded, writer=writer)


def read_tokens(options: TrainOptions, config: Config) -> TokenizedCorpus:
    """The data, tokenized by process 0 first; the others find it in the cache, or tokenize it on their own disk."""
    say_once(f"reading {options.data.data}, for a vocabulary of {config.vocab_size} tokens")

    def load() -> TokenizedCorpus:
        return load_tokens(
            options.data.data,
            vocab_size=config.vocab_size,
            tokenizer=options.data.tokenizer,
            end_of_text=options.data.end_of_text,
            damaged=options.data.damaged_data,
        )

    tokens = hosts.agree(lambda: load() if jax.process_index() == 0 else None)
    tokens = hosts.agree(lambda: tokens or load())
    for sentence in tokens.damaged:
        say_once(f"left out: {sentence}")
    for sentence in tokens.notes:
        say_once(f"note: {sentence}")
    return tokens
