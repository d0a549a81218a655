"""About a twentieth is held out, by bytes, whatever the documents are; no text is on both sides."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax import data
from vocabpp_jax.data.holdout import HELD_OUT, Sizes, digest_of

CASES = Path(__file__).parent / "cases"
LINE = "the quick brown fox jumps over the lazy dog and goes on\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOCABPP_CACHE", str(tmp_path / "cache"))


def split(texts):
    sizes = Sizes()
    for text in texts:
        sizes.add(*digest_of(text))
    rule = sizes.holdout()
    parts = [rule.split(text) for text in texts]
    return [a for a, _ in parts if a], [b for _, b in parts if b]


def share(train, validation):
    return sum(map(len, validation)) / (sum(map(len, train)) + sum(map(len, validation)))


def text(n, seed):
    return np.random.default_rng(seed).choice(np.frombuffer(b"abcdefgh \n", np.uint8), n).tobytes().decode()


SHAPES = {
    "many of one size": [1000] * 300,
    "one large, one small": [1_000_000, 5_000],
    "one large, many small": [1_000_000] + [50] * 99,
    "two large": [500_000, 600_000],
    "three of one size": [30_000] * 3,
    "powers of two": [2**n for n in range(1, 21)],
    "a few large among small": [100_000] * 6 + [500] * 400,
    "twenty-one": [10_000] * 21,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_about_a_twentieth_is_held_out(shape, seed):
    texts = [text(n, 1000 * seed + i) for i, n in enumerate(SHAPES[shape])]
    train, validation = split(texts)
    assert HELD_OUT / 2 <= share(train, validation) <= 2 * HELD_OUT
    assert sum(map(len, train)) + sum(map(len, validation)) == sum(map(len, texts))


@given(st.lists(st.integers(1, 5000), min_size=60, max_size=200), st.integers(0, 10))
def test_of_many_documents_of_any_size_about_a_twentieth_is_held_out(sizes, seed):
    train, validation = split([text(n, seed * 10_000 + i) + str(i) for i, n in enumerate(sizes)])
    assert HELD_OUT / 2 <= share(train, validation) <= 2 * HELD_OUT


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 30)), min_size=2, max_size=40))
def test_copies_are_on_one_side_or_cut_in_the_same_place(groups):
    texts = [copy for i, (size, count) in enumerate(groups) for copy in [text(size, i) + str(i)] * count]
    train, validation = map(set, split(texts))
    assert not {a for a in train if len(a) > 400} & {b for b in validation if len(b) > 400}
    whole = set(texts)
    assert not train & validation & whole
    assert train and validation


def test_most_of_a_corpus_of_copies_is_not_held_out():
    texts = ["a text of which there are many copies"] * 300 + [text(400, i) for i in range(20)]
    train, validation = split(texts)
    assert 0.01 < share(train, validation) < 0.1 and texts[0] in train


def test_a_long_line_is_not_held_out_for_want_of_a_line_end():
    long = LINE + "word " * 20_000
    train, validation = split([long])
    assert train[0] + validation[0] == long and share(train, validation) == pytest.approx(HELD_OUT, rel=0.1)
    assert train[0].endswith(" ")


def test_copies_of_one_short_text_are_refused_and_of_one_long_text_cut():
    with pytest.raises(
        ValueError, match=r"dup\.jsonl'; its 50 documents are one text of 14 bytes, so none can be held"
    ):
        data.open_corpus(str(CASES / "dup.jsonl"))
    train, validation = split([LINE * 20] * 50)
    assert set(train) == {LINE * 19} and set(validation) == {LINE}


def test_a_share_that_cannot_be_had_is_said(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(4)))
    tokens = data.load_tokens(str(path), vocab_size=300)
    assert len(tokens.train) and len(tokens.validation)
    said = f"{len(tokens.validation) / (len(tokens.train) + len(tokens.validation)):.1%} of the tokens rather than 5%"
    assert any(said in note for note in tokens.notes)


def test_the_usual_corpus_is_split_by_the_smallest_hashes():
    texts = [text(500, i) for i in range(400)]
    _, validation = split(texts)
    assert set(validation) == {t for t in texts if digest_of(t)[0] <= int(HELD_OUT * 2**64)}
