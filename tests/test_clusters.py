"""How a launcher's variables are read: who the processes are, and which GPUs each has."""

import os
import subprocess
import sys

import jax
import pytest
from conftest import FAST_COMPILE

from vocabpp_jax.runtime import clusters, hosts

SLURM = {"SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "SLURM_NODEID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (EIGHT, None),  # no launcher
        (SLURM, None),  # no GPU is hidden: JAX takes the one of this process' number on its host
        (SLURM | {"SLURM_GPUS_PER_TASK": "1"}, [0]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, [0]),  # --gpus-per-task=1
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, [0]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"}, [0]),
        (SLURM | {"ROCR_VISIBLE_DEVICES": "3"}, [0]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2", "SLURM_TASKS_PER_NODE": "4(x2)"}, [0, 1]),
        (SLURM | EIGHT | {"SLURM_GPUS_PER_TASK": "a100:2", "SLURM_TASKS_PER_NODE": "4(x2)"}, [6, 7]),  # not bound
        (SLURM | EIGHT | {"SLURM_GPUS_PER_TASK": "1", "SLURM_TASKS_PER_NODE": "8(x2)"}, [3]),
        (SLURM | EIGHT | {"SLURM_TASKS_PER_NODE": "8(x2)"}, [3]),
        (SLURM | EIGHT | {"SLURM_TASKS_PER_NODE": "8,4"}, [6, 7]),  # four tasks on this host, which is the second
        (SLURM | EIGHT | {"SLURM_TASKS_PER_NODE": "9", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, [6, 7]),
        (SLURM | EIGHT, None),
        (SLURM | {"SLURM_LOCALID": "0"} | EIGHT | {"SLURM_TASKS_PER_NODE": "1(x2)"}, [0, 1, 2, 3, 4, 5, 6, 7]),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": ""}, None),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0", "JAX_LOCAL_DEVICE_IDS": "0"}, None),  # JAX reads that one
        (OPEN_MPI | EIGHT, [6, 7]),
        (OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "2"}, [0]),
        (OPEN_MPI | {"CUDA_VISIBLE_DEVICES": "2,3"}, [0, 1]),
    ],
)
def test_a_process_takes_the_gpus_that_are_its_own(environment, expected):
    assert clusters.own_gpus(environment) == expected


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"SLURM_NTASKS": "16"}, 16),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, 8),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "SLURM_NTASKS": "2"}, 8),  # mpirun in a SLURM job
    ],
)
def test_the_launcher_says_how_many_processes_there_are(environment, expected):
    assert clusters.launched_processes(environment) == expected


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "0"}, {"SLURM_NTASKS": "x"}])
def test_without_a_launcher_the_three_options_are_named(environment):
    with pytest.raises(ValueError, match="neither SLURM nor Open MPI .*give coordinator, processes and process_id"):
        clusters.launched_processes(environment)


@pytest.mark.parametrize("slurm", [{}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}])
def test_open_mpi_5_does_not_say_enough_and_the_three_options_are_named(slurm):
    with pytest.raises(ValueError, match="Open MPI 5 .*--coordinator HOST:PORT --processes .* --process-id "):
        clusters.launched_processes(OPEN_MPI | slurm)


def test_a_job_script_that_does_not_use_srun_is_told(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setattr(jax._src.xla_bridge, "backends_are_initialized", lambda: False)
    with pytest.raises(ValueError, match="start it with srun or mpirun, or give coordinator, processes and process_id"):
        hosts.join()


JOIN = """
import jax
from vocabpp_jax.runtime import hosts
assert hosts.join(heartbeat_timeout=10) == 2
print(jax.process_index(), jax._src.xla_bridge.CUDA_VISIBLE_DEVICES.value, hosts.gathered(jax.process_index()))
"""


def test_two_tasks_of_slurm_with_one_gpu_each_find_each_other_and_ask_for_the_one_they_see():
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    running = []
    for task in "01":
        own = {"SLURM_PROCID": task, "SLURM_LOCALID": task, "CUDA_VISIBLE_DEVICES": task}
        environment = os.environ | job | own | {"XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", JOIN]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=200)[0].splitlines()[-1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert said == ["0 0 [0, 1]", "1 0 [0, 1]"]
