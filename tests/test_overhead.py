import json

import pytest

import overhead

SMALL = "--model gpt-tiny --layers 2 --hidden 8 --heads 2 --seq 4 --vocab-size 19 --microbatches 2".split()


@pytest.mark.thorough
def test_pipelines_and_the_plain_step_are_timed_on_one_core_and_accounted_for(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- overhead -->\n<!-- /overhead -->\n")
    command = [*SMALL, "--devices", "2", "--methods", "baseline", "--repeats", "1", "--account"]
    overhead.main([*command, "--json", str(tmp_path / "x.json"), "--docs", str(page)])
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    plain, ours = rows["plain step"], rows["baseline, p=2"]
    assert len(ours["seconds"]) == len(plain["seconds"]) == 1 and min(plain["seconds"]) > 0
    assert ours["overhead"] == pytest.approx(ours["seconds"][0] / plain["seconds"][0] - 1)
    assert {"F", "B", "H", "IF", "IB", "transfers", "outside passes"} <= set(ours["account_ms"])
    assert "| baseline, p=2 |" in page.read_text() and "ms a step:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--devices", "0"], "devices is (0,)"),
        (["--stages", "2"], "here they are devices and methods"),
        (["--methods", "magic"], "magic"),
        (["--soft-cap", "30"], "soft_cap=30"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(arguments, names, capsys):
    with pytest.raises(SystemExit, match="2"):
        overhead.main([*SMALL, *arguments])
    assert names in capsys.readouterr().err
