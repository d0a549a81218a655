"""The planner: what it counts, ranks, refuses and writes."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import needs_gpu_packages

from paper.calibration import frozen
from paper.settings import published
from planning_run import cpu
from vocabpp_jax import models, plan
from vocabpp_jax.planning.bound import least_seconds
from vocabpp_jax.planning.footprint import MARGIN
from vocabpp_jax.planning.ranking import Ranking
from vocabpp_jax.schedules import SCHEDULES, Durations, build, lower, methods_of, simulate
from vocabpp_jax.schedules.simulation.cost import Cost, Sizes, load_gpu
from vocabpp_jax.schedules.simulation.simulator import GPU
from vocabpp_jax.schedules.simulation.step_cost import StepCost

# cuDNN's attention is traced, which takes jax's GPU packages and no GPU.
pytestmark = [pytest.mark.a100, needs_gpu_packages]
ROOT = Path(__file__).parent.parent
A100 = load_gpu("a100-80g")
SMALL = models.named("gpt-small", layers=8, hidden=512, heads=8, seq=512, vocab_size=50_000, dtype="bfloat16")


def asked(config, *residuals):
    """The fields of a request that say what model it is."""
    named = {kept: models.build(replace(config, residuals=kept)) for kept in residuals or plan.RESIDUALS}
    return dict(sizes=models.cost_sizes(config), models=named, dtype=config.dtype)


def request(**changes):
    given = asked(SMALL) | dict(gpu=A100, gpus=8, memory_bytes=8 * 2**30, global_batch=64, schedules=("1f1b",))
    return plan.Request(**given | changes)


def pipe_only(row, gpu, method):
    """The ranking of a published row's setting, and the choice that a method is there."""
    given = dict(gpu=gpu, gpus=row.gpus, memory_bytes=85e9, global_batch=128, max_tensor=1, redis_split="published")
    ranking = Ranking(plan.Request(**asked(row.model.config(), "selective"), **given))
    return ranking, plan.Choice(row.gpus, 1, 1, row.order, method, None, 1, "selective", False)


# --- memory ----------------------------------------------------------------------------------------------------------


def with_activations(footprint, program, stored):
    """The program in which as many weight gradients wait as store so many GiB: their number changes with the sizes."""
    if "carried" not in program.rings:
        return program
    one = footprint.choice.microbatch_size * footprint.depth * footprint.part.carried / 2**30
    more = round((stored - footprint.bytes(program).activations / 2**30) / one)
    return replace(program, peaks=program.peaks | {"carried": tuple(n + more for n in program.peaks["carried"])})


@pytest.mark.thorough
def test_estimated_memory_is_within_the_margin_of_what_112_published_settings_compile_to():
    settings = {(row.order, row.gpus): row for table in (5, 6) for row in published(table)}
    rankings, programs, off = {}, {}, []
    with (ROOT / "docs" / "results" / "memory.csv").open() as file:
        for line in csv.DictReader(file):
            setting = settings[line["schedule"], int(line["GPUs"])]
            row = replace(setting, seq=int(line["s"]), vocab_size=int(line["V"]), method=line["method"])
            key = row.order, row.gpus, row.seq
            if key not in rankings:
                rankings[key] = pipe_only(row, A100, row.method)[0].request
            ranking = Ranking(replace(rankings[key], sizes=models.cost_sizes(row.model.config())))
            choice = plan.Choice(row.gpus, 1, 1, row.order, row.method, None, 1, "selective", False)
            key = row.order, row.gpus, row.method
            if key not in programs:  # of redis too: only its layers depend on the vocabulary
                programs[key] = ranking.best_program(choice)
            stored = float(line["activations in flight"])
            footprint = ranking.footprint(choice)
            program = with_activations(footprint, programs[key], stored)
            assert footprint.bytes(program).activations / 2**30 == pytest.approx(stored, rel=1e-3)
            off.append(footprint.bytes(program).peak / 2**30 / float(line["compiled"]) - 1)
    assert len(off) == 112
    assert min(off) > -MARGIN / 2 and max(off) < 0.06


