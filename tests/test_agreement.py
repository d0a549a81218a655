"""What fails or differs in one process is raised in all of them, with the same sentence, and nobody waits."""

import pytest
from together import run_code

AGREEMENT = """
import jax
import numpy as np
from vocabpp_jax import make_mesh

def only_in(rank, problem):
    def act():
        if process == rank:
            raise problem
        return process
    return act

answers["all is well"] = hosts.agree(lambda: process)
answers["value"] = sentence(lambda: hosts.agree(only_in(1, ValueError("n is 3; it must be even"))))
answers["system"] = sentence(lambda: hosts.agree(only_in(0, OSError(13, "Permission denied", "data.txt"))))
answers["bug"] = sentence(lambda: hosts.agree(only_in(1, KeyError("n"))))
answers["everywhere"] = sentence(lambda: hosts.agree(lambda: only_in(process, ValueError("no"))()))
answers["same"] = sentence(lambda: hosts.check_same("the options", {"lr": 1, "n": [1]}))
mine = {"lr": process, "seed": 3, "x": process or None}
answers["different"] = sentence(lambda: hosts.check_same("the options", mine))
answers["long"] = [len(text) for text in hosts.gathered("é" * 3000 * (process + 1))]
answers["first"] = hosts.from_first(["from", process])
answers["mesh"] = sentence(lambda: make_mesh(1, devices=jax.devices()[:1]))
answers["goes on"] = hosts.agree(lambda: "yes")
"""


def test_failures_and_differences_are_raised_by_all_processes():
    first, second = run_code(AGREEMENT)
    assert (first.pop("all is well"), second.pop("all is well")) == (0, 1)
    assert first.pop("bug") == "Agreed: process 1 of 2: KeyError: 'n'" and second.pop("bug") == "KeyError: 'n'"
    assert first == second
    assert first == {
        "value": "Agreed: process 1 of 2: n is 3; it must be even",
        "system": "Agreed: process 0 of 2: data.txt: Permission denied",
        "everywhere": "Agreed: no",
        "same": "",
        "different": "Agreed: process 1 of 2: the options must be the same in all processes: "
        "lr is 0 in process 0 and 1 in process 1, x is None in process 0 and 1 in process 1",
        "long": [3000, 6000],
        "first": ["from", 0],
        "mesh": "ValueError: 2 processes have 2 devices, and the mesh of data 1 × pipe 1 takes 1, none of process 1; "
        "start fewer processes, or make the mesh larger",
        "goes on": "yes",
    }


CHECKPOINTS = """
import jax, jax.numpy as jnp
from pathlib import Path
from test_canonical import setup, flip, KEY
from vocabpp_jax import checkpoints, train
from vocabpp_jax.checkpoints import folders, store

folder, other = Path({folder!r}), Path({other!r})
pipe, optimizer, canonical = setup("1f1b", "baseline", 2, width=256)
state = train.init_state(pipe, optimizer, KEY)

def save(*steps):
    writer = checkpoints.Writer(folder)
    for step in steps:
        about = dict(rows=step, identity=dict(lr=1), config={{}})
        writer.save(canonical, state._replace(step=jnp.int32(step)), KEY, **about)
    writer.close()

def load(lr=1):
    return checkpoints.load(folder, canonical, dict(lr=lr), say=said.append)

def steps():
    return checkpoints.steps_in(folder)

said = []
answers["not shared"] = sentence(lambda: checkpoints.Writer(other if process else folder))
save(1, 2, 3, 4)
answers["changed in one"] = sentence(lambda: load(lr=1 + process))
answers["changed in both"] = sentence(lambda: load(lr=2))

# The disk of one process refuses: nothing is known about the checkpoint, and nothing is moved.
restore = store._restored
def refused(*arguments):
    with folders.readable(folder):
        raise PermissionError(13, "Permission denied")
if process:
    store._restored = refused
answers["refused"] = sentence(load)
def bug(*arguments):
    raise KeyError("n")
if process:
    store._restored = bug
answers["bug"] = sentence(load)
store._restored = restore
answers["nothing was moved"] = steps()

# Only process 1 reads what process 1 wrote.
if process:
    for path in (folder / "4/state/ocdbt.process_1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
hosts.agree(lambda: None)
answers["damaged for one"] = [int(load().state.step), steps(), len(said)]

hosts.agree(lambda: None)
if process == 0:
    (folder / "3/run/metadata").write_text("{{")
hosts.agree(lambda: None)
answers["no record"] = [int(load().state.step), steps(), len(said)]

save(3, 4)
answers["done again"] = [int(load().state.step), steps()]
"""


@pytest.mark.thorough
def test_a_checkpoint_that_one_process_cannot_read_is_read_by_none(tmp_path):
    (tmp_path / "other").mkdir()
    code = CHECKPOINTS.format(folder=str(tmp_path / "shared"), other=str(tmp_path / "other"))
    first, second = run_code(code, timeout=500)
    assert first.pop("bug") == "Agreed: process 1 of 2: KeyError: 'n'" and second.pop("bug") == "KeyError: 'n'"
    assert first == second
    assert "process 1 of 2" in first["not shared"] and "give a folder that all hosts share" in first["not shared"]
    assert "lr is 1 in process 0 and 2 in process 1" in first["changed in one"]
    assert "4 is from a run in which lr was 1 and is 2" in first["changed in both"]
    assert first["refused"] == f"Agreed: process 1 of 2: {tmp_path}/shared cannot be read (Permission denied)"
    assert first["nothing was moved"] == [2, 3, 4]
    assert first["damaged for one"] == [3, [2, 3], 1] and first["no record"] == [2, [2], 2]
    assert first["done again"] == [4, [2, 3, 4]]
    assert (tmp_path / "shared/damaged-4").is_dir() and (tmp_path / "shared/damaged-3").is_dir()
