"""A selection of what experiments/fuzz.py does in full, and that it finds what is wrong."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from conftest import FAST_COMPILE
from fuzzing.cases import Case, run_all
from fuzzing.mutate import bytes_of, json_of, text_of_json

SCRIPT = Path(__file__).parent.parent / "experiments" / "fuzz.py"


@pytest.mark.thorough
def test_a_selection_of_random_input_is_accepted_or_refused_in_a_sentence(tmp_path):
    """Six cases of each kind, other ones than the first that the command itself runs."""
    command = [sys.executable, str(SCRIPT), "--cases", "48", "--first", "5000", "--folder", str(tmp_path / "cases")]
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "48 cases, 0 wrong" in done.stdout
    assert [path.name for path in (tmp_path / "cases").iterdir() if "-50" in path.name] == []  # all cleared away


def refuse(text, status=2):
    def action():
        sys.stderr.write(text)
        raise SystemExit(status)

    return action


def hang():
    while True:
        time.sleep(0.1)


WRONG = {
    "traceback": lambda: {}["missing"],
    "status": refuse("error: this is a sentence, but not the status\n", status=3),
    "two lines": refuse("error: this is a sentence\nand another\n"),
    "no prefix": refuse("this is a sentence without its beginning\n"),
    "silence": refuse(""),
    "also on standard output": lambda: (print("something"), refuse("error: this is a sentence that is fine\n")()),
    "a warning where it is accepted": lambda: sys.stderr.write("a warning\n"),
    "killed": lambda: os.abort(),
    "hangs": hang,
    "too much memory": lambda: bytearray(2**40),
}
RIGHT = {
    "accepted": lambda: print("a report"),
    "refused": refuse("error: this is a sentence that is fine\n"),
    "refused while it read": lambda: (print("reading x"), refuse("error: this is a sentence that is fine\n")()),
}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*fork:RuntimeWarning")
def test_what_is_wrong_is_found_and_what_is_right_is_not(tmp_path):
    def cases():
        for name, action in (WRONG | RIGHT).items():
            folder = tmp_path / name
            folder.mkdir()
            yield Case(name, folder, action)

    with contextlib.closing(run_all(cases(), jobs=4, limit_s=5)) as done:
        found = {case.name: case.wrong for case in done}
    assert {name for name, wrong in found.items() if wrong} == set(WRONG), found
    assert {path.name for path in tmp_path.iterdir()} == set(WRONG)
    assert "has not ended after 5 s" in found["hangs"] and "signal" in found["killed"]


def test_changes_are_the_same_for_the_same_seed_and_differ_otherwise():
    like = {"a": [1, {"b": "text"}], "c": None}
    for make in (
        lambda r: bytes_of(r, b"some bytes " * 9),
        lambda r: text_of_json(r, like),
        lambda r: repr(json_of(r, like)),
    ):
        assert [make(Random(n)) for n in range(50)] == [make(Random(n)) for n in range(50)]
        assert len({make(Random(n)) for n in range(50)}) > 20
    assert like == {"a": [1, {"b": "text"}], "c": None}
