import jax
import pytest

from speed_measure.speed_passes import Excerpt, PassTimes, again
from vocabpp_jax import Pipeline, make_mesh, models, schedules

CONFIG = models.named("gpt-tiny", layers=3, hidden=8, heads=2, seq=4, vocab_size=19)


def pipeline(method, counts=None):
    schedule = schedules.build("1f1b", method, p=2, m=4, layer_counts=counts)
    return Pipeline(models.build(CONFIG), schedule, make_mesh(2, devices=jax.devices()[:2]))


def batch():
    tokens = jax.random.randint(jax.random.key(1), (4, 1, 4), 0, 19)
    return {"tokens": tokens, "labels": tokens}


@pytest.mark.thorough
def test_passes_are_timed_with_the_real_ones_and_add_up_to_a_step():
    """A clock that counts instead of timing: an excerpt of n intervals costs what its passes were said to cost."""
    pipe = pipeline("redis", counts=(2, 1))
    params, clock = pipe.shard(pipe.model.init(jax.random.key(0))), iter(range(10_000))

    def timed(run):
        jax.block_until_ready(run())  # every excerpt really runs
        return float(next(clock))

    times = PassTimes(intervals=2)
    times.prepare(pipe, params, batch())
    times.round(timed)
    found = times.durations(pipe)
    assert len(found.F) == len(found.B) == 2
    # The clock goes on by one an excerpt, and two intervals share it; the stages' passes are different excerpts.
    assert found.F[0] != found.F[1] and min(*found.F, *found.B) > 0
    assert found.H[0] == 0 < found.H[1] and found.IF[1] == 0 < found.IF[0]
    account = times.account(pipe)
    assert account["F"] == pytest.approx(1e3 * 4 * sum(found.F))


@pytest.mark.parametrize(("kind", "products"), [("F", 6), ("S", 2)])
def test_the_compiler_leaves_a_pass_whole_that_nothing_reads(kind, products):
    pipe = pipeline("vocab-2", counts=(2, 1))
    found = [i for s in pipe.program.segments for i in s.body if (i.op, i.name) == ("run", kind)][0]
    body = (again(pipe, found, 1, None),)
    excerpt = Excerpt(pipe.model, pipe.schedule, pipe.mesh, whole=pipe.program, body=body, intervals=1)
    shapes = jax.eval_shape(batch)
    compiled = excerpt.jit(excerpt.value_and_grad).lower(pipe.layout.shapes(), shapes).compile()
    assert compiled.as_text().count(" dot(") >= products


def test_an_instruction_runs_again_in_every_interval_on_the_devices_named():
    pipe = pipeline("vocab-2")
    F = next(i for s in pipe.program.segments for i in s.body if (i.op, i.name) == ("run", "F"))
    tables = again(pipe, F, 6, (1,)).tables
    assert (tables["microbatch"][:, 0] == -1).all() and tables["microbatch"][:, 1].tolist() == [0, 1, 2, 3, 0, 1]
    assert tables["residual"][:, 1].max() == pipe.program.rings["residual"] - 1
