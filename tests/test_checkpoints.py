"""What is saved comes back bit for bit; what is damaged, foreign or changed is named, and the last good one stays."""

import json
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_canonical import KEY, flip, load, one_step, setup

from vocabpp_jax import checkpoints, train
from vocabpp_jax.runtime.faults import Stop


@pytest.fixture(scope="module")
def trained():
    """A state after a step, so that no moment is zero; it is donated to nothing."""
    pipe, optimizer, canonical = setup("1f1b", "vocab-2", 2)
    state, _ = one_step(pipe, optimizer, train.init_state(pipe, optimizer, KEY), seed=0)
    return canonical, state


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    writer = checkpoints.Writer(folder)
    for step in (1, 2):
        state = trained[1]._replace(step=jnp.int32(step))
        writer.save(trained[0], state, KEY, rows=6 * step, identity={"lr": 1e-2}, config={"seed": 0})
    writer.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of two checkpoints, of steps 1 and 2, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_state_comes_back_bit_for_bit_with_its_padding(trained, saved):
    canonical, state = trained
    loaded = load(saved, canonical)
    expected = state._replace(step=jnp.int32(2))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.state), jax.device_get(expected))
    jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or pytest.fail(), loaded.state, state)
    assert loaded.rows == 12 and loaded.record["config"] == {"seed": 0}
    assert jnp.array_equal(jax.random.key_data(loaded.key), jax.random.key_data(KEY))


# --- what is damaged


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda step: flip(largest_file(step / "state")),
        lambda step: shutil.rmtree(step / "state" / "ocdbt.process_0"),
        lambda step: (step / "run/metadata").write_bytes(b"\xff\x00garbage"),
        lambda step: (step / "run/metadata").write_text(
            (step / "run/metadata").read_text().replace('"rows": 12', '"rows": 13')
        ),
        lambda step: shutil.rmtree(step / "run"),
    ],
    ids=["a flipped bit", "arrays gone", "record garbage", "record changed", "record gone"],
)
def test_a_damaged_checkpoint_is_named_kept_aside_and_the_one_before_it_taken(spoil, trained, folder):
    spoil(folder / "2")
    spoilt, said = contents(folder / "2"), []
    loaded = load(folder, trained[0], say=said.append)
    assert int(loaded.state.step) == 1 and loaded.rows == 6
    assert len(said) == 1 and f"{folder / '2'} is damaged" in said[0] and "resumes from step 1" in said[0]
    assert contents(folder / "damaged-2") == spoilt and checkpoints.steps_in(folder) == [1]


def test_where_nothing_is_whole_the_run_does_not_begin_anew(trained, folder):
    for step in (1, 2):
        flip(largest_file(folder / str(step) / "state"))
    before = contents(folder)
    with pytest.raises(ValueError, match="no checkpoint in .* is whole: .*2 is damaged"):
        load(folder, trained[0])
    assert contents(folder) == before


@settings(max_examples=12)
@given(data=st.data())
def test_random_bytes_in_any_file_never_pass_and_never_harm_the_good_one(data, trained, saved):
    folder = saved.parent / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    files = sorted(path for path in (folder / "2").rglob("*") if path.is_file())
    data.draw(st.sampled_from(files)).write_bytes(data.draw(st.binary(max_size=200)))
    good, expected = contents(folder / "1"), jax.device_get(trained[0].flatten(trained[1]))
    try:
        loaded = load(folder, trained[0], say=lambda text: None)
        found = jax.device_get(trained[0].flatten(loaded.state))
        jax.tree.map(np.testing.assert_array_equal, found | {"step": 1}, expected)
    except ValueError as problem:
        assert str(folder / "2") in str(problem)
    assert contents(folder / "1") == good


def test_a_save_that_was_cut_off_is_no_checkpoint(trained, folder):
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")
    assert checkpoints.steps_in(folder) == [1] and int(load(folder, trained[0]).state.step) == 1


