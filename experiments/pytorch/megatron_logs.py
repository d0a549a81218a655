"""Reads speed and memory from logs of Megatron-LM, or of VocabularyParallelism, which is built on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_NUMBER = r"([-+0-9.Ee]+)"
_ITERATION = re.compile(r"\biteration\s+(\d+)\s*/\s*\d+\s*\|")
_FIELDS = {
    "ms": re.compile(rf"elapsed time per iteration \(ms\):\s*{_NUMBER}"),
    "tflops": re.compile(rf"(?:throughput per GPU \(TFLOPs?/s/GPU\)|TFLOPs):\s*{_NUMBER}"),
    "batch": re.compile(r"global batch size:\s*(\d+)"),
    "loss": re.compile(rf"lm loss:\s*{_NUMBER}"),
}
_MEMORY = re.compile(rf"\[Rank (\d+)\].*?memory \(MB\).*?max allocated:\s*{_NUMBER}")
_ARGUMENT = re.compile(r"^\s*(?:\d+:\s*)?(\w+) \.{2,} (\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class MegatronRun:
    """A run as read from its log. What the log does not say is None.

    Attributes:
        step_ms: median time of an iteration, without the first ones.
        tflops: median model TFLOP/s per GPU.
        memory_gib: the maximum that any rank allocated.
        tokens: per iteration, if the log begins with the arguments and so gives the sequence length.
        losses: by iteration.
    """

    name: str
    step_ms: float
    tflops: float | None
    memory_gib: float | None
    tokens: int | None
    vocab_size: int | None
    losses: dict[int, float]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of training."""
        return None if self.tokens is None else 1e3 * self.tokens / self.step_ms


def read_log(path: str | Path, warmup: int = 2) -> MegatronRun:
    """Read a log file.

    Args:
        warmup: iterations to skip at the beginning, if there are more.

    Raises:
        ValueError: there is no such file, or no line in it has the time of an iteration.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"logs has {str(path)!r}; there is no such file")
    text = path.read_text(errors="replace")
    lines = [line for line in text.splitlines() if _ITERATION.search(line) and _FIELDS["ms"].search(line)]
    if not lines:
        raise ValueError(f"logs has {str(path)!r}, in which no line has an elapsed time per iteration")
    steady = lines[warmup:] or lines
    arguments = dict(_ARGUMENT.findall(text))
    batch, tflops = _values(steady, "batch"), _values(steady, "tflops")
    memory = [float(m[1]) for m in _MEMORY.findall(text)]
    seq, vocab = arguments.get("seq_length"), arguments.get("padded_vocab_size") or arguments.get("vocab_size")
    losses = {int(_ITERATION.search(line)[1]): _values([line], "loss") for line in lines}
    return MegatronRun(
        name=path.stem,
        step_ms=median(_values(steady, "ms")),
        tflops=median(tflops) if tflops else None,
        memory_gib=max(memory) / 1024 if memory else None,
        tokens=int(batch[0]) * int(seq) if batch and seq else None,
        vocab_size=int(vocab) if vocab and vocab.isdigit() else None,
        losses={n: found[0] for n, found in losses.items() if found},
    )


def _values(lines: list[str], field: str) -> list[float]:
    return [float(m[1]) for line in lines if (m := _FIELDS[field].search(line))]
