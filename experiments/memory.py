"""Compile a run's programs for GPUs that are not present, and report what they will need: memory, copies, overlap.

    python experiments/memory.py --gpu a100-80g --model 4B --stages 8 --vocab-size 256000 --plot memory.png
    python experiments/memory.py --model 21B --stages 32 --program init save --json -

The programs are initialization, the train step, evaluation, saving, restoring and importing weights. Memory and compile
time are reported for each, and for the step also its copies and overlap. The step is what train.py runs: float32
parameters, gradients and Adam moments, donated; passes in the model's dtype; flash attention if cuDNN supports the
heads; residuals as --residuals says. Needs jax's GPU packages (pip install 'vocabpp-jax[cuda12]'), but no GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # otherwise jax's GPU plugin would look for its GPU

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from command_line.options import ModelOptions, PipelineOptions
from command_line.parsing import OptionalStr, or_fail, parse, write_json, write_text
from vocabpp_jax import Pipeline, compiled, make_mesh, models
from vocabpp_jax.models.config import attention_implementation
from vocabpp_jax.schedules.simulation.cost import GPU, load_gpu
from vocabpp_jax.training.optimizer import adamw

GIB = 2**30
LARGE = 2**20  # bytes from which a copy in the loop is reported
RINGS = ("residual", "kept", "carried", "tail_residual", "tail_kept", "tail_carried")
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")


@dataclass(frozen=True)
class MemoryOptions:
    """What to compile, for which GPU, and where the report goes."""

    gpu: str = "a100-80g"
    """GPU: a100-80g, h100-80g, or a .toml file like those in schedules/simulation/gpus, with a table [target]."""
    json: OptionalStr = None
    """File for the report as JSON, - for standard output."""
    plot: OptionalStr = None
    """Plot of the step's memory (.png, .svg, .pdf)."""
    hlo: OptionalStr = None
    """File for the compiled step's HLO text."""
    program: tuple[Literal["init", "step", "evaluate", "save", "restore", "import"], ...] = tuple(compiled.PROGRAMS)
    """Programs to compile: init (draw the parameters), step, evaluate, save (the copy that a checkpoint makes),
    restore, import (after Hugging Face weights were read)."""
    without: tuple[str, ...] = ()
    """XLA flags that train.py sets on GPUs and that are left out here, to see their effect."""
    model: ModelOptions = field(default_factory=lambda: ModelOptions(model="4B"))
    pipeline: PipelineOptions = field(
        default_factory=lambda: PipelineOptions(stages=8, microbatches=128, microbatch_size=1, data_parallel=1)
    )

    def __post_init__(self) -> None:
        if self.plot and Path(self.plot).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"plot is {self.plot}; its name must end in .png, .svg or .pdf")
        for name in ("plot", "hlo"):
            if getattr(self, name) and "step" not in self.program:
                raise ValueError(f"{name} belongs to the step, and program is {' '.join(self.program)}; add step to it")


