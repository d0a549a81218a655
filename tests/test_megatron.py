"""Megatron's indexed datasets are read as they are; what is cut off or contradicts itself is named."""

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabpp_jax import data
from vocabpp_jax.data.megatron import HEADER, MAGIC, TYPES, is_megatron, read_indexed

CASES = Path(__file__).parent / "cases"


def write(folder, documents, code=8, sequences=None):
    """As Megatron's builder writes: a sequence a document, or as many as ``sequences`` says."""
    kind = np.dtype(TYPES[code])
    lengths = np.array([len(d) for d in documents], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) * kind.itemsize
    bounds = np.concatenate([[0], np.cumsum(sequences or [1] * len(documents))]).astype(np.int64)
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(bounds))
    (folder / "set.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    (folder / "set.bin").write_bytes(np.concatenate(documents).astype(kind).tobytes())
    return str(folder / "set.idx")


@pytest.fixture
def documents():
    random = np.random.default_rng(0)
    return [random.integers(0, 100, random.integers(1, 40)) for _ in range(60)]


@pytest.mark.parametrize("code", [1, 4, 5, 8])
@pytest.mark.parametrize("suffix", ["", ".idx", ".bin"])
def test_the_tokens_are_those_that_were_written(tmp_path, documents, code, suffix):
    source = write(tmp_path, documents, code).removesuffix(".idx") + suffix
    assert is_megatron(source)
    dataset = read_indexed(source)
    assert np.array_equal(dataset.tokens, np.concatenate(documents)) and dataset.tokens.dtype == TYPES[code]
    assert np.array_equal(dataset.ends, np.cumsum([len(d) for d in documents]))


def test_a_document_may_be_several_sequences(tmp_path, documents):
    dataset = read_indexed(write(tmp_path, documents, sequences=[2, 58]))
    assert np.array_equal(dataset.ends, np.cumsum([len(d) for d in documents])[[1, 59]])


def test_the_splits_are_whole_documents(tmp_path, documents):
    tokens = data.load_tokens(write(tmp_path, documents), vocab_size=100)
    assert np.array_equal(np.concatenate([tokens.train, tokens.validation]), np.concatenate(documents))
    assert tokens.documents == 60 and len(tokens.validation) >= 0.05 * len(tokens.train) - 40
    train, validation = tokens.ends
    assert train[-1] == len(tokens.train) and validation[-1] == len(tokens.validation)
    whole = data.load_tokens(write(tmp_path, documents[:1]), vocab_size=100)
    assert len(whole.train) + len(whole.validation) == len(documents[0])


@pytest.mark.parametrize("sizes", [[1000, 40], [40, 1000], [500, 500], [900, 60, 40], [10] * 100, [1, 99], [2000]])
def test_about_a_twentieth_of_the_tokens_is_held_out(tmp_path, sizes):
    tokens = data.load_tokens(write(tmp_path, [np.arange(n) % 90 for n in sizes]), vocab_size=100)
    assert 0.025 <= len(tokens.validation) / sum(sizes) <= 0.1
    train, validation = tokens.ends
    expected = np.cumsum(sizes)
    at = len(tokens.train)
    assert np.array_equal(train, [*expected[expected < at], at])
    assert np.array_equal(validation, expected[expected > at] - at)


def test_each_split_has_its_own_ends(tmp_path):
    """Also where both splits are equally long, as in four documents of which the last is half of the tokens."""
    tokens = data.load_tokens(str(CASES / "half.idx"), vocab_size=100)
    train, validation = tokens.ends
    assert train.tolist() == [2, 4, 7] and validation.tolist() == [1]
    two = data.load_tokens(write(tmp_path, [np.array([5]), np.array([6])]), vocab_size=100)
    assert len(two.train) == len(two.validation) == 1
    halves = dataclasses.replace(two, find_ends=lambda: (np.array([1, 4]), np.array([3, 4])))
    assert [ends.tolist() for ends in halves.ends] == [[1, 4], [3, 4]]


def test_documents_of_one_token_leave_no_label_with_document_masks_and_that_is_said():
    tokens = data.load_tokens(str(CASES / "ones.idx"), vocab_size=100)
    shape = {"microbatches": 1, "batch": 2, "seq": 4}
    train, validation = tokens.ends
    with pytest.raises(ValueError, match="the train split has no label that counts: with document masks"):
        data.training_batches(tokens.train, **shape, seed=0, ends=train)
    with pytest.raises(ValueError, match="the validation sample has no label that counts: with document masks"):
        data.validation_batches(tokens.validation, **shape, ends=validation)
    some = data.training_batches(tokens.train, **shape, seed=0, ends=train[train != 1])
    assert sum(some[k]["mask"].sum() for k in range(len(tokens.train) // 8)) <= 1
    data.training_batches(tokens.train, **shape, seed=0)


def test_a_bin_that_is_longer_than_its_index_says_does_not_belong_to_it(tmp_path, documents):
    source = write(tmp_path, documents)
    with (tmp_path / "set.bin").open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(ValueError, match=r"set\.bin is \d+ bytes long; the \d+ tokens of its index take \d+"):
        read_indexed(source)
    assert np.array_equal(read_indexed(source, "skip").tokens, np.concatenate(documents))


def test_suffixes_may_be_in_capitals(tmp_path, documents):
    write(tmp_path, documents)
    for suffix in ("idx", "bin"):
        (tmp_path / f"set.{suffix}").rename(tmp_path / f"SET.{suffix.upper()}")
    for name in ("SET", "SET.IDX", "SET.BIN"):
        assert is_megatron(str(tmp_path / name))
        assert np.array_equal(read_indexed(str(tmp_path / name)).tokens, np.concatenate(documents))


def test_a_cut_off_bin_is_refused_or_its_last_documents_left_out(tmp_path, documents):
    source = write(tmp_path, documents)
    raw = (tmp_path / "set.bin").read_bytes()
    (tmp_path / "set.bin").write_bytes(raw[: len(raw) // 2 + 1])
    with pytest.raises(ValueError, match=r"set\.bin holds \d+ tokens; its index says \d+: it was cut off"):
        data.load_tokens(source, vocab_size=100)
    tokens = data.load_tokens(source, vocab_size=100, damaged="skip")
    kept = np.concatenate([tokens.train, tokens.validation])
    assert np.array_equal(kept, np.concatenate(documents)[: len(kept)]) and tokens.documents < 60
    assert len(tokens.damaged) == 1 and "documents are left out" in tokens.damaged[0]


def spoil(header=None, size=None, at=None):
    def apply(raw):
        raw = bytearray(raw if size is None else raw[:size])
        if header:
            raw[: HEADER.size] = HEADER.pack(*header)
        if at is not None:
            raw[at : at + 4] = struct.pack("<i", 10**6)
        return bytes(raw)

    return apply


@pytest.mark.parametrize(
    "change, sentence",
    [
        (spoil(size=10), "is not the index of a Megatron dataset"),
        (lambda raw: b"\x00" * len(raw), "is not the index of a Megatron dataset"),
        (spoil(header=(MAGIC, 2, 8, 60, 61)), "has version 2; version 1 can be read"),
        (spoil(header=(MAGIC, 1, 6, 60, 61)), "tokens of type code 6; the integer types are 1, 2, 3, 4, 5, 8"),
        (spoil(header=(MAGIC, 1, 8, 2**60, 61)), "was cut off"),
        (spoil(size=-8), "was cut off"),
        (spoil(at=HEADER.size + 4), "its offsets are not those that its lengths add up to"),
        (spoil(at=-8), "its document bounds do not rise from 0 to its 60 sequences"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, documents, change, sentence):
    source = write(tmp_path, documents)
    (tmp_path / "set.idx").write_bytes(change((tmp_path / "set.idx").read_bytes()))
    for damaged in ("refuse", "skip"):
        with pytest.raises(ValueError, match=rf"set\.idx.*{sentence}"):
            read_indexed(source, damaged)


@settings(max_examples=100)
@given(raw=st.binary(max_size=200), keep=st.integers(0, 34))
def test_any_bytes_give_a_sentence_or_tokens(raw, keep, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    source = write(folder, [np.arange(5)] * 3)
    path = folder / "set.idx"
    path.write_bytes(path.read_bytes()[:keep] + raw)
    try:
        read_indexed(source)
    except ValueError as problem:
        assert "set." in str(problem)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path, documents):
    with pytest.raises(ValueError, match=r"none\.idx cannot be read .*a Megatron dataset is .*none\.bin"):
        data.load_tokens(str(tmp_path / "none.idx"), vocab_size=100)
    source = write(tmp_path, documents)
    with pytest.raises(ValueError, match="outside a vocabulary of 50"):
        data.load_tokens(source, vocab_size=50)
    with pytest.raises(ValueError, match="which holds tokens already"):
        data.load_tokens(source, vocab_size=100, tokenizer="tokenizer.json")
    negative = write(tmp_path, [np.array([5, -1, 3] * 20)], code=4)
    with pytest.raises(ValueError, match="the token id -1; token ids are not negative"):
        data.load_tokens(negative, vocab_size=100)
