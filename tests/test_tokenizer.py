"""Tokenizers read whole documents as text, however their file says; ends of texts can be named; words may be long."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from vocabpp_jax import data
from vocabpp_jax.data.tokenizer import END_OF_TEXT, stored_end, train_tokenizer

CASES = Path(__file__).parent / "cases"
DEEPSEEK_END = "<｜end▁of▁sentence｜>"
LONG = "abc defg hij " * 30


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOCABPP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{LONG} {i}"}) + "\n" for i in range(60)))
    return str(path)


def changed(tmp_path, change, case="trunc.json"):
    values = json.loads((CASES / case).read_text())
    change(values)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values))
    return path


def test_stored_truncation_and_padding_do_not_cut_or_fill_documents(corpus):
    tokenizer = data.load_tokenizer(CASES / "trunc.json")
    ids = data.encode([LONG, "a"], tokenizer).tolist()
    assert tokenizer.decode(ids[:-3], skip_special_tokens=False) == LONG
    assert ids[-3:] == [0, tokenizer.token_to_id("a"), 0]
    tokens = data.load_tokens(corpus, vocab_size=300, tokenizer=str(CASES / "trunc.json"))
    whole = np.concatenate([tokens.train, tokens.validation])
    assert len(tokenizer.decode(whole[whole != 0].tolist())) == sum(len(f"{LONG} {i}") for i in range(60))


def test_stored_dropout_does_not_make_tokens_random(tmp_path, corpus):
    train_tokenizer([LONG], 300).save(str(tmp_path / "a.json"))
    values = json.loads((tmp_path / "a.json").read_text())
    values["model"]["dropout"] = 0.5
    (tmp_path / "b.json").write_text(json.dumps(values))
    plain, random = (data.load_tokenizer(tmp_path / name) for name in ("a.json", "b.json"))
    assert np.array_equal(data.encode([LONG] * 5, plain), data.encode([LONG] * 5, random))


def test_an_unknown_end_of_text_is_named_by_the_tokenizers_configuration_or_an_option(tmp_path, corpus):
    path = tmp_path / "tokenizer.json"
    shutil.copy(CASES / "ds.json", path)
    with pytest.raises(ValueError, match=r"tokenizer\.json: there is no end-of-text token.*end_of_text"):
        data.load_tokens(corpus, vocab_size=300, tokenizer=str(path))
    named = data.load_tokens(corpus, vocab_size=300, tokenizer=str(path), end_of_text=DEEPSEEK_END)
    for token in (DEEPSEEK_END, {"__type": "AddedToken", "content": DEEPSEEK_END}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
        stored = data.load_tokens(corpus, vocab_size=300, tokenizer=str(path))
        assert stored.end == named.end == 0 and np.array_equal(stored.train, named.train)
    assert np.count_nonzero(named.train == 0) + np.count_nonzero(named.validation == 0) == 60


def test_the_named_end_of_text_goes_before_the_stored_and_the_stored_before_the_known(tmp_path, corpus):
    path = changed(
        tmp_path, lambda v: v["added_tokens"].append(v["added_tokens"][0] | {"id": 260, "content": "<|im|>"})
    )
    assert data.load_tokens(corpus, vocab_size=300, tokenizer=str(path)).end == 0
    (tmp_path / "tokenizer_config.json").write_text('\ufeff{"eos_token": "<|im|>"}', encoding="utf-8")
    stored = data.load_tokens(corpus, vocab_size=300, tokenizer=str(path))
    named = data.load_tokens(corpus, vocab_size=300, tokenizer=str(path), end_of_text=END_OF_TEXT)
    assert (stored.end, named.end) == (stored.tokenizer.token_to_id("<|im|>"), 0) and stored.end != 0
    assert stored.identity["tokenizer"] != named.identity["tokenizer"]


@pytest.mark.parametrize("content", ["[]", "{", "", '{"eos_token": 5}', "[" * 100_000])
def test_a_damaged_tokenizer_configuration_is_named(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        stored_end(tmp_path / "tokenizer.json")


def test_an_end_of_text_that_is_no_token_is_refused(corpus):
    with pytest.raises(ValueError, match="end_of_text is '<end>', which is not a token of the tokenizer"):
        data.load_tokens(corpus, vocab_size=300, tokenizer=str(CASES / "ds.json"), end_of_text="<end>")
    with pytest.raises(ValueError, match="end_of_text is '<end>' without a tokenizer"):
        data.load_tokens(corpus, vocab_size=300, end_of_text="<end>")


def test_special_tokens_in_text_become_text_with_a_word_also_from_the_cache(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [LONG + (END_OF_TEXT if i % 10 == 0 else "") for i in range(100)]
    path.write_text("".join(json.dumps({"text": f"{i} {line}"}) + "\n" for i, line in enumerate(lines)))
    for _ in range(2):
        tokens = data.load_tokens(str(path), vocab_size=300)
        assert f"10 of 100 documents spell special tokens ({END_OF_TEXT}), which are read as text" in tokens.notes
        assert np.count_nonzero(tokens.train == 0) + np.count_nonzero(tokens.validation == 0) == 100


def test_an_end_of_text_that_text_can_spell_is_refused_since_it_would_end_documents_within(tmp_path, corpus):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "abc": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = data.load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="makes '</s>', which ends documents, out of text within one"):
        data.encode(["abc </s> abc"], tokenizer)
    tokens = data.load_tokens(corpus, vocab_size=300, tokenizer=str(tmp_path / "tokenizer.json"))
    assert any("are the tokenizer's unknown token" in note for note in tokens.notes)


def test_text_that_has_no_tokens_is_refused(tmp_path, corpus):
    empty = Tokenizer(models.BPE({"</s>": 0}, []))
    empty.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="makes no tokens of the text in"):
        data.load_tokens(corpus, vocab_size=300, tokenizer=str(tmp_path / "tokenizer.json"))


def test_token_ids_beyond_the_size_of_the_vocabulary_are_kept_whole(tmp_path):
    path = changed(tmp_path, lambda v: v["model"]["vocab"].update({"a": 100_000}))
    assert data.encode(["a"], data.load_tokenizer(path)).tolist() == [100_000, 0]


def test_training_takes_time_in_proportion_to_the_longest_word_and_learns_the_same():
    random = np.random.default_rng(0)
    word = "".join(random.choice(list("abcdefghij"), 80_000))
    start = time.process_time()
    tokenizer = train_tokenizer([word], 1000)
    assert time.process_time() - start < 3  # 7 s where words are not cut, and four times that for twice the letters
    assert tokenizer.decode(data.encode([word], tokenizer)[:-1].tolist()) == word

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [Path(data.__file__).read_text(), "don't  we'll\t\t 12345 ... \n\n x", "naïve 日本語 ß\u00a0"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(texts, trainer=trainer)
    assert plain.get_vocab() == train_tokenizer(texts, 600).get_vocab()


def test_a_tokenizer_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + (CASES / "ds.json").read_bytes())
    assert data.load_tokenizer(tmp_path / "tokenizer.json", DEEPSEEK_END).token_to_id(DEEPSEEK_END) == 0
