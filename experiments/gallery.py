"""Draw every schedule with every method: docs/images/*.png and docs/gallery.md.

    python experiments/gallery.py

The time unit is F, a device's forward of one microbatch; the head costs as much as a device's layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from command_line.parsing import parse
from vocabpp_jax.schedules import GPU, SCHEDULES, build, lower, methods_of
from vocabpp_jax.schedules.simulation.durations import Durations
from vocabpp_jax.schedules.simulation.pictures import draw, save
from vocabpp_jax.schedules.simulation.simulator import simulate
from vocabpp_jax.schedules.simulation.timeline import Timeline

HEAD = 3.0  # forward and backward of the whole output layer
NETWORK = dict(hidden_broadcast=0.08, grad_sum=0.12, embed_sum=0.08, embed_grad_broadcast=0.08, stats=0.02, max=0.02)
REDIS = (5, 5, 5, 1)  # the published rule for 16 layers and a head worth 4 of them

LARGE = (32, 64)  # devices, microbatches
NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved-1f1b": "Interleaved 1F1B",
    "zb-h1": "ZB-H1",
    "zb-h2": "ZB-H2",
    "v-min": "V-Min",
    "v-half": "V-Half",
    "v-zb": "V-ZB",
    "baseline": "head on the last stage",
    "redis": "layers redistributed",
    "interlaced": "interlaced",
    "vocab-1": "vocabulary parallelism, Algorithm 1",
    "vocab-2": "vocabulary parallelism, Algorithm 2",
    "vocab-naive": "vocabulary parallelism, three barriers",
}


@dataclass(frozen=True)
class GalleryOptions:
    """Output folder and problem size."""

    docs: str = "docs"
    """Folder to write gallery.md and images/ into."""
    stages: int = 4
    """Devices in each picture."""
    microbatches: int = 8
    """Microbatches in each picture."""


def timeline(schedule: str, method: str, p: int, m: int) -> Timeline:
    """One iteration of the same model under each schedule and method."""
    counts = REDIS if method == "redis" and p == 4 else None
    built = build(schedule, method, p=p, m=m, layer_counts=counts)
    share = [n / 4 for n in counts] if counts else [1 / built.chunks] * built.stages
    inputs = 1.0 if built.splits_backward else 2.0
    first, second = (2, 1) if method == "vocab-2" else (1, 2)  # of the three matrix products
    third = HEAD / 3 / p
    output = dict(H=HEAD, S=first * third, T=second * third, S1=third, S2=third / 4)
    layers = dict(F=share, B=[inputs * x for x in share], W=share)
    return simulate(lower(built), Durations(**layers, **output, transfer=0.01, **NETWORK))


def fitted(p: int, m: int) -> dict[str, Timeline]:
    """V-Half with pass times of the 7B model on A100s: the block unchanged, and fitted."""
    given = Durations(F=0.466, B=0.549, W=0.405, transfer=0.004)
    both = {
        "V-Half, its building block repeated": build("v-half", "baseline", p=p, m=m),
        "V-Half, fitted to how long its passes take": build("v-half", "baseline", p=p, m=m, durations=given),
    }
    return {title: simulate(lower(schedule), given, GPU) for title, schedule in both.items()}


def titled(schedule: str, methods: list[str], p: int, m: int) -> dict[str, Timeline]:
    """Timelines by title."""
    return {f"{NAMES[schedule]}, {NAMES[method]}": timeline(schedule, method, p, m) for method in methods}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse(GalleryOptions, __doc__, arguments)
    p, m = options.stages, options.microbatches
    docs = Path(options.docs)
    (docs / "images").mkdir(parents=True, exist_ok=True)

    def picture(name: str, timelines: dict[str, Timeline]) -> str:
        save(draw(timelines), docs / "images" / f"{name}.png")
        return f"![{'; '.join(timelines)}](images/{name}.png)"

    picture("timeline-vocab-2", titled("1f1b", ["baseline", "vocab-2"], p, m))
    text = [TEXT.format(p=p, m=m)]
    for schedule in SCHEDULES:
        main_methods = ["baseline", "vocab-1", "vocab-2"]
        text += [f"## {NAMES[schedule]}", picture(schedule, titled(schedule, main_methods, p, m))]
        if others := [x for x in methods_of(schedule) if x not in main_methods]:
            text.append(picture(f"{schedule}-others", titled(schedule, others, p, m)))
    text += ["## Fitted to durations", FITTED.format(m=2 * m), picture("v-half-fitted", fitted(p, 2 * m))]
    text += ["## A larger one", f"{LARGE[0]} devices, {LARGE[1]} microbatches."]
    text += [picture("1f1b-32", titled("1f1b", ["vocab-2"], *LARGE))]
    (docs / "gallery.md").write_text("\n\n".join(text) + "\n")


TEXT = """# Gallery of schedules

Every schedule, with the vocabulary layers on the end stages and with them sharded over the pipeline, for {p} devices
and {m} microbatches, simulated by the rules of the compiled program. One forward of a device's layers takes 1, their
backward 2, and the whole output layer 3, so a device that holds the head has twice the work of the others. Numbers are
microbatches; the lighter colour is a device's second chunk of the model. The lane below the devices shows collectives.
The curve below it shows how many chunk activations the devices hold: the first device in blue, the last in red, the
others in the shaded range.

Made by `python experiments/gallery.py`."""


FITTED = """Passes are not equally long: the backward of flash attention makes B longer than F, and W is shorter than
both. With one program for all devices, neighbours then wait for each other in every slot. `build(..., durations=...)`
puts passes on a grid that follows their durations and chooses where every transfer is issued, by simulating the program
with the rules of GPUs. Here F, B and W of half a device's layers take 0.47, 0.55 and 0.41, with {m} microbatches and no
head."""


if __name__ == "__main__":
    main()