@dataclass(frozen=True)
class Report:
    """What the compiler made of one train step. Bytes are per device; collectives are those of the steady state."""

    gpu: str
    memory_bytes: int
    peak_bytes: int
    temp_bytes: int
    output_bytes: int
    parts: dict[str, int]
    used_bytes: tuple[int, ...]
    loop_copy_bytes: int
    copies: list[compiled.Copy]
    collectives: list[compiled.Collective]
    compile_seconds: float
    instructions: int
    assumed: dict[str, str]
    settings: dict[str, Any]

    @property
    def imbalance(self) -> float:
        """The difference in use between the fullest and the emptiest device, as a fraction of the peak."""
        return (max(self.used_bytes) - min(self.used_bytes)) / self.peak_bytes

    @property
    def program(self) -> compiled.ProgramReport:
        """The numbers that all programs have."""
        return compiled.ProgramReport("step", self.peak_bytes, self.temp_bytes, self.output_bytes, self.compile_seconds)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON, tuples as objects."""
        record = dataclasses.asdict(self) | {"imbalance": self.imbalance}
        record["copies"] = [copy._asdict() for copy in self.copies]
        record["collectives"] = [collective._asdict() for collective in self.collectives]
        return record


def on_gpu(options: ModelOptions) -> models.Config:
    """The model as a GPU would run it: with flash attention where supported."""
    config = options.config()
    return dataclasses.replace(config, attention=attention_implementation(config, "gpu"))


def prepare(model: ModelOptions, pipeline: PipelineOptions, gpu: GPU) -> Pipeline:
    """The pipeline on GPUs that are not present. Raises ValueError if it cannot be built."""
    config = on_gpu(model)
    schedule = pipeline.build(config, gpu, mtp_depth=model.mtp_depth)
    data = 1 if pipeline.data_parallel is None else pipeline.data_parallel
    there = compiled.devices(gpu, pipeline.stages * pipeline.tensor_parallel * data)
    mesh = make_mesh(pipeline.stages, data, there, tensor=pipeline.tensor_parallel)
    return pipeline.place(model.build(config), schedule, mesh, config.dtype)


def programs(options: MemoryOptions) -> compiled.Programs:
    """The programs of the run that the options describe."""
    pipe = prepare(options.model, options.pipeline, load_gpu(options.gpu))
    optimizer = adamw(1e-4, 1000, 100)
    return compiled.Programs(
        pipe, optimizer, options.pipeline.microbatch_size, options.model.config().seq, options.without
    )


def report(options: MemoryOptions) -> tuple[Report, str]:
    """Compile the step and read the result; also returns the compiled program's text."""
    if options.pipeline.tensor_parallel > 1:
        raise ValueError(
            f"tensor_parallel is {options.pipeline.tensor_parallel}; what the parts of the step's memory are is known "
            "without it, so give 1"
        )
    gpu, model, pipeline, run = load_gpu(options.gpu), options.model, options.pipeline, programs(options)
    pipe, optimizer, length, size = run.pipe, run.optimizer, run.length, run.microbatch_size
    program, seconds = run.compile_step()
    text = program.as_text()
    loops = compiled.loops(text)
    if not loops:
        raise ValueError(
            f"stages is {pipeline.stages} and microbatches is {pipeline.microbatches}; the compiled step has no loop "
            "that communicates, so give at least 2 stages and more microbatches than stages"
        )
    steady = loops[0]
    copies = steady.copies(LARGE)
    state, buffers = compiled.state_bytes(pipe, optimizer), pipe.buffer_bytes(size, length)
    parts = {
        "parameters": state.parameters,
        "optimizer": state.optimizer,
        "gradients": state.gradients,
        "rounded weights": state.rounded,
        "activations in flight": sum(buffers.get(ring, 0) for ring in RINGS),
        "other buffers": sum(n for name, n in buffers.items() if name not in RINGS and not name.startswith("grads.")),
    }
    memory = program.memory_analysis()
    peak = memory.peak_memory_in_bytes
    parts["everything else"] = peak - sum(parts.values())
    a_parameter = sum(state) / (state.gradients / 4)
    return (
        Report(
            gpu=gpu.name,
            memory_bytes=int(gpu.memory_bytes),
            peak_bytes=peak,
            temp_bytes=memory.temp_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            parts=parts,
            used_bytes=compiled.used_bytes(pipe, size, length, a_parameter),
            loop_copy_bytes=sum(copy.bytes for copy in copies),
            copies=copies,
            collectives=steady.collectives,
            compile_seconds=seconds,
            instructions=compiled.instruction_count(text),
            assumed={
                "state": "float32 parameters, gradients and two Adam moments; donated"
                + (f"; parameters and moments shared by {pipe.layout.data} copies" if pipe.layout.data > 1 else ""),
                "passes": _passes(pipe, state),
                "attention": on_gpu(model).attention,
                "residuals": on_gpu(model).residuals,
                "flags": " ".join(
                    f"{name}={flag.value}" for name, flag in compiled.FLAGS.items() if name not in options.without
                ),
            },
            settings=dataclasses.asdict(model) | dataclasses.asdict(pipeline) | {"seq": length},
        ),
        text,
    )


def _passes(pipe: Pipeline, state: compiled.StateBytes) -> str:
    """The dtype that passes compute in, and where their weights come from."""
    if pipe.layout.data > 1:
        return f"{pipe.compute_dtype}, from weights that are gathered once a step"
    copy = ", from a copy of the weights but for an embedding that is not the head"
    return pipe.compute_dtype + (copy if state.rounded else "")


