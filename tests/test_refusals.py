"""Whatever tyro draws, a command says one sentence."""

import pytest

from checkpoint import CheckpointOptions
from command_line.parsing import parse
from training_run.train_options import TrainOptions


@pytest.mark.parametrize(
    ("options", "arguments", "sentence"),
    [
        (TrainOptions, "--chunks 0.5", "Error parsing --chunks: invalid literal for int() with base 10: '0.5'"),
        (TrainOptions, "--chunks " + "a" * 5000, "Error parsing --chunks: invalid literal for int() with base 10: 'a"),
        (TrainOptions, "--steps", "Missing value for argument '--steps'. Expected 1 values."),
        (TrainOptions, "--redis-split x", "invalid choice 'x' for argument '--redis-split'. Expected one of ('publ"),
        (TrainOptions, "--nonsense", "Unrecognized options: --nonsense"),
        (CheckpointOptions, "", "{list,verify,export}, STR must be given; --help explains"),
        (CheckpointOptions, "list", "STR must be given; --help explains"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_refusal_is_a_sentence(options, arguments, sentence, encoding, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    with pytest.raises(SystemExit) as stop:
        parse(options, "", arguments.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: {sentence}"), said
    assert said.count("\n") == 1 and len(said) < 600 and "──" not in said and "---" not in said
