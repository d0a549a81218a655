import json

import pytest

import speed
from reports.markdown import insert_table

SMALL = "--model gpt-tiny --layers 2 --hidden 8 --heads 2 --seq 4 --microbatches 4 --share-cores".split()


@pytest.mark.thorough
def test_a_sweep_measures_and_predicts_in_processes_of_its_own_and_goes_on_where_it_stopped(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed-others -->\n<!-- /speed-others -->\nafter\n")
    command = [*SMALL, "--output", str(tmp_path / "out"), "--json", str(tmp_path / "x.json"), "--docs", str(page)]
    command += ["--methods", "vocab-2", "--comparators", "data-parallel", "--repeats", "1"]
    speed.main([*command, "--vocab-sizes", "19"])
    found = json.loads((tmp_path / "x.json").read_text())
    (row,), (other,), (ideal,) = found["rows"], found["comparators"], found["ideal"]
    assert (row["schedule"], row["method"], row["vocab_size"]) == ("1f1b", "vocab-2", 19)
    assert row["tokens_per_second"] == pytest.approx(4 * 4 / row["measured_ms"] * 1e3)
    assert row["ratio_to_ideal"] == pytest.approx(ideal["measured_ms"] / row["measured_ms"])
    assert row["predicted_ms"] > row["outside_ms"] > 0 and other["schedule"] == "data-parallel"
    assert found["devices"]["devices"] == 2
    names = ("speed.csv", "speed.md", "speed.png")
    assert all((tmp_path / "out" / name).stat().st_size > 0 for name in names)
    assert len((tmp_path / "out" / "speed.csv").read_text().splitlines()) == 1 + 3
    assert "| 19 | 1f1b | vocab-2 |" in page.read_text() and page.read_text().endswith("after\n")
    capsys.readouterr()

    speed.main([*command, "--vocab-sizes", "19"])  # all of it is there already
    assert "compiled" not in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text()) == found
    with pytest.raises(SystemExit, match="2"):
        speed.main([*command, "--vocab-sizes", "19", "--hidden", "16"])
    assert "holds other measurements" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--methods", "magic"], "methods has 'magic'"),
        (["--schedules", "2f2b"], "schedules has '2f2b'"),
        (["--schedule", "gpipe"], "here they are schedules and methods"),
        (["--vocab-size", "7"], "vocab_size is 7"),
        (["--minutes", "0"], "minutes is 0"),
        (["--z-loss", "0.1"], "z_loss=0.1"),
        (["--comparators", "luck"], "comparators has 'luck'"),
        (["--stages", "512", "--layers", "512"], "stages is 512; there are"),
        (["--output", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(arguments, names, tmp_path, capsys):
    small = [word for word in SMALL if word != "--share-cores"] if "--stages" in arguments else SMALL
    with pytest.raises(SystemExit) as stopped:
        speed.main([*small, "--output", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and names in said[0]


def test_a_table_replaces_only_what_stands_between_its_comments(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\nkept\n<!-- /y -->\n")
    insert_table(page, "x", "new\n")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n<!-- y -->\nkept\n<!-- /y -->\n"
    with pytest.raises(ValueError, match="no comments"):
        insert_table(page, "z", "new")
