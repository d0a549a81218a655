"""What a run writes can be read back, and progress says something on a terminal and off it."""

import io
import json
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from vocabpp_jax.runtime.metrics import JsonLines, StepProgress, TensorBoard, draw_losses, read_records


def test_records_are_on_disk_at_once_and_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(2):
        with JsonLines(path) as lines:
            lines.write(step=step, loss=jnp.float32(2.5), norm=np.float64(1.5), note="ok")
            assert json.loads(path.read_text().splitlines()[-1]) == dict(step=step, loss=2.5, norm=1.5, note="ok")
    assert len(path.read_text().splitlines()) == 2


def test_what_is_not_finite_is_null(tmp_path):
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        lines.write(loss=float("nan"), norm=jnp.inf)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"loss": None, "norm": None}


def test_off_a_terminal_progress_is_plain_lines():
    out = io.StringIO()
    with StepProgress(3, tokens_per_step=1000, out=out, line_every=0) as progress:
        for step in (1, 2, 3):
            progress.step(step, loss=4 / step)
        progress.say("[brackets] stay")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 and "\x1b" not in out.getvalue()
    assert lines[0] == "step 1/3  loss 4.0000" and lines[1].startswith("step 2/3  loss 2.0000  ")
    assert "tokens/s" in lines[1] and lines[2].endswith("0:00 left") and lines[3] == "[brackets] stay"


def test_lines_are_rare_but_the_last_step_has_one():
    out = io.StringIO()
    with StepProgress(50, tokens_per_step=1, out=out, line_every=1000) as progress:
        for step in range(1, 51):
            progress.step(step, loss=1.0)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/50", "50/50"]


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    with StepProgress(2, tokens_per_step=1, out=out) as progress:
        progress.step(1, loss=3.0)
        progress.step(2, loss=2.5)
        progress.say("validation")
    assert "\x1b" in out.getvalue() and "validation\n" in out.getvalue()


def test_speed_leaves_out_the_first_step_and_what_is_not_training():
    progress = StepProgress(9, tokens_per_step=100, out=io.StringIO())
    assert progress.tokens_per_second(1) is None
    progress.step(1, loss=1.0)
    with progress.paused():
        time.sleep(0.2)
    time.sleep(0.05)
    progress.step(2, loss=1.0)
    assert 100 / 0.15 < progress.tokens_per_second(2) <= 100 / 0.05


@pytest.mark.parametrize("validation, entropy", [((), None), ([(1, 3.0), (3, 2.0)], 6.5)])
def test_the_picture_is_a_picture(tmp_path, validation, entropy):
    draw_losses(tmp_path / "loss.png", [(1, 4.0), (2, float("nan")), (3, 2.0)], validation, entropy)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_goes_on_takes_back_the_steps_it_does_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path, after=0) as lines:
        for step in range(1, 6):
            lines.write(step=step, loss=step / 2)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut off
    with JsonLines(path, after=3) as lines:
        lines.write(step=4, loss=9.0)
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0)]


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"step": "x"}'])
def test_a_line_that_is_no_record_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a record of a run"):
        JsonLines(path, after=1)
    assert path.read_text() == f'{{"step": 1}}\n{line}\n'


def test_tensorboard_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'vocabpp-jax\[tensorboard\]'"):
        TensorBoard(tmp_path)
