"""Text in, tokens out: nothing leaks, nothing is lost, bad data is named."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vocabpp_jax import data
from vocabpp_jax.data import files

WORDS = "the cat sat on the mat and looked at another cat which sat on another mat\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOCABPP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """A hundred different texts."""
    for i in range(100):
        write(tmp_path / "texts" / f"{i}.txt", f"{i}: " + WORDS * (1 + i % 3))
    return tmp_path / "texts"


# --- corpus


def test_the_splits_share_no_document_and_lose_none(folder):
    corpus = data.open_corpus(str(folder))
    train, validation = set(corpus.train()), set(corpus.validation())
    assert corpus.documents == 100 and not train & validation
    assert train | validation == {path.read_text() for path in folder.iterdir()}


def test_duplicates_of_a_document_stand_on_the_same_side(tmp_path):
    lines = [json.dumps({"text": f"document {i % 50}"}) for i in range(500)]
    corpus = data.open_corpus(write(tmp_path / "texts.jsonl", "\n".join(lines)))
    assert not set(corpus.train()) & set(corpus.validation())


@pytest.mark.parametrize("documents", [2, 3, 5])
def test_a_small_corpus_still_has_both_splits(tmp_path, documents):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(documents)]
    corpus = data.open_corpus(write(tmp_path / "texts.jsonl", "\n".join(lines)))
    assert list(corpus.train()) and list(corpus.validation())


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1).filter(str.strip))
def test_a_lone_document_is_cut_in_two(tmp_path_factory, text):
    corpus = data.open_corpus(write(tmp_path_factory.mktemp("one") / "text.txt", text))
    assert "".join(corpus.train()) + "".join(corpus.validation()) == text


def test_a_lone_document_is_cut_at_a_line_end(tmp_path):
    corpus = data.open_corpus(write(tmp_path / "text.txt", WORDS * 100))
    assert "".join(corpus.validation()) == WORDS * 5


def test_a_folder_is_read_whole_but_for_hidden_files(folder):
    write(folder / "deep" / "more.jsonl", '{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    write(folder / ".git" / "index", b"\0\0")
    corpus = data.open_corpus(str(folder))
    assert corpus.documents == 102 and {"one", "two"} <= {*corpus.train(), *corpus.validation()}


def test_the_fingerprint_follows_the_text_and_not_the_place(tmp_path):
    first = data.open_corpus(write(tmp_path / "a.txt", WORDS))
    same = data.open_corpus(write(tmp_path / "b" / "c.txt", WORDS))
    other = data.open_corpus(write(tmp_path / "a.txt", WORDS + "."))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_the_standard_library_is_a_corpus():
    found = files._standard_library()
    assert len(found) > 500 and not any("site-packages" in path.parts for path in found)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("empty.txt", "", "holds no text"),
        ("blank.jsonl", " \n\n", "holds no text"),
        ("nul.txt", b"text\0text", "nul.txt is not text: it has a NUL byte at 4"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "latin.txt is not text: byte 0xe9 at 3 is not UTF-8"),
        ("field.jsonl", '{"text": "a"}\n{"body": "b"}\n', "field.jsonl:2 has no field 'text'"),
        ("number.jsonl", '{"text": 5}\n', "number.jsonl:1 has no field 'text'"),
        ("broken.jsonl", '{"text": "a"\n', "broken.jsonl:1 is not JSON"),
        ("deep.jsonl", "[" * 100_000, "deep.jsonl:1 is not JSON"),
        ("binary.jsonl", b'{"text": "\xff"}', "binary.jsonl:1 is not text"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, sentence):
    with pytest.raises(ValueError) as error:
        data.open_corpus(write(tmp_path / name, content))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match="nothing.txt', which is not a file or folder"):
        data.open_corpus(str(tmp_path / "nothing.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty', which holds no text"):
        data.open_corpus(str(tmp_path / "empty"))


# --- tokenizer and tokens


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = TOKENIZER
    assert tokenizer.decode(data.encode([text], tokenizer)[:-1].tolist(), skip_special_tokens=False) == text


TOKENIZER = data.train_tokenizer([WORDS] * 3, 300)


def test_every_document_is_followed_by_the_end_of_text(folder):
    tokens = data.load_tokens(str(folder), vocab_size=300)
    end = tokens.tokenizer.token_to_id(data.END_OF_TEXT)
    assert sum(np.count_nonzero(split == end) for split in (tokens.train, tokens.validation)) == 100
    assert tokens.train[-1] == tokens.validation[-1] == end


def test_text_that_spells_the_end_of_text_stays_text(tmp_path):
    tokens = data.load_tokens(write(tmp_path / "a.txt", (data.END_OF_TEXT + "\n") * 50), vocab_size=257)
    assert np.count_nonzero(tokens.train == 0) == 1


def test_training_the_tokenizer_twice_gives_the_same_one(folder):
    corpus = data.open_corpus(str(folder))
    assert len({data.train_tokenizer(corpus.train(), 400).to_str() for _ in range(3)}) == 1


def test_the_cache_is_used_and_leaves_no_partial_files(folder, cache, monkeypatch):
    first = data.load_tokens(str(folder), vocab_size=300)
    monkeypatch.setattr("vocabpp_jax.data.tokenizer.train_tokenizer", None)
    monkeypatch.setattr("vocabpp_jax.data.tokens._encoded", None)
    again = data.load_tokens(str(folder), vocab_size=300)
    assert np.array_equal(first.train, again.train)
    assert {path.name.split("-")[0] for path in cache.iterdir()} == {"tokenizer", "tokens", "facts"}
    assert not [path for path in cache.iterdir() if ".partial" in path.name]


def test_a_failed_write_leaves_nothing_behind(folder, cache, monkeypatch):
    def fails(*_):
        raise RuntimeError("full")

    monkeypatch.setattr("vocabpp_jax.data.tokens._encoded", fails)
    with pytest.raises(RuntimeError):
        data.load_tokens(str(folder), vocab_size=300)
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_damaged_cache_files_are_named(folder, cache):
    data.load_tokens(str(folder), vocab_size=300)
    for pattern in ("*-train.npy", "tokenizer-*.json"):
        (path,) = cache.glob(pattern)
        write(path, b"\x93NUMPY damaged")
        with pytest.raises(ValueError, match=path.name):
            data.load_tokens(str(folder), vocab_size=300)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("VOCABPP_CACHE", write(tmp_path / "file", "") + "/cache")
    with pytest.raises(ValueError, match="VOCABPP_CACHE"):
        data.load_tokens(write(tmp_path / "a.txt", WORDS), vocab_size=300)


def test_token_ids_outside_the_vocabulary_are_named(folder, tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="holds the token id 2.., outside a vocabulary of 260"):
        data.load_tokens(str(folder), vocab_size=260, tokenizer=str(tmp_path / "tokenizer.json"))
    data.check_vocabulary(np.array([0, 259]), 260, "it")


@pytest.mark.parametrize("content", [None, "{}", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}}}'])
def test_what_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content:
        write(path, content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        data.load_tokenizer(path)


@pytest.mark.parametrize("end", ["<|end_of_text|>", "<eos>", "</s>"])
def test_documents_end_as_the_tokenizer_calls_it(tmp_path, end):
    write(tmp_path / "tokenizer.json", TOKENIZER.to_str().replace(data.END_OF_TEXT, end))
    tokenizer = data.load_tokenizer(tmp_path / "tokenizer.json")
    assert data.encode(["a"], tokenizer)[-1] == tokenizer.token_to_id(end)


def test_a_vocabulary_too_small_for_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 256; byte-level BPE needs at least 257"):
        data.train_tokenizer([WORDS], 256)


def test_unigram_entropy_of_known_frequencies():
    assert data.unigram_entropy(np.arange(1000) % 8) == pytest.approx(np.log(8))
    assert data.unigram_entropy(np.zeros(10, np.uint16)) == 0
    assert data.unigram_entropy(np.array([0, 0, 0, 5])) == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))


def test_documents_of_text_end_where_the_end_of_text_stands(folder):
    tokens = data.load_tokens(str(folder), vocab_size=300)
    end = tokens.tokenizer.token_to_id(data.END_OF_TEXT)
    for split, ends in zip((tokens.train, tokens.validation), tokens.ends, strict=True):
        assert np.all(split[ends - 1] == end) and len(ends) == np.sum(split == end) and ends[-1] == len(split)


# --- parquet, and what is damaged


def parquet(path, columns):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    parquet.write_table(arrow.table(columns), path, row_group_size=10)
    return str(path)


def test_parquet_holds_a_document_a_row(tmp_path):
    texts = [f"document {i}" for i in range(50)]
    corpus = data.open_corpus(parquet(tmp_path / "a.parquet", {"id": list(range(51)), "text": [*texts, None]}))
    assert corpus.documents == 50 and set(corpus.train()) | set(corpus.validation()) == set(texts)


def test_parquet_without_text_or_cut_off_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"words": ["a"]})
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text' of strings; its columns are words"):
        data.open_corpus(path)
    raw = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"b\.parquet is damaged or not a parquet file"):
        data.open_corpus(write(tmp_path / "b.parquet", raw[:-5]))


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vocabpp-jax\[parquet\]'"):
        data.open_corpus(write(tmp_path / "a.parquet", b"PAR1"))


def test_what_is_damaged_is_left_out_by_choice_and_told(folder):
    write(folder / "binary.txt", b"\x00\x01")
    write(folder / "lines.jsonl", '{"text": "good one"}\n{"text": 3}\n{"text": "cut o')
    with pytest.raises(ValueError, match="binary.txt is not text"):
        data.open_corpus(str(folder))
    corpus = data.open_corpus(str(folder), damaged="skip")
    assert [sentence.split()[0].rsplit("/")[-1] for sentence in corpus.damaged] == [
        "binary.txt",
        "lines.jsonl:2",
        "lines.jsonl:3",
    ]
    assert corpus.documents == 101 and "good one" in {*corpus.train(), *corpus.validation()}
    assert len(list(corpus.train())) + len(list(corpus.validation())) == 101


@given(
    raw=st.binary(max_size=300), suffix=st.sampled_from([".txt", ".jsonl"]), damaged=st.sampled_from(["refuse", "skip"])
)
def test_any_bytes_give_a_sentence_or_documents(raw, suffix, damaged, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    try:
        corpus = data.open_corpus(write(path, raw), damaged)
        assert corpus.documents and sum(map(len, corpus.train())) + sum(map(len, corpus.validation()))
    except ValueError as problem:
        assert path.name in str(problem)
