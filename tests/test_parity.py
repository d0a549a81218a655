"""Losses and gradients of whole pipelines against one device: every schedule, every method, every kind of edge.

The complete matrix is ``python experiments/parity.py --all``.
"""

import dataclasses

import jax
import pytest

from parity_check.parity_compare import Case, compare
from parity_check.parity_matrix import case, combinations

# schedule, method, stages, microbatches, tied, data: a stage alone, odd numbers, fewer microbatches than stages, more
# than three a stage, multiples of three (V-Min's own case), even and odd (V-Half's).
SELECTION = [
    ("1f1b", "baseline", 1, 2, False, 1),
    ("1f1b", "baseline", 4, 3, True, 1),
    ("1f1b", "redis", 4, 5, False, 1),
    ("1f1b", "interlaced", 5, 6, True, 1),
    ("1f1b", "vocab-naive", 2, 5, False, 1),
    ("1f1b", "vocab-1", 3, 9, True, 1),
    ("1f1b", "vocab-2", 1, 3, True, 1),
    ("1f1b", "vocab-2", 8, 1, False, 1),
    ("gpipe", "baseline", 2, 3, False, 1),
    ("gpipe", "vocab-1", 2, 4, True, 1),
    ("gpipe", "vocab-2", 3, 5, False, 1),
    ("interleaved-1f1b", "baseline", 2, 5, True, 1),
    ("interleaved-1f1b", "vocab-1", 3, 2, False, 1),
    ("interleaved-1f1b", "vocab-2", 2, 3, False, 1),
    ("zb-h1", "baseline", 3, 7, False, 1),
    ("zb-h1", "vocab-1", 2, 3, True, 1),
    ("zb-h1", "vocab-2", 4, 5, False, 2),
    ("zb-h2", "baseline", 2, 1, False, 1),
    ("zb-h2", "vocab-1", 3, 4, False, 1),
    ("zb-h2", "vocab-2", 2, 5, True, 1),
    ("v-min", "baseline", 2, 3, True, 1),
    ("v-min", "vocab-1", 2, 5, False, 1),
    ("v-min", "vocab-2", 3, 4, False, 1),
    ("v-half", "baseline", 3, 2, False, 1),
    ("v-half", "vocab-1", 4, 3, True, 1),
    ("v-half", "vocab-2", 2, 5, False, 2),
    ("v-zb", "baseline", 2, 5, True, 1),
    ("v-zb", "vocab-1", 2, 2, False, 1),
    ("v-zb", "vocab-2", 3, 3, True, 1),
]
WITHOUT_OVERLAP = [
    ("1f1b", "vocab-1", 2, 5),
    ("1f1b", "vocab-2", 4, 5),
    ("1f1b", "vocab-naive", 2, 3),
    ("1f1b", "interlaced", 3, 4),
    ("gpipe", "vocab-2", 2, 3),
    ("interleaved-1f1b", "vocab-1", 2, 3),
    ("zb-h1", "vocab-2", 3, 4),
    ("v-half", "vocab-1", 2, 5),
]
NEWEST = {("1f1b", "vocab-2", 1), ("1f1b", "vocab-1", 3), ("v-half", "vocab-2", 2)}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("schedule", "method", "p", "m", "tied", "data"),
    [
        pytest.param(*c, id="-".join(map(str, c)), marks=[pytest.mark.newest] if c[:3] in NEWEST else [])
        for c in SELECTION
    ],
)
def test_a_pipeline_computes_what_one_device_computes(schedule, method, p, m, tied, data):
    result = compare(case(schedule, method, p, m, tied, data))
    assert max(result.loss_error, result.max_grad_error) <= 1e-5, result.grad_errors
    assert result.in_flight == result.promised_in_flight and not result.clobbered


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("schedule", "method", "p", "m"), WITHOUT_OVERLAP)
def test_waiting_for_every_collective_changes_no_gradient(schedule, method, p, m):
    result = compare(case(schedule, method, p, m, True, overlap=False))
    assert max(result.loss_error, result.max_grad_error) <= 1e-5, result.grad_errors
    assert result.in_flight == result.promised_in_flight and not result.clobbered