# --- for people ------------------------------------------------------------------------------------------------------


def show_programs(found: list[compiled.ProgramReport], gpu: GPU, console: Console) -> None:
    """Print a table of all programs."""
    table = Table("program", "peak, GiB per device", "scratch", "output", "compiled in, s", title=f"for {gpu.name}")
    for program in found:
        sizes = (program.peak_bytes, program.temp_bytes, program.output_bytes)
        table.add_row(program.name, *(f"{n / GIB:.2f}" for n in sizes), f"{program.compile_seconds:.0f}")
    console.print(table)


def show(found: Report, console: Console) -> None:
    """Print tables of the memory and the collectives, and the assumptions."""
    memory = Table("part", "GiB per device", title=f"compiled for {found.gpu}")
    for name, size in found.parts.items():
        memory.add_row(name, f"{size / GIB:.2f}")
    memory.add_section()
    memory.add_row("peak", f"{found.peak_bytes / GIB:.2f}", style="bold")
    memory.add_row("of", f"{found.memory_bytes / GIB:.2f}")
    console.print(memory)
    headers = ("collective", "step", "MiB", "passes before it starts", "passes between start and end")
    traffic = Table(*headers, title="in the steady state")
    for c in found.collectives:
        passes = (" ".join(names) or "none" for names in (c.passes_before, c.passes_between))
        traffic.add_row(c.kind, c.step, f"{c.bytes / LARGE:.2f}", *passes)
    console.print(traffic)
    for copy in found.copies:
        console.print(f"copied in every interval: {copy.shape}, {copy.bytes / LARGE:.0f} MiB, {copy.scope}")
    if not found.copies:
        console.print("no copy of 1 MiB or more in the steady state")
    console.print(
        f"devices differ by {found.imbalance:.1%} of the peak in what they use; "
        f"{found.instructions:,} instructions, compiled in {found.compile_seconds:.0f} s\nassumed: "
        + "; ".join(f"{name}: {value}" for name, value in found.assumed.items())
    )


def draw(reports: dict[str, Report], path: Path, published: dict[str, float] | None = None) -> None:
    """Stacked bars, one per report, of the parts of the peak, with the GPU's memory as a line."""
    fig, ax = plt.subplots(figsize=(2.2 + 1.1 * len(reports), 4.5), layout="constrained")
    bottom = [0.0] * len(reports)
    for color, part in zip(COLORS, next(iter(reports.values())).parts, strict=True):
        heights = [r.parts[part] / GIB for r in reports.values()]
        ax.bar(list(reports), heights, 0.6, bottom=bottom, label=part, color=color)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for x, total in enumerate(bottom):
        ax.text(x, total, f"{total:.1f}", ha="center", va="bottom")
    if published:
        ax.plot(list(published), list(published.values()), "k_", markersize=30, label="published")
    limit = next(iter(reports.values())).memory_bytes / GIB
    if max(bottom) > 0.6 * limit:
        ax.axhline(limit, color="black", linestyle=":", label="the GPU's memory")
    ax.set_ylabel("GiB per device, compiled")
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(y=0.12)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(arguments: Sequence[str] | None = None) -> None:
    options = or_fail(lambda: parse(MemoryOptions, __doc__, arguments))
    console = Console(stderr=options.json == "-")
    step, text = or_fail(lambda: report(options)) if "step" in options.program else (None, "")
    run, gpu = or_fail(lambda: programs(options)), load_gpu(options.gpu)
    found = [
        step.program if name == "step" else or_fail(lambda name=name: run.report(name)) for name in options.program
    ]
    if step:
        show(step, console)
    show_programs(found, gpu, console)
    record = step.as_json() if step else {"gpu": gpu.name, "memory_bytes": int(gpu.memory_bytes)}
    write_json(options.json, record | {"programs": [program._asdict() for program in found]}, indent=2)
    if options.hlo:
        write_text("hlo", options.hlo, text)
    if options.plot:
        title = f"{options.model.model}\n{options.pipeline.schedule}\n{options.pipeline.method}"
        draw({title: step}, Path(options.plot))


if __name__ == "__main__":
    main()
