import re

import pytest

from vocabpp_jax.schedules import build, lower
from vocabpp_jax.schedules.simulation.durations import Durations
from vocabpp_jax.schedules.simulation.pictures import draw, save, title_of
from vocabpp_jax.schedules.simulation.simulator import simulate

DURATIONS = Durations(B=1, W=1, S=0.3, T=0.2, H=1, hidden_broadcast=0.1, grad_sum=0.1)


def timeline(schedule="1f1b", method="vocab-2", p=3, m=4):
    return simulate(lower(build(schedule, method, p=p, m=m)), DURATIONS)


def texts(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_an_svg_names_schedule_passes_devices_and_microbatches(tmp_path):
    one = timeline()
    save(draw(one), tmp_path / "a.svg")
    found = texts(tmp_path / "a.svg")
    assert {title_of(one), "F forward", "B backward", "T gradients", "broadcast of X", "device", "held"} <= set(found)
    # Four microbatches of F, B, S and T on three devices, beside what stands on the axes.
    assert sum(found.count(str(i)) for i in range(4)) >= 4 * 4 * 3


def test_numbers_that_do_not_fit_are_left_out(tmp_path):
    save(draw(timeline(p=16, m=300)), tmp_path / "a.svg")
    assert "299" not in texts(tmp_path / "a.svg")


def test_several_timelines_share_one_axis(tmp_path):
    figure = draw({"before": timeline(method="baseline"), "after": timeline()})
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("schedule", "method"),
    [
        ("v-half", "vocab-1"),
        ("zb-h2", "baseline"),
        ("gpipe", "vocab-2"),
        ("interleaved-1f1b", "vocab-2"),
        ("1f1b", "vocab-naive"),
    ],
)
def test_every_kind_of_schedule_can_be_drawn(schedule, method, tmp_path):
    save(draw(timeline(schedule, method), in_flight=False), tmp_path / "a.png")


def test_the_same_figure_gives_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        save(draw(timeline()), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(ValueError, match="end in .png or .svg"):
        save(draw(timeline()), tmp_path / "a.pdf")
