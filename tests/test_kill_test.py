"""One of two processes fails on the way to the first step; the other ends in time and the next start goes on."""

import random

import kill_test as script
import pytest
from conftest import FAST_COMPILE


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """A run of two processes with a checkpoint, all of it compiled."""
    folder = tmp_path_factory.mktemp("lives")
    (folder / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=20_000)))
    options = script.KillOptions(processes=2, steps=2, checkpoint_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", FAST_COMPILE)  # without the eight devices of this process
        lives = script.Lives(options, folder, str(folder / "text.txt"), "run")
    lives.finish()
    return lives, options


@pytest.mark.thorough
@pytest.mark.parametrize(
    "phase, what, process",
    [
        ("comparing data", "killed", 0),
        ("reading the record", "stopped", 1),
        ("checking arrays", "KeyError", 1),
        ("laying out arrays", "ValueError", 0),
    ],
)
def test_the_others_end_in_time_with_a_sentence_and_the_next_start_goes_on(phase, what, process, lives):
    run, options = lives
    found = script.fail_to_restore(run, options, {"phase": phase, "what": what, "process": process})
    assert found["good"], (found, [run.said(rank) for rank in (0, 1)])
    assert found["kept"] == 2 and run.finish() and "resuming from step 2" in run.said(0)


def test_every_phase_is_something_that_there_is():
    assert all(hasattr(owner, name) for owner, name in script.PHASES.values())
