import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speed_measure.processes import Group, GroupFailed, Here

SCRIPT = """
import os, sys, time
sys.path.insert(0, {experiments!r})
from speed_measure import processes

def where():
    print("what a library prints is no answer")
    return [int(os.environ["RANK"]), sorted(os.sched_getaffinity(0)), os.getpid()]

def refuse():
    raise ValueError("n is 3; it must be even")

def hang(rank):
    time.sleep(60 if int(os.environ["RANK"]) == rank else 0)

def die(rank):
    if int(os.environ["RANK"]) == rank:
        raise RuntimeError("out of luck")
    time.sleep(60)

processes.serve(dict(where=where, refuse=refuse, hang=hang, die=die))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "ranks.py"
    path.write_text(SCRIPT.format(experiments=str(Path(__file__).parent.parent / "experiments")))
    return path


def ended(pid):
    for _ in range(100):
        try:
            # A child that nobody waited for yet still has its number.
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_every_rank_answers_from_one_core_and_ends_with_the_group(script):
    with Group(script, 2, share_cores=True) as group:
        answers = group.ask("where", 20)
        assert [rank for rank, _, _ in answers] == [0, 1]
        assert all(len(cores) == 1 for _, cores, _ in answers)
        if len(os.sched_getaffinity(0)) > 1:
            assert answers[0][1] != answers[1][1]
        with pytest.raises(ValueError, match="n is 3; it must be even"):
            group.ask("refuse", 20)
        assert group.ask("where", 20) == answers
    assert all(ended(pid) for _, _, pid in answers)


def test_a_rank_that_hangs_ends_the_group_in_time_and_is_named(script):
    with Group(script, 2, share_cores=True) as group:
        pids = [pid for _, _, pid in group.ask("where", 20)]
        began = time.monotonic()
        with pytest.raises(GroupFailed, match="hang took more than 1 s\n--- rank 1:"):
            group.ask("hang", 1, rank=1)
        assert time.monotonic() - began < 5 and all(ended(pid) for pid in pids)
        with pytest.raises(GroupFailed, match="has ended"):
            group.ask("where", 1)


def test_a_rank_that_dies_ends_the_group_and_says_why(script):
    with Group(script, 2, share_cores=True) as group:
        pids = [pid for _, _, pid in group.ask("where", 20)]
        with pytest.raises(GroupFailed, match="(?s)rank 1 died in die.*out of luck"):
            group.ask("die", 20, rank=1)
        assert all(ended(pid) for pid in pids)


def test_ranks_end_when_whoever_started_them_is_killed(script):
    parent = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent.parent / 'experiments')!r})\n"
        "from pathlib import Path\nfrom speed_measure.processes import Group\n"
        f"with Group(Path({str(script)!r}), 1) as group:\n"
        "    print(group.ask('where', 20)[0][2], flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
    assert ended(pid)


def test_more_ranks_than_cores_are_refused(script):
    with pytest.raises(ValueError, match="stages is 4096; there are"):
        Group(script, 4096)


def test_a_process_can_be_a_rank_by_itself():
    assert Here({"twice": lambda n: 2 * n}).ask("twice", 1, n=3) == [6]


def test_no_rank_takes_a_gpu_that_was_hidden(script, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ValueError, match="stages is 2; CUDA_VISIBLE_DEVICES names 1 GPUs"):
        Group(script, ranks=2, gpus=True)
