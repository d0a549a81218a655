"""Timelines as printed in papers: a row per device, colors by pass, microbatch numbers, activations in flight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..instructions import KINDS
from .timeline import Curve, Timeline, Track

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT = "#30343B", "#9AA0A8"
_GROUND = "#F3F4F6"
_WIDTH = 12.0  # inches


def draw(timelines: Timeline | Mapping[str, Timeline], unit: str = "F", in_flight: bool = True) -> Figure:
    """A figure of one timeline, or of several stacked on a shared time axis, by their titles.

    Args:
        timelines: what to draw; a single one gets a default title.
        unit: name of the unit of time, for the axis.
        in_flight: whether to plot the activations in flight below each timeline.
    """
    from matplotlib.figure import Figure

    panels = {title_of(timelines): timelines} if isinstance(timelines, Timeline) else dict(timelines)
    rows = [t.schedule.p for t in panels.values()]
    row = float(np.clip(4.6 / max(rows), 0.15, 0.42))  # inches
    heights = []
    for p, t in zip(rows, panels.values(), strict=True):
        lane = 0.6 if _collectives(t) else 0.0
        heights += [row * (p + lane), 0.62] if in_flight else [row * (p + lane)]
    above, between, below = 0.62, 0.45, 0.45
    gaps = [0.1 if in_flight and n % 2 else between for n in range(1, len(heights))]
    total = above + sum(heights) + sum(gaps) + below
    figure = Figure(figsize=(_WIDTH, total), dpi=150, facecolor="white")
    end = max(t.makespan for t in panels.values())
    top, n = total - above, 0
    for title, timeline in panels.items():
        axes = figure.add_axes(_box(total, top, heights[n]))
        _rows(axes, timeline, end, row)
        _heading(axes, title, timeline, unit)
        top -= heights[n]
        if in_flight:
            n += 1
            top -= 0.1
            curve = figure.add_axes(_box(total, top, heights[n]), sharex=axes)
            _held(curve, timeline)
            axes.tick_params(labelbottom=False)
            axes = curve
            top -= heights[n]
        n += 1
        top -= between
    axes.set_xlabel(f"time, in {unit}", color=_INK, fontsize=9)
    _legend(figure, list(panels.values()), total)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, by the file name's suffix; the same figure gives an identical file.

    Raises:
        ValueError: another suffix.
    """
    from matplotlib import rc_context

    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"plot is {str(path)!r}; its name must end in .png or .svg")
    with rc_context({"svg.hashsalt": "vocabpp_jax", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def title_of(timeline: Timeline) -> str:
    """The schedule's name, method and size."""
    schedule = timeline.schedule
    return f"{schedule.name}, {schedule.method}, p={schedule.p}, m={schedule.m}"


# --- parts -----------------------------------------------------------------------------------------------------------


def _box(total: float, top: float, height: float) -> tuple[float, float, float, float]:
    """Left, bottom, width and height of axes as fractions of the figure, from inches."""
    left, right = 0.75, 0.2
    return left / _WIDTH, (top - height) / total, (_WIDTH - left - right) / _WIDTH, height / total


def _collectives(timeline: Timeline) -> bool:
    """Whether any collective takes time."""
    return any(t.op == "start" and (t.end > t.start).any() for t in timeline.tracks)


def _rows(axes: Axes, timeline: Timeline, end: float, row: float) -> None:
    """The devices' passes, and a lane for the collectives below."""
    p = timeline.schedule.p
    lane = 0.6 if _collectives(timeline) else 0.0
    axes.set_xlim(0, end * 1.002)
    axes.set_ylim(p + lane, 0)
    per_unit = (_WIDTH - 0.95) / end  # inches
    for d in range(p):
        axes.broken_barh([(0, timeline.makespan)], (d + 0.04, 0.92), facecolor=_GROUND, linewidth=0, zorder=0)
    for track in timeline.tracks:
        if track.op == "run":
            _passes(axes, timeline, track, per_unit, row)
        elif track.op == "start" and lane:
            n = np.flatnonzero((track.microbatch[:, 0] >= 0) & (track.end[:, 0] > track.start[:, 0]))
            bars = np.stack([track.start[n, 0], track.end[n, 0] - track.start[n, 0]], axis=1)
            axes.broken_barh(bars, (p + 0.14, lane - 0.24), facecolor=KINDS[track.kind].color, linewidth=0)
    step = 1 if p <= 16 else 4
    axes.set_yticks([d + 0.5 for d in range(0, p, step)], [str(d) for d in range(0, p, step)])
    _plain(axes)
    axes.set_ylabel("device", color=_INK, fontsize=9)


def _passes(axes: Axes, timeline: Timeline, track: Track, per_unit: float, row: float) -> None:
    """One instruction's passes on all devices, with microbatch numbers if all of them fit."""
    from matplotlib.collections import PolyCollection

    schedule, kind = timeline.schedule, KINDS[track.kind]
    n, d = np.nonzero((track.microbatch >= 0) & (track.end > track.start))
    if not len(n):
        return
    left, right, top, bottom = track.start[n, d], track.end[n, d], d + 0.04, d + 0.96
    corners = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1).reshape(-1, 4, 2)
    color = _shade(kind.color, schedule.chunk(track.stages[0]) if kind.runs == "per stage" else 0, schedule.chunks)
    inches = float((right - left).max()) * per_unit
    axes.add_collection(
        PolyCollection(
            corners,
            facecolor=color,
            edgecolor="white",
            linewidth=0.6 if inches > 0.06 else 0.15 if inches > 0.02 else 0,
        )
    )
    ink = "white" if _luminance(color) < 0.5 else _INK
    for device in np.unique(d).tolist():
        mine = d == device
        narrowest = float((right - left)[mine].min()) * per_unit
        if size := _font(narrowest, row, len(str(schedule.m - 1))):
            for x, i in zip(((left + right) / 2)[mine], track.microbatch[n, d][mine].tolist(), strict=True):
                axes.text(x, device + 0.52, str(i), ha="center", va="center", fontsize=size, color=ink)


def _font(width: float, height: float, digits: int) -> float:
    """The font size in points at which this many digits fit a box in inches; 0 if none is readable."""
    size = min(8.0, 72 * height * 0.62, 72 * width * 0.94 / (0.62 * digits))
    return size if size >= 3.8 else 0.0


def _held(axes: Axes, timeline: Timeline) -> None:
    """Activations in flight over time: the range over all devices, and the first and last device."""
    p = timeline.schedule.p
    grid = np.linspace(0, timeline.makespan, 2400)
    values = [_most(timeline.in_flight(d), grid) for d in range(p)]
    low, high = np.min(values, axis=0), np.max(values, axis=0)
    cold, warm = KINDS["F"].color, KINDS["T"].color
    axes.fill_between(grid, low, high, step="post", color=cold, alpha=0.18, linewidth=0)
    axes.plot(grid, values[0], color=cold, linewidth=1.1, drawstyle="steps-post")
    if p > 1:
        axes.plot(grid, values[-1], color=warm, linewidth=1.1, drawstyle="steps-post")
    peak = int(high.max())
    axes.set_ylim(0, max(peak, 1) * 1.18)
    axes.set_yticks([0, peak])
    _plain(axes)
    axes.set_ylabel("held", color=_INK, fontsize=9)
    for d, height, color in ((0, 0.92, cold), (p - 1, 0.62, warm))[: min(p, 2)]:
        axes.annotate(
            f"device {d}: {timeline.peak_in_flight[d]}",
            (1, height),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8,
            color=color,
        )


def _most(curve: Curve, grid: np.ndarray) -> np.ndarray:
    """The maximum from each point of a grid to the next, so that no peak falls between two."""
    times, values = curve
    first = np.searchsorted(times, grid, side="right") - 1
    behind = np.maximum(np.searchsorted(times, np.append(grid[1:], np.inf)), first + 1)
    pairs = np.stack([first, behind], axis=1).ravel()
    return np.maximum.reduceat(np.append(values, 0), pairs)[::2]


def _heading(axes: Axes, title: str, timeline: Timeline, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, fontweight="bold", pad=5)
    result = f"{timeline.makespan:.4g} {unit}   bubble {100 * timeline.bubble_ratio:.1f}%"
    axes.set_title(result, loc="right", fontsize=9.5, color=_INK, pad=5)


def _plain(axes: Axes) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors=_FAINT)
    axes.patch.set_alpha(0)