def test_sharding_the_optimizer_divides_twelve_bytes_a_parameter():
    ranking = Ranking(request())
    whole, sharded = (
        plan.Choice(2, 1, 4, "1f1b", "vocab-2", None, 1, "selective", sharded) for sharded in (False, True)
    )
    n = ranking.footprint(whole).parameters
    state = {c: ranking.bytes(c) for c in (whole, sharded)}
    assert state[whole].parameters + state[whole].optimizer == pytest.approx(12 * n)
    assert state[sharded].parameters + state[sharded].optimizer == pytest.approx(3 * n)
    assert state[sharded].gradients == state[whole].gradients
    assert ranking.step_seconds(sharded) < ranking.step_seconds(whole)


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_program_beats_the_bound_and_few_microbatches_tell_of_many(schedule):
    for method in methods_of(schedule):
        cost = StepCost(Cost(Sizes(16, 2048, 2048, 64_000), A100))
        few, many = 24, 52 if schedule != "gpipe" else 24
        program = lower(build(schedule, method, p=4, m=many))
        durations = cost.durations(program.schedule)
        took = simulate(program, durations, GPU).makespan
        assert least_seconds(build(schedule, method, p=4, m=1), durations, many) <= took
        short = simulate(lower(build(schedule, method, p=4, m=few)), durations, GPU)
        assert short.makespan + (many - few) * short.steady_interval == pytest.approx(took, rel=0.01)


def test_a_tensor_axis_divides_a_layer_and_adds_its_sums():
    z = Sizes(16, 4096, 2048, 64_000)
    one, two = (StepCost(Cost(z, A100), tensor=T, share=1 / T) for T in (1, 2))
    schedule = build("1f1b", "vocab-2", p=4, m=1)
    a, b = one.durations(schedule), two.durations(schedule)
    sums = 4 * 2 * A100.all_reduce(2 * z.bsh, 2)  # four layers a stage, two sums each
    assert b.F[0] - sums == pytest.approx(a.F[0] / 2, rel=0.02)
    assert b.S < a.S and b.grad_sum > a.grad_sum
    assert two.tensor_sums(schedule) == pytest.approx(2 * sums)


def test_without_tensor_data_or_recomputation_a_step_s_passes_are_the_pipeline_s():
    cost, schedule = Cost(Sizes(16, 4096, 2048, 64_000), A100), build("v-half", "vocab-1", p=8, m=1)
    assert StepCost(cost).durations(schedule) == cost.durations(schedule)


def test_copies_of_two_nodes_sum_gradients_slower_than_those_of_one():
    cost = Cost(Sizes(16, 4096, 2048, 64_000), A100)
    inside, between = StepCost(cost, data=2).gradient_sums(1e9, p=4), StepCost(cost, data=2).gradient_sums(1e9, p=8)
    assert between > 5 * inside
    assert StepCost(cost, data=1).gradient_sums(1e9, p=8) == 0
    assert StepCost(cost, data=2, shard_optimizer=True).gradient_sums(1e9, p=4) < inside


@pytest.mark.parametrize("gpus", [8, 32])
def test_methods_rank_as_published_where_they_differ_by_two_points(gpus):
    rows = [row for row in published(5) if row.gpus == gpus and row.mfu is not None]
    settings = {(row.seq, row.vocab_size) for row in rows if row.vocab_size in (32_000, 256_000)}
    compared = 0
    for setting in settings:
        took = {}
        for row in (r for r in rows if (r.seq, r.vocab_size) == setting):
            ranking, choice = pipe_only(row, frozen(5), row.method)
            took[row.method] = ranking.step_seconds(choice), row.mfu
        for (a, mfu_a), (b, mfu_b) in itertools.combinations(took.values(), 2):
            if abs(mfu_a - mfu_b) > 2:
                compared += 1
                assert (a < b) == (mfu_a > mfu_b)
    assert compared >= 20


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_the_best_first_search_finds_what_trying_everything_finds():
    what = request(methods=("baseline", "vocab-1", "vocab-2"), microbatch_sizes=(1, 2))
    ranking = Ranking(what)
    fits = [c for c in what.choices() if ranking.bytes(c).peak <= what.memory_bytes * (1 - MARGIN)]
    every = sorted(ranking.step_seconds(c) for c in fits)
    found = plan.rank(what, 6)
    assert [p.step_seconds for p in found.plans] == pytest.approx(every[:6])
    assert all(p.estimated.peak <= what.memory_bytes for p in found.plans)
    assert found.choices == len(what.choices())


