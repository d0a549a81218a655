"""Checkpoints in a bucket, against a server that speaks its API: what works in a local folder works there."""

import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_canonical import KEY, setup

from vocabpp_jax import checkpoints, train
from vocabpp_jax.checkpoints import folders, inspection
from vocabpp_jax.runtime.faults import Stop

pytest.importorskip("gcsfs")
import fake_gcs  # noqa: E402

# The clients leave their connections to the garbage collector.
pytestmark = pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def server():
    running = fake_gcs.serve()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, f"http://localhost:{running.server_port}")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        patch.setenv("NO_GCE_CHECK", "true")
        for name in ("gcsfs", "google.auth"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def folder(server, request, monkeypatch):
    monkeypatch.setattr(folders, "SETTLE", 0.1)
    return f"gs://bucket/{abs(hash(request.node.name))}/checkpoints"


@pytest.fixture(scope="module")
def trained():
    pipe, optimizer, canonical = setup("1f1b", "vocab-2", 2)
    return canonical, train.init_state(pipe, optimizer, KEY)


def save(writer, trained, *steps):
    for step in steps:
        state = trained[1]._replace(step=jnp.int32(step))
        writer.save(trained[0], state, KEY, rows=step, identity={"lr": 1}, config={})


def load(folder, trained, say=None):
    return checkpoints.load(folder, trained[0], {"lr": 1}, say=say or pytest.fail)


@pytest.mark.thorough
def test_a_state_goes_out_and_comes_back_bit_for_bit(folder, trained):
    assert checkpoints.steps_in(folder) == [] and load(folder, trained) is None
    with checkpoints.Writer(folder, keep=2, keep_every=4) as writer:
        save(writer, trained, 4, 5, 6, 7)
    assert checkpoints.steps_in(folder) == [4, 6, 7]
    loaded = load(folder, trained)
    expected = trained[1]._replace(step=jnp.int32(7))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.state), jax.device_get(expected))
    assert inspection.verify(folder, 6) == [] and [entry.step for entry in inspection.entries(folder)] == [4, 6, 7]


@pytest.mark.thorough
def test_what_is_damaged_is_moved_aside_and_what_is_unfinished_is_no_checkpoint(folder, trained):
    with checkpoints.Writer(folder) as writer:
        save(writer, trained, 1, 2, 3)
    path, said = checkpoints.folder_path(folder), []
    (path / "3" / "commit_success.txt").unlink()
    record = (path / "2/run/metadata").read_text()
    (path / "2/run/metadata").write_text(record.replace('"rows": 2', '"rows": 3'))
    assert checkpoints.steps_in(folder) == [1, 2]
    assert int(load(folder, trained, said.append).state.step) == 1
    assert len(said) == 1 and f"{folder}/damaged-2" in said[0] and (path / "damaged-2/run/metadata").exists()
    with checkpoints.Writer(folder) as writer:
        save(writer, trained, 2, 3)
    assert checkpoints.steps_in(folder) == [1, 2, 3] and int(load(folder, trained).state.step) == 3


def test_a_bucket_that_is_not_there_is_named(server):
    with pytest.raises(ValueError, match="checkpoint_dir is 'gs://none/x', which cannot be written"):
        checkpoints.Writer("gs://none/x")


def test_a_lease_is_lost_to_nobody_who_lives_and_taken_from_the_dead(server):
    path = checkpoints.folder_path("gs://bucket/lease")
    quick = {"beat": 0.2, "patience": 2.0, "settle": 0.1}
    holder = folders.Lease(path, **quick)
    with pytest.raises(ValueError, match="another run is writing"):
        folders.Lease(path, **quick)
    holder.check()
    holder._end.set()  # it is killed
    holder._thread.join()
    began = time.monotonic()
    heir = folders.Lease(path, **quick)
    assert 2 <= time.monotonic() - began < 20
    heir.release()
    began = time.monotonic()
    folders.Lease(path, **quick).release()
    assert time.monotonic() - began < 2  # nobody to wait for


def test_a_run_whose_lease_was_taken_stops(folder, trained, monkeypatch):
    monkeypatch.setattr(folders, "BEAT", 0.1)
    writer = checkpoints.Writer(folder)
    while writer._lock._thread.is_alive():  # it may just be rewriting the file
        (checkpoints.folder_path(folder) / folders.LOCK).write_text("another 1")
    with pytest.raises(Stop, match="to which another run is writing"):
        writer.check()
    writer.close()
    assert (checkpoints.folder_path(folder) / folders.LOCK).read_text() == "another 1"
