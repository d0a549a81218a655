"""A folder of checkpoints takes one run at a time, with locks in its file system or without."""

import errno

import pytest

from vocabpp_jax import checkpoints
from vocabpp_jax.checkpoints import folders


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="checkpoint_dir is .*file/checkpoints', which cannot be written"):
        checkpoints.Writer(tmp_path / "file" / "checkpoints")


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    writer = checkpoints.Writer(tmp_path)
    with pytest.raises(ValueError, match="to which another run is writing"):
        checkpoints.Writer(tmp_path)
    writer.close()
    checkpoints.Writer(tmp_path).close()


def test_without_locks_in_the_file_system_a_run_shows_signs_of_life(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    # Patient enough for a machine that writes nothing for a second.
    for name, value in {"BEAT": 0.1, "PATIENCE": 4.0, "SETTLE": 0.2}.items():
        monkeypatch.setattr(folders, name, value)
    writer = checkpoints.Writer(tmp_path)
    with pytest.raises(ValueError, match="to which another run is writing"):
        checkpoints.Writer(tmp_path)
    writer.check()
    writer._lock._end.set()  # the run is killed
    writer._lock._thread.join()
    checkpoints.Writer(tmp_path).close()
    assert not (tmp_path / ".lock").exists()


def test_whoever_reads_a_lease_while_it_is_rewritten_finds_its_holder(tmp_path):
    lease = folders.Lease(folders.folder_path(tmp_path), beat=1e-4, settle=0.01)
    read = {lease._read().partition(" ")[0] for _ in range(5000)}
    lease.release()
    assert read == {lease.token}
    assert not list(tmp_path.iterdir())
