"""The batch script puts a run back into the queue exactly when it would go on, with stand-ins for SLURM's commands."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "experiments/slurm/train.sbatch"
# Runs the command as two tasks, one after the other, and returns the highest status, as srun does.
SRUN = """#!/bin/bash
shift
highest=0
for SLURM_PROCID in 0 1; do
    export SLURM_PROCID
    "$@"
    status=$?
    ((status > highest)) && highest=$status
done
exit $highest
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def submitted(tmp_path):
    """Runs the script where the tasks end with the given statuses; returns its own, and what it said."""

    def run(statuses, restarts=0, srun=SRUN):
        executable(tmp_path / "bin/srun", srun)
        executable(tmp_path / "bin/scontrol", '#!/bin/sh\necho scontrol "$@"\n')
        first, second = statuses
        python = f'#!/bin/sh\necho "$@" >> arguments\n[ $SLURM_PROCID = 0 ] && exit {first}\nexit {second}\n'
        executable(tmp_path / ".venv/bin/python", python)
        environment = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        ended = subprocess.run(
            ["bash", SCRIPT, "--stages", "2"], env=environment, capture_output=True, text=True, timeout=60
        )
        assert not ended.stderr and not list(tmp_path.glob(".train-*"))
        return ended.returncode, ended.stdout

    return run


@pytest.mark.parametrize(
    "statuses, restarts, status, requeued",
    [
        ((0, 0), 0, 0, False),
        ((75, 75), 0, 75, True),  # SIGTERM at the time limit, however often
        ((75, 75), 1000, 75, True),
        ((75, 137), 3, 137, True),
        ((137, 76), 19, 137, True),  # killed, and another that noticed
        ((137, 76), 20, 137, False),
        ((1, 1), 0, 1, False),
        ((2, 2), 0, 2, False),
        ((1, 137), 0, 1, False),  # one has failed for good, the other was only ended for it
        ((134, 2), 0, 2, False),
    ],
)
def test_a_run_is_put_back_into_the_queue_when_it_would_go_on(statuses, restarts, status, requeued, submitted):
    found, said = submitted(statuses, restarts)
    assert found == status and ("scontrol requeue 7" in said) == requeued


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (2, False), (75, True), (137, True)])
def test_sruns_own_status_counts_where_no_task_has_noted_one(status, requeued, submitted):
    found, said = submitted((0, 0), srun=f"#!/bin/sh\nexit {status}\n")
    assert found == status and ("scontrol requeue 7" in said) == requeued


def test_the_tasks_get_the_scripts_options_and_their_own(submitted, tmp_path):
    submitted((0, 0))
    (first, second) = (tmp_path / "arguments").read_text().splitlines()
    assert first == second and first.startswith("experiments/train.py --distributed ") and first.endswith("--stages 2")