DENIED = 'PERMISSION_DENIED: Error opening "zarr" driver: Error reading local file "/x": Permission denied [source'


@pytest.mark.parametrize(
    "problem, sentence",
    [
        (PermissionError(13, "Permission denied"), "cannot be read (Permission denied)"),
        (OSError(24, "Too many open files"), "cannot be read (Too many open files)"),
        (ValueError(DENIED), "cannot be read (Permission denied)"),
        (ValueError("ABORTED: All retry attempts failed"), "cannot be read (ABORTED: All retry attempts failed)"),
    ],
)
def test_a_file_system_that_refuses_says_nothing_about_the_checkpoint(problem, sentence, trained, folder, monkeypatch):
    def restore(*_, **__):
        raise problem

    before = contents(folder)
    monkeypatch.setattr(checkpoints.store.ocp.PyTreeCheckpointHandler, "restore", restore)
    with pytest.raises(ValueError) as raised:
        load(folder, trained[0])
    assert sentence in str(raised.value) and str(folder / "2") in str(raised.value) and contents(folder) == before


@pytest.mark.parametrize("problem", [OSError(5, "Input/output error"), ValueError("DATA_LOSS: CRC-32C checksum")])
def test_a_disk_that_has_lost_bits_is_damage(problem, trained, folder, monkeypatch):
    whole = checkpoints.store.ocp.PyTreeCheckpointHandler.restore

    def restore(self, path, *rest, **options):
        if path.parent.name == "2":
            raise problem
        return whole(self, path, *rest, **options)

    monkeypatch.setattr(checkpoints.store.ocp.PyTreeCheckpointHandler, "restore", restore)
    assert int(load(folder, trained[0], say=lambda text: None).state.step) == 1
    assert (folder / "damaged-2").is_dir()


@pytest.mark.parametrize("problem", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")])
def test_too_little_memory_is_no_damage(problem, trained, folder, monkeypatch):
    def restore(*_, **__):
        raise problem

    monkeypatch.setattr(checkpoints.store.ocp.PyTreeCheckpointHandler, "restore", restore)
    with pytest.raises((MemoryError, ValueError)):
        load(folder, trained[0])
    assert checkpoints.steps_in(folder) == [1, 2]


def test_the_random_key_keeps_its_kind(trained, tmp_path):
    canonical, state = trained
    for name in ("rbg", "threefry2x32"):
        key = jax.random.key(3, impl=name)
        with checkpoints.Writer(tmp_path / name) as writer:
            writer.save(canonical, state, key, rows=0, identity={"lr": 1e-2}, config={})
        assert load(tmp_path / name, canonical).key == key


# --- what is foreign or changed


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda step: (step / "default").mkdir(parents=True), "7 is not a checkpoint of this program"),
        (lambda step: write_record(step, {"hello": 1}), "7 is not a checkpoint of this program"),
        (lambda step: write_record(step, [1]), "7 is not a checkpoint of this program"),
        (lambda step: write_record(step, None, version=2), "7 has version 2; this program reads version 1"),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_left_alone(make, sentence, trained, folder):
    make(folder / "7")
    before = contents(folder)
    with pytest.raises(ValueError, match=sentence):
        load(folder, trained[0])
    assert contents(folder) == before


def write_record(step, record, **changes):
    if record is None:
        record = json.loads((step.parent / "2/run/metadata").read_text()) | changes
        record["checksum"] = checkpoints.store._checksum(record)
    (step / "run").mkdir(parents=True)
    (step / "run/metadata").write_text(json.dumps(record))


def test_a_changed_configuration_is_refused_unless_accepted(trained, folder):
    with pytest.raises(ValueError, match="lr was 0.01 and is 0.1, warmup was None and is 3; give the old values"):
        load(folder, trained[0], {"lr": 0.1, "warmup": 3})
    assert int(load(folder, trained[0], {"lr": 0.1}, accept_changes=True).state.step) == 2


