"""Batches of tokens: any can be had at any time, on any host, and no window is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax import data
from vocabpp_jax.data.batches import Windows


def batches(tokens, seed=0, microbatches=3, batch=2, seq=5):
    return data.training_batches(tokens, microbatches=microbatches, batch=batch, seq=seq, seed=seed)


def test_a_batch_depends_on_the_seed_and_its_index_only():
    tokens = np.arange(1000)
    forwards = [batches(tokens, seed=7)[k] for k in range(40)]
    again = batches(tokens, seed=7)
    for k in reversed(range(40)):
        np.testing.assert_equal(again[k], forwards[k])
    assert not np.array_equal(batches(tokens, seed=8)[0]["tokens"], forwards[0]["tokens"])


@given(
    length=st.integers(40, 200), m=st.integers(1, 3), b=st.integers(1, 3), s=st.integers(1, 4), k=st.integers(0, 10**9)
)
def test_labels_are_the_tokens_one_later(length, m, b, s, k):
    batch = batches(np.arange(length, dtype=np.uint16), microbatches=m, batch=b, seq=s)[k]
    assert batch["tokens"].shape == batch["labels"].shape == batch["mask"].shape == (m, b, s)
    assert batch["tokens"].dtype == batch["labels"].dtype == np.int32 and batch["mask"].dtype == np.float32
    assert np.array_equal(batch["labels"], batch["tokens"] + 1) and batch["mask"].all()


def test_every_window_comes_once_an_epoch_in_a_new_order():
    tokens = np.arange(5 * 12 + 1)  # 12 windows: two batches of 6
    taken = batches(tokens)
    epochs = [np.concatenate([taken[2 * e + i]["tokens"].reshape(-1, 5)[:, 0] for i in range(2)]) for e in range(4)]
    assert all(sorted(epoch) == list(range(0, 60, 5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_corpus_of_exactly_one_batch_is_enough_and_one_token_less_is_not():
    batches(np.arange(31))
    with pytest.raises(ValueError, match="30 tokens, too few for one batch of 6 sequences of 5, which takes 31"):
        batches(np.arange(30))


@pytest.mark.parametrize("windows, at_most, expected", [(12, None, 12), (13, None, 13), (4, None, 4), (50, 2, 12)])
def test_validation_counts_every_window_once(windows, at_most, expected):
    tokens = np.arange(5 * windows + 1)
    taken = data.validation_batches(tokens, microbatches=3, batch=2, seq=5, at_most=at_most)
    seen = [row[0] for i in range(len(taken)) for row in taken[i]["tokens"][taken[i]["mask"][..., 0] == 1]]
    assert len(seen) == len(set(seen)) == expected
    assert all(taken[i]["tokens"].shape == (3, 2, 5) for i in range(len(taken)))


def test_validation_too_short_for_one_sequence_is_named():
    with pytest.raises(ValueError, match="validation split has 5 tokens, too few for a sequence of 5"):
        data.validation_batches(np.arange(5), microbatches=1, batch=1, seq=5)


# --- many hosts, and where to go on


def test_hosts_read_the_columns_of_the_same_batches():
    tokens = np.arange(1000)
    whole = batches(tokens, batch=4)
    parts = [
        data.training_batches(tokens, microbatches=3, batch=4, seq=5, seed=0, columns=columns)
        for columns in ([0, 1], [2], [3])
    ]
    for k in range(20):
        joined = np.concatenate([part[k]["tokens"] for part in parts], axis=1)
        assert np.array_equal(joined, whole[k]["tokens"])


TOKENS = np.arange(5 * 40 + 1)


@pytest.fixture(scope="module")
def straight():
    return np.concatenate([batches(TOKENS)[k]["tokens"].reshape(-1, 5) for k in range(60)])


@given(rows=st.integers(0, 300), batch=st.integers(1, 4))
def test_a_run_goes_on_at_any_row_with_batches_of_any_size(rows, batch, straight):
    on = data.training_batches(TOKENS, microbatches=2, batch=batch, seq=5, seed=0, start=rows)
    assert np.array_equal(on[1]["tokens"].reshape(-1, 5), straight[rows + 2 * batch : rows + 4 * batch])


def test_prefetched_batches_come_in_order():
    taken = batches(np.arange(1000))
    ahead = data.prefetched(taken)
    for k in range(5):
        np.testing.assert_equal(next(ahead), taken[k])


# --- document masks


@given(lengths=st.lists(st.integers(1, 9), min_size=4, max_size=30), seq=st.integers(1, 12))
def test_document_masks_number_documents_and_leave_out_labels_of_the_next(lengths, seq):
    document = np.repeat(np.arange(len(lengths)), lengths)
    if len(document) <= seq:
        return
    row = Windows(document, seq, np.cumsum(lengths))[0]
    tokens, labels = row["tokens"], row["labels"]  # a token is the number of its document
    assert np.array_equal(row["aux_inputs"]["segment_ids"], tokens - tokens[0])
    assert np.array_equal(row["mask"], tokens == labels)