def test_less_memory_makes_smaller_plans_and_says_what_was_dropped():
    ample = plan.rank(request(), 1).plans[0]
    scarce = plan.rank(request(memory_bytes=0.8 * ample.estimated.peak), 1)
    assert scarce.plans[0].estimated.peak < 0.8 * ample.estimated.peak
    assert scarce.plans[0].step_seconds > ample.step_seconds
    assert ample.choice in [d.choice for d in scarce.dropped]
    smaller = Ranking(request()).smaller(ample, steps=2)
    assert [p.estimated.peak for p in smaller] == sorted((p.estimated.peak for p in smaller), reverse=True)


def test_choices_use_every_gpu_and_keep_tensor_in_a_node():
    for p, T, d in request(gpus=24, max_tensor=4).layouts():
        assert p * T * d == 24 and T in (1, 2, 4) and p <= 8
    sizes = {c.microbatch_size for c in request(global_batch=24, gpus=4, stages=(4,), max_tensor=1).choices()}
    assert sizes == {1, 2, 4, 8}


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(global_batch=7, max_tensor=1, gpus=16), "the nearest batch that one divides is"),
        (dict(memory_bytes=2**20), "GiB: give that much, or more GPUs than 8"),
        (dict(gpus=13, max_tensor=1, stages=(3,)), "the nearest number below is 12"),
        (dict(schedules=("v-half",), stages=(8,)), "schedules is v-half"),
        (dict(gpus=0), "gpus is 0"),
        (dict(methods=("vocab-9",)), "methods has 'vocab-9'"),
        (dict(microbatch_sizes=(0,)), "microbatch_sizes has 0"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence_with_the_nearest_that_can(changes, said):
    with pytest.raises(ValueError) as problem:
        plan.rank(request(**changes))
    assert said in str(problem.value) and "\n" not in str(problem.value)


def test_durations_of_one_stage_bound_nothing_but_work():
    assert least_seconds(build("1f1b", "baseline", p=1, m=1), Durations(F=1, B=2, H=1), 10) == pytest.approx(40)


def test_cores_are_described_by_the_passes_they_ran_and_planned_for(tmp_path):
    true = replace(cpu.described(1e10), layer_traffic=90.0, intra_latency=4e-4, matmul_efficiency=0.8)
    found = []
    for model, method, size in cpu.CASES:
        schedule = build("1f1b", method, p=2, m=1, overlap=False)
        times = Cost(models.cost_sizes(model.config(), size), true).durations(schedule).scaled(1e3)
        found.append((model, method, size, times.__dict__))
    fitted = cpu.fitted(found, cpu.described(1e10))
    assert all(modelled == pytest.approx(took, rel=0.02) for _, took, modelled in cpu.compared(found, fitted))
    file = tmp_path / "cpu.toml"
    file.write_text(cpu.as_toml(fitted))
    read = load_gpu(str(file))
    assert not read.overlaps and read.layer_traffic == pytest.approx(fitted.layer_traffic, rel=1e-3)
    config = models.named("gpt-micro", vocab_size=32_768)
    given = asked(config, "selective") | dict(gpu=read, gpus=2, memory_bytes=8e9, global_batch=8, stages=(2,))
    best = plan.rank(plan.Request(**given, max_tensor=1, schedules=("1f1b",)), 1).plans[0]
    assert best.choice.method not in ("baseline", "redis")  # the head weighs more than all layers
