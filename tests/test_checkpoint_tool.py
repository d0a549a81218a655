"""The tool lists, verifies and exports, and says what is damaged."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from test_canonical import KEY, flip, setup

import checkpoint as tool
from vocabpp_jax import checkpoints, train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of two checkpoints, and the canonical parameters of both."""
    folder = tmp_path_factory.mktemp("made") / "checkpoints"
    pipe, optimizer, canonical = setup("1f1b", "baseline", 2)
    state = train.init_state(pipe, optimizer, KEY)
    with checkpoints.Writer(folder) as writer:
        for step in (3, 6):
            writer.save(canonical, state._replace(step=jnp.int32(step)), KEY, rows=step, identity={}, config={})
    return folder, jax.device_get(jax.jit(pipe.layout.unpack)(state.params))


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made[0], tmp_path / "checkpoints")


def run(capsys, *arguments):
    tool.main([*map(str, arguments), "--json", "-"])
    return json.loads(capsys.readouterr().out)


def test_list_and_verify_tell_what_is_there(folder, made, capsys):
    count = sum(x.size for x in jax.tree.leaves(made[1]))
    for action in ("list", "verify"):
        found = run(capsys, action, folder)["checkpoints"]
        assert [(e["step"], e["rows"], e["parameters"]) for e in found] == [(3, 3, count), (6, 6, count)]
        assert all(e.get("problems", []) == [] for e in found)
    assert [e["step"] for e in run(capsys, "list", folder, "--step", 3)["checkpoints"]] == [3]
    tool.main(["verify", str(folder)])
    assert capsys.readouterr().out.count("whole") == 2


def test_verify_names_the_checkpoint_that_is_damaged(folder, capsys):
    data = max((folder / "6/state/ocdbt.process_0").rglob("*"), key=lambda path: path.stat().st_size)
    flip(data)
    with pytest.raises(SystemExit) as stop:
        tool.main(["verify", str(folder)])
    said = capsys.readouterr()
    assert stop.value.code == 1 and f"the checkpoints of step 6 in {folder}" in said.err
    assert f"{folder / '6'} is damaged" in said.out and said.out.count("whole") == 1
    with pytest.raises(SystemExit):
        tool.main(["export", str(folder), "--output", "out.safetensors"])
    assert "is damaged" in capsys.readouterr().err and not Path("out.safetensors").exists()


@pytest.mark.parametrize("output", ["out.safetensors", "folder"])
def test_an_export_holds_the_canonical_parameters_bit_for_bit(output, folder, made, capsys):
    size = sum(x.nbytes for x in jax.tree.leaves(made[1]))
    limit = size / 2 / 2**30 if output == "folder" else 4
    found = run(capsys, "export", folder, "--output", output, "--shard-gb", limit)
    assert found["step"] == 6 and len(found["files"]) == (3 if output == "folder" else 1)
    arrays = {name: x for file in found["files"] for name, x in load_file(file).items()}
    expected = {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(made[1])
    }
    assert arrays.keys() == expected.keys() and "blocks.1.w" in arrays
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)
    with safe_open(found["files"][0], "numpy") as file:
        assert file.metadata()["step"] == "6"
    if output == "folder":
        index = json.loads(Path("folder/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys() and index["metadata"]["total_size"] == size


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("list nowhere", "there is no checkpoint in nowhere"),
        ("list checkpoints --step 5", "step is 5; checkpoints has checkpoints of the steps 3, 6"),
        ("export checkpoints", "export needs --output"),
        ("export checkpoints --output taken", "taken is there already"),
        ("export checkpoints --output taken/x.safetensors", "taken"),
        ("export checkpoints --output a.safetensors --shard-gb 0.000001", "give a folder, or a larger --shard-gb"),
        ("list checkpoints --json none/x.json", "json is none/x.json; it cannot be written"),
        ("paint checkpoints", "invalid choice 'paint'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments, sentence, folder, capsys):
    Path("taken").touch()
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and sentence in said and said.count("\n") == 1