EVERY = ("soft_cap", "z_loss", "label_smoothing")
ARCHITECTURES = [
    ("1f1b", "vocab-2", 2, True, "llama-tiny", EVERY, 1),
    ("v-half", "vocab-1", 2, False, "llama-tiny", (), 1),
    ("1f1b", "vocab-1", 4, False, "qwen-tiny", EVERY, 1),
    ("v-half", "vocab-2", 2, True, "qwen-tiny", ("z_loss", "label_smoothing"), 1),
    ("v-half", "vocab-2", 2, False, "gemma-tiny", EVERY, 1),
    ("1f1b", "vocab-1", 2, True, "gemma-tiny", ("label_smoothing",), 1),
    ("1f1b", "vocab-naive", 2, False, "gpt-tiny", EVERY, 1),
    ("1f1b", "baseline", 2, True, "gpt-tiny", EVERY, 1),
    ("1f1b", "vocab-2", 2, False, "llama-tiny", EVERY, 2),
    ("v-half", "vocab-1", 2, True, "qwen-tiny", ("label_smoothing",), 2),
    ("1f1b", "vocab-1", 2, True, "gemma-tiny", (), 2),
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("schedule", "method", "p", "tied", "model", "loss", "tensor"),
    [
        pytest.param(
            *c, id="-".join(map(str, c)), marks=[pytest.mark.newest] if c[4:] == ("llama-tiny", EVERY, 2) else []
        )
        for c in ARCHITECTURES
    ],
)
def test_every_architecture_and_loss_does_so_with_and_without_a_tensor_axis(
    schedule, method, p, tied, model, loss, tensor
):
    result = compare(case(schedule, method, p, 3, tied, model=model, loss=loss, tensor=tensor))
    assert max(result.loss_error, result.max_grad_error) <= 1e-5, result.grad_errors
    assert result.in_flight == result.promised_in_flight and not result.clobbered


@pytest.mark.thorough
def test_the_three_axes_data_pipe_and_tensor_go_together():
    result = compare(case("1f1b", "vocab-2", 2, 3, False, data=2, tensor=2))
    assert max(result.loss_error, result.max_grad_error) <= 1e-5, result.grad_errors


def test_the_selection_covers_every_schedule_with_every_method():
    assert {c[:2] for c in SELECTION} == set(combinations())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("method", "more"), [("baseline", 0), ("vocab-2", 1), ("vocab-1", 2)])
def test_the_running_1f1b_holds_p_minus_r_activations_and_one_more_for_every_barrier(method, more):
    assert compare(case("1f1b", method, 4, 9, False)).in_flight == [4 - r + more for r in range(4)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("method", "tied", "model", "loss"),
    [
        ("vocab-2", False, "gpt-tiny", ()),
        ("vocab-1", True, "gemma-tiny", EVERY),
        ("vocab-naive", False, "gpt-tiny", ()),
    ],
)
def test_in_bfloat16_errors_stay_within_twice_what_one_device_makes(method, tied, model, loss):
    options = case("1f1b", method, 2, 3, tied, model=model, loss=loss)
    result = compare(dataclasses.replace(options, model=dataclasses.replace(options.model, dtype="bfloat16")))
    assert 1e-5 < result.max_grad_error <= result.tolerance < 0.2


@pytest.mark.thorough
def test_the_three_sharded_methods_agree_to_rounding():
    losses = {compare(case("1f1b", method, 2, 3, False)).loss for method in ("vocab-naive", "vocab-1", "vocab-2")}
    assert max(losses) - min(losses) <= 1e-6 * max(losses)


@pytest.mark.thorough
def test_nothing_masked_and_everything_of_one_microbatch_masked_both_hold():
    options = case("1f1b", "vocab-2", 2, 3, False)
    for fraction in (0.0, 0.9):
        assert compare(dataclasses.replace(options, mask_fraction=fraction)).holds
    assert isinstance(options, Case) and jax.device_count() == 8
