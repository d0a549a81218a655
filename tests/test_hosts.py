"""Every process gets the rows that its devices train on, and a device the rows that are its."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vocabpp_jax import make_mesh
from vocabpp_jax.runtime import hosts


def test_every_device_gets_its_columns():
    mesh = make_mesh(pipe=2, data=4)
    tokens = np.arange(3 * 8 * 5).reshape(3, 8, 5)
    batch = {"tokens": tokens, "aux_inputs": {"ids": tokens + 1}}
    placed = hosts.place(mesh, 8, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), batch)
    for shard in placed["tokens"].addressable_shards:
        replica = np.argwhere(mesh.devices == shard.device)[0, 0]
        assert np.array_equal(shard.data, tokens[:, 2 * replica : 2 * replica + 2])
    assert hosts.columns(mesh, 8) == list(range(8))


def test_a_process_wants_the_columns_of_its_own_devices_only(monkeypatch):
    mine = {None: (slice(None), slice(4, 6)), 1: (slice(None), slice(0, 2))}
    sharding = SimpleNamespace(addressable_devices_indices_map=lambda shape: mine)
    monkeypatch.setattr(hosts, "NamedSharding", lambda mesh, spec: sharding)
    assert hosts.columns(None, 8) == [0, 1, 4, 5]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("localhost:1", 2, None), "are given together or not at all"),
        (("localhost:1", 2, 2), "process_id is 2; it must be from 0 to 1"),
        (("localhost", 2, 0), "coordinator is 'localhost'; it must be HOST:PORT"),
        (("localhost:x", 2, 0), "it must be HOST:PORT"),
        ((), "neither SLURM nor Open MPI has started this process"),
    ],
)
def test_processes_that_cannot_find_each_other_are_told(arguments, sentence, monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=sentence):
        hosts.join(*arguments)


def test_slurms_variables_say_how_many_there_are(monkeypatch):
    asked = []
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: asked.append((args, options)))
    assert hosts.join(heartbeat_timeout=7) == 16
    assert asked == [((), {"heartbeat_timeout_seconds": 7, "shutdown_timeout_seconds": 7})]
    with pytest.raises(ValueError, match="heartbeat_timeout is 0"):
        hosts.join(heartbeat_timeout=0)


def test_one_process_agrees_with_itself():
    assert hosts.agree(lambda: 3) == 3 and hosts.from_first("a") == "a"
