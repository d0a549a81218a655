"""What a source holds is read as what it is, whatever its names and links; nothing is left out without a word."""

import json
import os
from pathlib import Path

import pytest

from vocabpp_jax import data
from vocabpp_jax.data.files import format_of

CASES = Path(__file__).parent / "cases"
RECORDS = '{"text": "a b"}\n{"text": "c d"}\n'


def texts(source, damaged="refuse"):
    corpus = data.open_corpus(str(source), damaged)
    return sorted([*corpus.train(), *corpus.validation()]), corpus


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.JsonLines", "a.json", "a.JSON", "a.txt", "a", "a.jsonl.1"]
)
def test_json_lines_are_records_under_any_name(tmp_path, name):
    assert texts(write(tmp_path / name, RECORDS))[0] == ["a b", "c d"]


def test_the_reported_file_of_json_lines():
    assert texts(CASES / "my-corpus.json")[0] == ["a b", "c d"]


@pytest.mark.parametrize(
    "content",
    [json.dumps([{"text": "a b"}, {"text": "c d"}]), json.dumps([{"text": "a b"}, {"text": "c d"}], indent=1)],
)
def test_a_json_file_may_be_a_list_of_records(tmp_path, content):
    assert texts(write(tmp_path / "a.json", content))[0] == ["a b", "c d"]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.json", '{"body": "x"}\n{"body": "y"}\n', "a.json:1 has no field 'text'"),
        ("a.json", '{"body": "x"}', "a.json has no field 'text'"),
        ("a.json", '[{"text": "x"}, 3, {"text": "y"}]', "a.json, record 2, has no field 'text'"),
        ("a.json", "free text", "a.json is not JSON"),
        ("a.txt", '{"body": "x"}\n{"body": "y"}\n', "a.txt:1 has no field 'text'"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "a.jsonl.gz is compressed; decompress it first"),
        ("a.txt", "text".encode("utf-16"), "has the byte order mark of UTF-16; give UTF-8"),
    ],
)
def test_what_is_not_records_is_not_trained_on_as_raw_json(tmp_path, name, content, sentence):
    with pytest.raises(ValueError) as problem:
        data.open_corpus(str(write(tmp_path / name, content)))
    assert sentence in str(problem.value)


def test_code_in_a_folder_stays_text(tmp_path):
    write(tmp_path / "a.js", "{\n  const text = 1\n}\n")
    write(tmp_path / "package.json", '{"name": "x"}')
    assert texts(tmp_path)[0] == ["{\n  const text = 1\n}\n", '{"name": "x"}']


@pytest.mark.parametrize("name, content", [("a.txt", "hello there"), ("a.jsonl", RECORDS), ("a.json", RECORDS)])
def test_a_byte_order_mark_is_no_part_of_the_text_in_any_format(tmp_path, name, content):
    plain = texts(write(tmp_path / "plain" / name, content))[0]
    assert texts(write(tmp_path / "marked" / name, b"\xef\xbb\xbf" + content.encode()))[0] == plain
    if name.endswith("l"):  # files joined by cat
        assert texts(write(tmp_path / name, b"\xef\xbb\xbf" + content.encode() + b"\xef\xbb\xbf" + content.encode()))


def test_a_dictionary_encoded_column_of_strings_is_read():
    pytest.importorskip("pyarrow")
    assert texts(CASES / "cat.parquet")[0] == ["a b", "a b", "c d"]


def test_a_parquet_file_is_known_by_any_case_of_its_suffix(tmp_path):
    pytest.importorskip("pyarrow")
    assert texts(write(tmp_path / "A.PARQUET", (CASES / "cat.parquet").read_bytes()))[0] == ["a b", "a b", "c d"]


def test_links_to_folders_are_followed_once_though_they_lead_in_circles(tmp_path):
    write(tmp_path / "elsewhere" / "b.txt", "two")
    write(tmp_path / "texts" / "a.txt", "one")
    os.symlink(tmp_path / "elsewhere", tmp_path / "texts" / "linked")
    os.symlink(tmp_path / "texts", tmp_path / "elsewhere" / "back")
    os.symlink(tmp_path / "texts" / "a.txt", tmp_path / "texts" / "same.txt")
    found, corpus = texts(tmp_path / "texts")
    assert found == ["one", "two"]
    assert any("1 links" in note and "already read" in note for note in corpus.notes)


def test_a_link_to_nothing_is_damage(tmp_path):
    write(tmp_path / "a.txt", "one")
    os.symlink(tmp_path / "gone", tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"b\.txt is a link to nothing"):
        data.open_corpus(str(tmp_path))
    found, corpus = texts(tmp_path, "skip")
    assert "".join(sorted(found, reverse=True)) == "one" and len(corpus.damaged) == 1


def test_files_about_records_are_left_out_with_a_word_and_read_as_documents_with_a_word(tmp_path):
    write(tmp_path / "README.md", "about")
    write(tmp_path / "dataset_info.json", '{"splits": {}}')
    write(tmp_path / "a.txt", "one")
    found, corpus = texts(tmp_path)
    assert found == ["about", "one", '{"splits": {}}']
    assert "README.md" in " ".join(corpus.notes) and ".txt (1)" in " ".join(corpus.notes)
    write(tmp_path / "part.jsonl", RECORDS)
    found, corpus = texts(tmp_path)
    assert found == ["a b", "c d", "one"]
    assert "left out" in corpus.notes[0] and "README.md" in corpus.notes[0] and "dataset_info.json" in corpus.notes[0]


def test_a_folder_of_one_kind_needs_no_word(tmp_path):
    for n in range(3):
        write(tmp_path / f"{n}.py", f"print({n})")
    assert texts(tmp_path)[1].notes == ()


def test_a_corpus_in_a_text_file_is_read_as_json_lines_with_a_word(tmp_path):
    assert "is read as JSON lines" in texts(write(tmp_path / "a.txt", RECORDS))[1].notes[0]
    assert format_of(tmp_path / "a.txt") == "jsonl"
