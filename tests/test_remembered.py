"""A restart reads a sample of the data only, unless something about the files has changed."""

import json
import os
import time

import numpy as np
import pytest
from test_megatron import write

from vocabpp_jax import data
from vocabpp_jax.data import corpus as corpus_module
from vocabpp_jax.data import remembered as module
from vocabpp_jax.data import tokens as tokens_module


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOCABPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def old(path, seconds=1000):
    """Give a file a time of last change in the past."""
    os.utime(path, (time.time() - seconds,) * 2)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"a document about {i}"}) + "\n" for i in range(100)))
    return old(path)


@pytest.fixture
def reads(monkeypatch):
    """The times that documents were read."""
    found, whole = [], corpus_module.read_documents
    monkeypatch.setattr(corpus_module, "read_documents", lambda *given: found.append(1) or whole(*given))
    return found


def test_a_corpus_is_read_once(text, reads):
    first, again = data.open_corpus(str(text)), data.open_corpus(str(text))
    assert first == again and len(reads) == 1 and first.documents == 100


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path.write_text(path.read_text() + '{"text": "more"}\n'), old(path)),
        lambda path: old(path, 999),  # only its time
        lambda path: (path.write_text(path.read_text().replace("about 7", "about 8")), os.utime(path, (1e9, 1e9))),
        lambda path: path.rename(path.with_name("moved.jsonl")),
    ],
    ids=["size", "time", "bytes", "path"],
)
def test_what_has_changed_is_read_again(change, text, reads, tmp_path):
    os.utime(text, (1e9, 1e9))
    first = data.open_corpus(str(text))
    before = text.read_bytes()
    change(text)
    (path,) = tmp_path.glob("*.jsonl")
    again = data.open_corpus(str(path))
    assert len(reads) == 2 and (again.fingerprint == first.fingerprint) == (path.read_bytes() == before)


def test_a_young_file_is_not_kept(text, reads):
    text.write_text(text.read_text())
    for _ in range(2):
        data.open_corpus(str(text))
    assert len(reads) == 2


@pytest.mark.parametrize("spoil", [lambda raw: b"", lambda raw: b"[1]", lambda raw: raw.replace(b"100", b"101", 1)])
def test_what_is_damaged_in_the_cache_is_made_again(spoil, text, reads, cache):
    first = data.open_corpus(str(text))
    (entry,) = cache.glob("facts-*.json")
    entry.write_bytes(spoil(entry.read_bytes()))
    assert data.open_corpus(str(text)) == first and len(reads) == 2


def test_another_version_of_the_reader_reads_again(text, reads, monkeypatch):
    data.open_corpus(str(text))
    monkeypatch.setattr(module, "_version", lambda: "another")
    data.open_corpus(str(text))
    assert len(reads) == 2


def test_what_was_left_out_is_remembered_and_what_is_refused_is_refused_again(text, reads):
    text.write_text(text.read_text() + "no record\n")
    old(text)
    first, again = (data.open_corpus(str(text), damaged="skip") for _ in range(2))
    assert first == again and len(reads) == 1 and len(first.damaged) == 1 and "text.jsonl:101" in first.damaged[0]
    for _ in range(2):
        with pytest.raises(ValueError, match="text.jsonl:101"):
            data.open_corpus(str(text))


def test_tokens_are_read_once_for_what_a_run_must_know_of_them(text, monkeypatch):
    first = data.load_tokens(str(text), vocab_size=300)
    expected = first.entropy, [ends.tolist() for ends in first.ends]
    for name in ("unigram_entropy", "_encoded"):
        monkeypatch.setattr(tokens_module, name, lambda *_: pytest.fail("reads tokens"))
    monkeypatch.setattr(np, "flatnonzero", lambda *_: pytest.fail("reads tokens"))
    monkeypatch.setattr(tokens_module, "_AT_ONCE", None)  # nothing goes through them in pieces
    again = data.load_tokens(str(text), vocab_size=300)
    assert (again.entropy, [ends.tolist() for ends in again.ends]) == expected
    assert expected[1][0][-1] == len(first.train) and len(expected[1][0]) + len(expected[1][1]) == 100
    with pytest.raises(ValueError, match="outside a vocabulary of 260"):
        tokens_module.check_vocabulary(again.train, 260, "it", file=again.files[0])


def test_a_megatron_dataset_is_read_once(tmp_path, monkeypatch):
    source = write(tmp_path, [[1, 2, 3]] * 40)
    old(tmp_path / "set.bin")
    first = data.load_tokens(source, vocab_size=10)
    entropy = first.entropy
    monkeypatch.setattr(tokens_module, "_AT_ONCE", None)
    again = data.load_tokens(source, vocab_size=10)
    assert again.entropy == entropy == pytest.approx(np.log(3))
    with pytest.raises(ValueError, match="token id 3, outside a vocabulary of 3"):
        data.load_tokens(source, vocab_size=3)


def test_a_sample_has_the_end_of_every_file_and_random_places(tmp_path):
    size = 4 * module._BLOCKS * module._BLOCK_BYTES
    path = tmp_path / "large"
    path.write_bytes(bytes(size))
    stats = module._stats([path])
    before = module._sample(stats, "7")
    raw = bytearray(size)
    raw[-1] = 1
    path.write_bytes(raw)
    assert module._sample(stats, "7") != before
    path.write_bytes(bytes(size // 2) + b"\1" * (size // 2 - 1) + b"\0")  # half of it
    assert module._sample(stats, "7") != before
