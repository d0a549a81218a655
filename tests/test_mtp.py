"""Multi-token prediction: pipelines with a tail against one device, under every schedule and method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from test_pipeline import D, L, assert_parity, batch_of, pipeline, plain_model

import mtp
from parity_check.parity_compare import compare
from parity_check.parity_matrix import case, combinations
from vocabpp_jax import models, schedules
from vocabpp_jax import training as train
from vocabpp_jax.checkpoints.canonical import Canonical
from vocabpp_jax.models import huggingface, reference_sums
from vocabpp_jax.pipeline.model_interface import Tail
from vocabpp_jax.schedules.lowering.check_program import check_program
from vocabpp_jax.schedules.simulation.cost import Cost, Sizes, load_gpu


def with_tail(layers: int, depths: int = 1, tied: bool = False, **changes):
    """The plain model with a tail of pure functions, and learned positions."""

    def depth(w, h, embedded, aux_inputs):
        return (
            h
            + jnp.tanh(jnp.concatenate([h, embedded * w["gain"]], -1) @ w["in"] + aux_inputs.get("shift", 0)) @ w["out"]
        )

    def init_depth(key, depth):
        one, two = jax.random.split(key)
        return {
            "gain": jnp.full((D,), 0.5),
            "in": 0.3 * jax.random.normal(one, (2 * D, 2 * D)),
            "out": 0.3 * jax.random.normal(two, (2 * D, D)),
        }

    tail = Tail(depths=depths, weight=0.7, depth=depth, init_depth=init_depth)
    return dataclasses.replace(plain_model(layers, tied), tail=tail, positions=L + 2, **changes)


def batch_with_documents(m: int, data: int = 1):
    """A batch whose rows have two documents each."""
    batch = batch_of(m, data, aux_inputs=True)
    ids = np.broadcast_to(np.arange(L) >= np.arange(m)[:, None, None] % L, batch["tokens"].shape)
    return batch | {"aux_inputs": batch["aux_inputs"] | {"segment_ids": ids.astype(np.int32)}}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("schedule", "method", "p", "depths", "tied", "data"),
    [
        ("1f1b", "vocab-2", 2, 1, False, 2),
        ("1f1b", "vocab-1", 3, 2, True, 1),
        ("zb-h1", "vocab-2", 2, 2, True, 1),
        ("v-half", "baseline", 2, 1, False, 1),
    ],
)
def test_a_pipeline_with_a_tail_computes_what_one_device_computes(schedule, method, p, depths, tied, data):
    built = schedules.build(schedule, method, p=p, m=3)
    assert_parity(pipeline(built, with_tail(built.stages, depths, tied), data), batch_with_documents(3, data))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("tied", "data"), [(False, 2), (True, 1)])
def test_an_unsharded_embedding_and_its_copy_have_one_gradient(tied, data):
    pipe, batch = (
        pipeline(schedules.build("1f1b", "baseline", p=2, m=3), with_tail(2, 1, tied), data),
        batch_with_documents(3, data),
    )
    canonical = pipe.model.init(jax.random.key(0))
    loss, grads = pipe.jit(pipe.value_and_grad)(pipe.shard(canonical), batch)
    want_loss, want = jax.value_and_grad(lambda c: models.reference_loss(pipe.model, c, **batch))(canonical)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6), pipe.layout.unpack(grads), want)
    assert set(grads["ahead"]) == {"positions"} | (set() if tied else {"tokens"})
    for name, copy in grads["ahead"].items():
        np.testing.assert_array_equal(copy, np.asarray(grads["embed"][name])[::-1] * [[[0]], [[1]]])
    np.testing.assert_allclose(train.global_norm(pipe, grads), optax.tree.norm(want), rtol=1e-5)


@pytest.mark.parametrize("method", ["baseline", "vocab-2"])
def test_evaluation_gives_a_mean_for_every_token_ahead(method):
    pipe, batch = pipeline(schedules.build("1f1b", method, p=2, m=3), with_tail(2, depths=2)), batch_with_documents(3)
    canonical = pipe.model.init(jax.random.key(0))
    sums, counts, _ = reference_sums(pipe.model, canonical, **batch)
    losses = pipe.jit(pipe.evaluate_depths)(pipe.shard(canonical), batch)
    np.testing.assert_allclose(losses, sums / counts, rtol=1e-5)
    assert counts[0] > counts[1] > counts[2] > 0
    optimizer = optax.sgd(0.1)
    state = train.start_from(pipe, optimizer, pipe.shard(canonical))
    metrics = train.make_step(pipe, optimizer)(state, batch)[1]
    np.testing.assert_allclose(metrics["main_loss"], sums[0] / counts[0], rtol=1e-5)
    further = 0.7 / 2 * (sums[1] + sums[2]) / counts[0]
    np.testing.assert_allclose(metrics["loss"], metrics["main_loss"] + further, rtol=1e-5)


@pytest.mark.thorough
def test_an_architecture_with_a_tail_runs_on_a_tensor_axis():
    result = compare(case("1f1b", "vocab-2", 2, 3, False, model="llama-tiny", tensor=2, mtp_depth=1))
    assert max(result.loss_error, result.max_grad_error) <= 1e-5, result.grad_errors
    assert result.in_flight == result.promised_in_flight and not result.clobbered


@pytest.mark.thorough
def test_a_key_gives_the_same_tail_in_every_layout():
    model = with_tail(2, depths=2)
    want = jax.device_get(jax.jit(model.init)(jax.random.key(3)))
    for method, data in (("baseline", 2), ("vocab-2", 2)):
        pipe = pipeline(schedules.build("1f1b", method, p=2, m=2), model, data)
        params = pipe.init(jax.random.key(3))
        jax.tree.map(np.testing.assert_array_equal, pipe.layout.unpack(params), want)
        jax.tree.map(np.testing.assert_array_equal, params, pipe.shard(want))


def test_a_checkpoint_takes_the_tail_and_its_moments_to_another_layout():
    model, optimizer = with_tail(2), optax.adam(1e-3)
    of, to = (pipeline(schedules.build("1f1b", method, p=2, m=2), model) for method in ("baseline", "vocab-2"))
    state = train.init_state(of, optimizer, jax.random.key(0))
    state = state._replace(optimizer=jax.tree.map(lambda x: x + 1, state.optimizer))
    flat = Canonical(of, optimizer).flatten(state)
    there = Canonical(to, optimizer).unflatten(jax.device_get(flat))
    assert {"params.tail.0.in", "optimizer.0.mu.tail.0.in"} <= set(flat)
    for before, after in ((state.params, there.params), (state.optimizer[0].mu, there.optimizer[0].mu)):
        jax.tree.map(np.testing.assert_array_equal, of.layout.unpack(before), to.layout.unpack(after))


@pytest.mark.parametrize(("schedule", "method"), combinations())
def test_a_tail_adds_rings_and_changes_no_other(schedule, method):
    counts = (1,) * 4 if method == "redis" else None
    plain = schedules.build(schedule, method, p=4, m=7, layer_counts=counts)
    tail = dataclasses.replace(plain, depths=1)
    for built in (tail, schedules.evaluation(tail)):
        check_program(schedules.lower(built))
    before, after = schedules.lower(plain), schedules.lower(tail)
    assert {ring: after.peaks[ring] for ring in before.peaks} == before.peaks
    in_flight = before.in_flight[plain.placement[-1]]
    assert after.rings["tail_residual"] <= in_flight and "streams" in after.rings


def test_an_export_is_the_model_without_its_tail_and_the_tail_beside_it(tmp_path):
    config = models.named("llama-tiny", layers=2)
    pipe = pipeline(schedules.build("1f1b", "vocab-2", p=2, m=2), models.build(config, mtp_depth=1))
    params = pipe.init(jax.random.key(0))
    huggingface.save(tmp_path / "out", config, params, pipe)
    canonical = jax.device_get(pipe.layout.unpack(params))
    found, main = huggingface.load_canonical(tmp_path / "out")
    assert found.layers == 2 and "tail" not in main
    jax.tree.map(np.testing.assert_array_equal, main, {k: v for k, v in canonical.items() if k != "tail"})
    tail = load_file(tmp_path / "out" / "mtp.safetensors")
    assert len(tail) == len(jax.tree.leaves(canonical["tail"]))
    kernel = canonical["tail"][0]["project"]["kernel"]
    np.testing.assert_array_equal(tail["tail.0.project.kernel"], kernel)

    read = jax.device_get(pipe.layout.unpack(huggingface.load(tmp_path / "out", pipe)))
    jax.tree.map(np.testing.assert_array_equal, read, canonical)
    two = pipeline(schedules.build("1f1b", "vocab-2", p=2, m=2), models.build(config, mtp_depth=2))
    with pytest.raises(ValueError, match=r"mtp.safetensors has no tensor 'tail.1.block"):
        huggingface.check(tmp_path / "out", two)
    (tmp_path / "out" / "mtp.safetensors").unlink()
    with pytest.raises(ValueError, match="mtp_depth is 1 and .*out has no mtp.safetensors"):
        huggingface.check(tmp_path / "out", pipe)


def test_the_cost_model_counts_the_tail_on_the_last_device():
    gpu = load_gpu("a100-80g")
    plain, tail = (Cost(Sizes(32 - depths, 3072, 2048, 32_000, depths=depths), gpu) for depths in (0, 1))
    schedule = schedules.build("1f1b", "vocab-2", p=8, m=16)
    before, after = plain.durations(schedule), tail.durations(schedule)
    assert after.F[:-1] == before.F[:-1] and 1.0 < after.F[-1] / before.F[-1] < 1.06  # a projection beside a layer
    assert 1.5 < after.S / before.S < 2.0 and after.IB == before.IB
    assert after.hidden_broadcast > 1.5 * before.hidden_broadcast and after.embed_sum == before.embed_sum
    more = np.subtract(tail.state(schedule), plain.state(schedule))
    np.testing.assert_allclose(more, [0] * 7 + [18 * 2 * 3072**2])
    z = tail.sizes
    assert z.iteration_flops(1) == 31 * z.layer_flops + 2 * z.head_flops + z.layer_flops + 12 * z.bsh * z.hidden
    simulated = schedules.simulate(schedules.lower(dataclasses.replace(schedule, depths=1)), after)
    rings = {"ahead", "behind", "streams", "returned", "tail_residual"}
    assert rings <= set(simulated.program.rings) & set(tail.cell_bytes(schedule))
    assert tail.peak_bytes(simulated)[-1] > plain.peak_bytes(schedules.simulate(schedules.lower(schedule), before))[-1]


@pytest.mark.parametrize("V", [32_000, 256_000])
def test_on_32_stages_a_step_grows_by_what_the_tail_computes(V):
    (ms, flops), *grown = (mtp.iteration(mtp.MtpOptions(), "21B", 32, V, "vocab-2", depths) for depths in (0, 1, 2))
    for longer, more in grown:
        assert 0.97 * more / flops <= longer / ms <= 1.002 * more / flops


def test_each_depth_counts_as_a_layer_of_the_last_stage():
    assert schedules.even_split(8, 4, depths=1) == (2, 2, 2, 2)
    assert schedules.even_split(7, 4, depths=1) == (2, 2, 2, 1)
    assert schedules.even_split(6, 4, depths=3) == (2, 2, 2, 0)
    assert schedules.even_split(6, 4) == (1, 1, 2, 2)


def test_what_predicts_no_further_token_is_refused():
    config = models.named("gpt-tiny")
    with pytest.raises(ValueError, match="mtp_depth is -1; it must be 0, for none, or more"):
        models.build(config, mtp_depth=-1)
    with pytest.raises(ValueError, match="mtp_weight is 0; it must be above 0 and finite"):
        models.build(config, mtp_depth=1, mtp_weight=0)
    pipe = pipeline(schedules.build("1f1b", "vocab-2", p=2, m=2), with_tail(2, depths=L))
    with pytest.raises(ValueError, match=f"tokens has length {L}; predicting {L} further tokens takes a longer"):
        pipe.value_and_grad(pipe.layout.shapes(), batch_of(2))