def test_another_model_is_refused_by_the_name_and_both_shapes_of_an_array(folder):
    _, _, other = setup("1f1b", "vocab-2", 2, layers=3)
    with pytest.raises(ValueError, match=r"blocks\.2\.w, .* has none and this model has float32\[32, 32\]"):
        load(folder, other, accept_changes=True)


def test_an_empty_folder_has_nothing_to_go_on_from(trained, tmp_path):
    assert load(tmp_path, trained[0]) is None and load(tmp_path / "none", trained[0]) is None


# --- writing


def test_the_newest_and_the_periodic_ones_are_kept(trained, tmp_path):
    canonical, state = trained
    writer = checkpoints.Writer(tmp_path, keep=2, keep_every=4)
    for step in range(2, 12):
        writer.save(canonical, state._replace(step=jnp.int32(step)), KEY, rows=0, identity={}, config={})
    writer.close()
    assert checkpoints.steps_in(tmp_path) == [4, 8, 10, 11]


def write(writer, trained, step, seed=0):
    canonical, state = trained
    state = state._replace(step=jnp.int32(step), skipped=jnp.int32(seed))
    writer.save(canonical, state, KEY, rows=6 * step, identity={"lr": 1e-2}, config={})


@pytest.mark.parametrize("saved_by", ["another writer", "the same writer"])
def test_a_step_that_is_done_again_after_its_checkpoint_was_damaged_is_written_again(saved_by, trained, tmp_path):
    writer = checkpoints.Writer(tmp_path)
    for step in (1, 2):
        write(writer, trained, step)
    if saved_by == "another writer":
        writer.close()
    else:
        writer._finish()
    flip(largest_file(tmp_path / "2/state"))
    if saved_by == "another writer":
        writer = checkpoints.Writer(tmp_path)
    assert int(load(tmp_path, trained[0], say=lambda text: None).state.step) == 1
    for step in (2, 3):
        write(writer, trained, step)
    writer.close()
    assert checkpoints.steps_in(tmp_path) == [1, 2, 3] and (tmp_path / "damaged-2").is_dir()
    shutil.rmtree(tmp_path / "3")
    assert int(load(tmp_path, trained[0]).state.step) == 2


def test_a_damaged_checkpoint_does_not_count_among_the_newest(trained, tmp_path):
    with checkpoints.Writer(tmp_path, keep=2) as writer:
        for step in (1, 2):
            write(writer, trained, step)
    flip(largest_file(tmp_path / "2/state"))
    with checkpoints.Writer(tmp_path, keep=2) as writer:
        load(tmp_path, trained[0], say=lambda text: None)
        write(writer, trained, 3)
    assert checkpoints.steps_in(tmp_path) == [1, 3]


def test_a_state_that_is_there_is_not_written_twice_and_another_is_not_put_in_its_place(trained, folder):
    before = contents(folder)
    with checkpoints.Writer(folder) as writer:
        write(writer, trained, 2)
        with pytest.raises(Stop, match="step 2 cannot be written: .*2 holds another state of the same step"):
            write(writer, trained, 2, seed=1)
        with pytest.raises(Stop, match="step 1 cannot be written: .* holds the checkpoint of step 2, which is later"):
            write(writer, trained, 1)
    assert contents(folder) == before


def test_a_full_disk_is_named_and_the_last_good_checkpoint_stays(trained, folder):
    canonical, state = trained
    writer, before = checkpoints.Writer(folder), contents(folder / "2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(Stop, match=r"a checkpoint cannot be written to .*File too large"):
            writer.save(canonical, state._replace(step=jnp.int32(3)), KEY, rows=0, identity={}, config={})
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(folder / "2") == before and int(load(folder, canonical).state.step) == 2


def test_numbers_that_keep_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_keep is 0"):
        checkpoints.Writer(tmp_path, keep=0)