def _legend(figure: Figure, timelines: list[Timeline], total: float) -> None:
    """The passes and collectives that occur, one line each at the top."""
    from matplotlib.patches import Patch

    for n, op in enumerate(("run", "start")):
        there = {t.kind for x in timelines for t in x.tracks if t.op == op and (t.end > t.start).any()}
        handles = [Patch(facecolor=kind.color, label=kind.legend) for kind in KINDS.values() if kind.name in there]
        if handles:
            corner = (0.75 / _WIDTH, 1 - (0.06 + 0.17 * n) / total)
            figure.legend(
                handles=handles,
                loc="upper left",
                bbox_to_anchor=corner,
                ncols=len(handles),
                frameon=False,
                fontsize=8,
                handlelength=1,
                handleheight=0.8 - 0.45 * n,
                handletextpad=0.5,
                columnspacing=1.2,
                borderaxespad=0,
                borderpad=0,
                labelcolor=_INK,
            )


def _shade(color: str, chunk: int, chunks: int) -> str:
    """A later chunk's color: the same, lighter."""
    red, green, blue = (int(color[n : n + 2], 16) for n in (1, 3, 5))
    share = 0.45 * chunk / max(1, chunks - 1) if chunks > 1 else 0.0
    return "#" + "".join(f"{round(c + (255 - c) * share):02x}" for c in (red, green, blue))


def _luminance(color: str) -> float:
    red, green, blue = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue
