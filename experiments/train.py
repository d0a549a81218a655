"""Train a GPT on a pipeline of devices, with embedding and LM head sharded over that same pipeline.

Without arguments, it trains on the source code of the Python standard library with four pipeline devices, simulated on
CPU-only machines, and finishes within five minutes on two cores. With --checkpoint-dir it can be killed at any time:
the same command resumes from the last intact checkpoint, even on different devices.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from command_line.options import PipelineOptions
from command_line.parsing import fail, or_fail, parse
from training_run.train_options import TrainOptions
from training_run.train_prepare import join, prepare
from training_run.train_run import (
    Records,
    Run,
    describe,
    hardware_record,
    how_to_resume,
    say_once,
    summarise,
    validation_losses,
    write_prediction,
)
from vocabpp_jax import train
from vocabpp_jax.data import prefetched
from vocabpp_jax.models import Config, huggingface
from vocabpp_jax.runtime import hosts
from vocabpp_jax.runtime.faults import (
    LOST,
    SAVED,
    LastWords,
    Stop,
    Termination,
    Watchdog,
    as_sentence,
    lost_peer,
    out_of_memory,
    reason,
    say_and_leave,
)
from vocabpp_jax.runtime.metrics import StepProgress
from vocabpp_jax.runtime.profiling import Profile
from vocabpp_jax.training.optimizer import warmup_cosine

__all__ = ["PipelineOptions", "TrainOptions", "main", "prepare", "run_training"]
STARTS_AGAIN = "start all processes again to resume from the last checkpoint"


class Training:
    """The state of a run, from its checkpoint or new, and its steps."""

    def __init__(self, run: Run):
        self.run, options = run, run.options
        if run.loaded:
            self.state, self.key, self.rows = run.loaded.state, run.loaded.key, run.loaded.rows
            say_once(f"resuming from step {int(self.state.step)} of {options.checkpoint.checkpoint_dir}")
        else:
            everywhere = train.shardings(run.pipe, run.optimizer).step
            # The PRNG implementation is part of what a seed means, whatever jax_default_prng_impl is.
            draw = functools.partial(jax.random.key, impl="threefry2x32")
            self.key = jax.jit(draw, static_argnums=0, out_shardings=everywhere)(options.seed)
            self.state, self.rows = self._begun(), 0
        self.begin, self._skipped = int(self.state.step), int(self.state.skipped)
        self._batches, self._validation = run.data(self.rows)
        self._step = train.make_step(run.pipe, run.optimizer, clip=options.clip)
        self._evaluate = train.make_evaluation(run.pipe)
        schedule = warmup_cosine(options.lr, options.steps, options.warmup_steps, options.lr / 10)
        self._rates = jax.vmap(schedule)(np.arange(options.steps)).tolist()

    def _begun(self) -> train.State:
        """Step 0: parameters drawn from the key, or loaded from a Hugging Face folder."""
        run, folder = self.run, self.run.options.model.folder
        if not run.options.pretrained:
            return train.init_state(run.pipe, run.optimizer, self.key)
        say_once(f"starting from the weights in {folder}")
        try:
            weights = hosts.agree(lambda: huggingface.load(folder, run.pipe))
        except ValueError as problem:
            raise Stop(str(problem), agreed=True) from None
        return train.start_from(run.pipe, run.optimizer, weights)

    def export(self) -> None:
        """Write the weights as a Hugging Face folder, if requested."""
        if export := self.run.export:
            export.write(self.state.params, self.run.pipe, self.run.tokens)
            say_once(f"weights written to {export.folder}")

    def steps(self, profile: Profile) -> Iterator[dict[str, Any]]:
        """Run the remaining steps; yields the measurements after each."""
        ahead = prefetched(self._batches) if self.begin < self.run.options.steps else None
        for k in range(self.begin, self.run.options.steps):
            start = time.perf_counter()
            with profile.before(k + 1):
                self.state, measured = self._step(self.state, self.run.place(next(ahead)))
                measured = {name: value.item() for name, value in measured.items()}
            seconds = time.perf_counter() - start
            self.rows += self.run.shape["microbatches"] * self.run.shape["batch"]
            rate, self._skipped = self._rates[k - self._skipped], measured["skipped"]
            yield {
                "step": k + 1,
                **{name: measured[name] for name in ("loss", "main_loss") if name in measured},
                "grad_norm": measured["grad_norm"],
                "learning_rate": rate,
                "skipped_steps": self._skipped,
                "step_seconds": seconds,
                **hardware_record(self.run, seconds),
                "damaged_data": len(self.run.tokens.damaged),
            }

    def validation_losses(self) -> list[float]:
        """Mean losses over the validation batches, of the next token and of further ones."""
        jax.block_until_ready(self.state)  # one program with collectives at a time on devices that share threads
        return validation_losses(self.run, self._validation, self._evaluate, self.state.params)

    def save(self) -> None:
        """Start saving a checkpoint, if there is a folder for it."""
        if self.run.writer:
            jax.block_until_ready(self.state)
            about = {"identity": self.run.identity, "config": self.run.options.record()}
            self.run.writer.save(self.run.canonical, self.state, self.key, rows=self.rows, **about)


def run_training(run: Run) -> str | None:
    """Train and report progress; process 0 writes the results. Returns the signal that stopped it early, after a save,
    or None.

    Raises:
        Stop: the run cannot continue.
    """
    options, kept, first = run.options, run.options.checkpoint, jax.process_index() == 0
    signal = None
    with run.writer or contextlib.nullcontext(), Watchdog(kept.hang_timeout, LOST) as watchdog:
        training = Training(run)
        if first:
            describe(run, training.begin)
        with (
            StepProgress(options.steps, run.tokens_per_step, silent=not first) as progress,
            Profile(run.output / "profile", options.watch.profile if first else None) as profile,
            Records(run, training.begin) as records,
            Termination() as termination,
        ):
            for record in training.steps(profile):
                step = record["step"]
                last = step == options.steps
                progress.step(step, record["loss"])
                record["tokens_per_second"] = progress.tokens_per_second(step)
                if profile.ended():
                    write_prediction(run, record["step_seconds"])
                    progress.say(f"traced {options.watch.profile} steps to {run.output / 'profile'}")
                if step % options.eval_every == 0 or last:
                    with progress.paused():
                        record["validation_loss"], *further = training.validation_losses()
                        record |= {f"validation_loss_depth_{k}": x for k, x in enumerate(further, start=1)}
                    progress.say(f"step {step}/{options.steps}  validation loss {record['validation_loss']:.4f}")
                records.write(**record)
                if record["skipped_steps"] > kept.max_skipped:
                    raise Stop(
                        f"{record['skipped_steps']} steps had a loss or gradient that is not finite, the last at step "
                        f"{step}, and max_skipped is {kept.max_skipped}",
                        agreed=True,
                    )
                signal = termination.requested(step)
                if signal or last or step % kept.checkpoint_every == 0:
                    with progress.paused():
                        training.save()
                if run.writer:
                    run.writer.check()
                watchdog.alive(step)
                if signal and not last:
                    break
    if signal and not last:
        if not run.writer:
            raise Stop(f"{signal} at step {step}", agreed=True)
        say_once(f"{signal} at step {step}: {how_to_resume(run)}")
        return signal
    training.export()
    if first:
        summarise(run)
    return None


def leave(sentence: str, status: int, agreed: bool) -> NoReturn:
    """Exit, and at once if other processes may be waiting for this one."""
    if jax.process_count() > 1 and not agreed:
        say_and_leave(sentence, status)
    fail(sentence, status)


def train_to_the_end(options: TrainOptions, config: Config) -> str | None:
    """Prepare and train; any failure ends in a sentence and a status."""
    try:
        run = prepare(options, config)
    except hosts.Agreed as problem:
        leave(str(problem), 2, agreed=True)
    except (ValueError, OSError) as problem:
        if lost_peer(problem):
            raise
        leave(as_sentence(problem), 2, agreed=False)
    try:
        return run_training(run)
    except (Stop, OSError) as problem:
        if lost_peer(problem):
            raise
        agreed = isinstance(problem, Stop) and problem.agreed
        why = str(problem) if isinstance(problem, Stop) else f"{problem.filename or run.output}: {reason(problem)}"
        leave(f"{why}; {how_to_resume(run)}", 1, agreed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exits with status 0 at the end; 75 if a signal came and the run was saved, 76 if another process
    failed (start again to resume in both cases); 2 for invalid input, 1 for failures that a restart would repeat."""
    options = or_fail(parse(TrainOptions, __doc__, arguments).planned)
    hosts.quiet_libraries()
    config = or_fail(lambda: join(options))
    signal = None
    try:
        with LastWords(f"ended before its time; {STARTS_AGAIN}", wanted=jax.process_count() > 1):
            signal = train_to_the_end(options, config)
            hosts.leave()
    except Exception as problem:
        if sentence := out_of_memory(problem):
            leave(sentence, 1, agreed=False)
        if sentence := lost_peer(problem):
            say_and_leave(f"{sentence}; {STARTS_AGAIN}", LOST)
        if jax.process_count() > 1:  # a bug here; the others must not wait for this process
            traceback.print_exc()
            say_and_leave(f"process {jax.process_index()} failed", status=1)
        raise
    if signal:
        raise SystemExit(SAVED)


if __name__ == "__main__":
    main()
