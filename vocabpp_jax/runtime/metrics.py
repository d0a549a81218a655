"""A run's reports: a JSON lines file, a progress bar or plain lines, a plot of the losses."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Curve = Sequence[tuple[int, float]]
"""Steps and the losses at them, in nats per token."""


class JsonLines:
    """Appends records to a file, one JSON object per line, each flushed before the call returns.

    With ``after``, records of later steps and a truncated last line are removed first: a run resumed from a checkpoint
    repeats those steps.
    """

    def __init__(self, path: str | Path, after: int | None = None):
        path = Path(path)
        if after is not None and path.exists():
            kept = [json.dumps(record) + "\n" for record in read_records(path) if record.get("step", 0) <= after]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        """Append one record of numbers, strings and None. JSON has no infinity or NaN; they become null."""
        self._file.write(json.dumps({name: _plain(value) for name, value in record.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; a truncated last line is ignored.

    Raises:
        ValueError: another line is not a JSON object.
    """
    records = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            records.append(None)
        if not isinstance(records[-1], dict) or not isinstance(records[-1].get("step", 0), int):
            raise ValueError(f"{path}:{number} is not a record of a run; fix it, or give another folder")
    return records


class TensorBoard:
    """Writes the numbers of each record as TensorBoard scalars. Needs the package tensorboardX.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, folder: str | Path, after: int | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError(
                "tensorboard needs the package tensorboardX; pip install 'vocabpp-jax[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def write(self, step: int, **record: Any) -> None:
        """Write a scalar for each finite number of the record."""
        for name, value in record.items():
            if isinstance(value := _plain(value), int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class StepProgress:
    """Shows training progress: a bar on a terminal, elsewhere a plain line every ``line_every`` seconds.

    The first step compiles, so speed and time left are counted from its end, excluding :meth:`paused` time.
    """

    def __init__(
        self, steps: int, tokens_per_step: int, out: TextIO | None = None, line_every: float = 5.0, silent: bool = False
    ):
        self._steps, self._tokens_per_step, self._line_every = steps, tokens_per_step, line_every
        self._console = Console(file=out or sys.stdout, soft_wrap=True, highlight=False, quiet=silent)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("compiling", total=steps)
        self._first: int | None = None
        self._start = 0.0
        self._not_training = 0.0
        self._last_line = -math.inf

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.stop()

    def step(self, step: int, loss: float) -> None:
        """Step ``step`` (1 to ``steps``) has ended with this loss."""
        if self._first is None:
            self._first, self._start, self._not_training = step, time.perf_counter(), 0.0
        text = f"loss {loss:.4f}"
        if speed := self.tokens_per_second(step):
            left = (self._steps - step) * self._tokens_per_step / speed
            text += f"  {speed:,.0f} tokens/s  {_minutes(left)} left"
        self._bar.update(self._task, completed=step, description=text)
        now = time.perf_counter()
        if not self._console.is_terminal and (now - self._last_line >= self._line_every or step == self._steps):
            self._last_line = now
            self.say(f"step {step}/{self._steps}  {text}")

    def tokens_per_second(self, step: int) -> float | None:
        """The mean speed so far; None before the second step."""
        if self._first is None or step == self._first:
            return None
        seconds = time.perf_counter() - self._start - self._not_training
        return (step - self._first) * self._tokens_per_step / seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the speed: it is not training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._not_training += time.perf_counter() - start

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False)


def draw_losses(path: str | Path, train: Curve, validation: Curve = (), unigram_entropy: float | None = None) -> None:
    """Plot the losses over steps; the unigram entropy is what a model without context can reach."""
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(*_columns(train), color="tab:blue", alpha=0.7, linewidth=1, label="train")
    if validation:
        axes.plot(*_columns(validation), color="tab:orange", marker="o", markersize=4, label="validation")
    if unigram_entropy is not None:
        label = f"unigram entropy, {unigram_entropy:.2f}"
        axes.axhline(unigram_entropy, color="tab:gray", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]


def _plain(value: Any) -> Any:
    """Arrays and numpy numbers as Python numbers."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _minutes(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
