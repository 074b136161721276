"""What is written on the command line of `longreach eval`, and what is refused there."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from longreach.engine.errors import InvalidRequestError
from longreach.lab.evaluation.cli import app
from longreach.lab.evaluation.options import budget_of, depths_of, length_of, lengths_of
from longreach.lab.evaluation.records import read_records


def test_lengths_and_depths_are_read_each_once_and_in_order() -> None:
    assert lengths_of("1M,2k,300,2048") == [300, 2048, 1 << 20]
    assert length_of("64K") == 65536
    assert depths_of("1,.5,0,0.5") == [0, 0.5, 1]
    assert depths_of("any") == [None]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["needles", "--lengths", "2K,-5"], "'-5' is no number of tokens"),
        (["recall", "--length", "0"], "'0' is no number of tokens"),
        (["recall", "--length", "1K,2K"], "--length: '1K,2K' is no number of tokens"),
        (["needles", "--lengths", "1K,"], "--lengths: '' is no number of tokens"),
        (["needles", "--depths", "0,2"], "must lie between 0"),
        (["needles", "--tasks", "pass"], "no task is called pass; there are pass-key,"),
        (["needles", "--variants", "dense,x"], "no variant is called x; there are dense,"),
        (["needles", "--device", "abacus"], "--device abacus is unknown; take cuda or cpu"),
        (["ruler", "--dtype", "int8"], "--dtype int8 is not served"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(
    tmp_path: Path, command: list[str], says: str
) -> None:
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert isinstance(done.exception, InvalidRequestError)
    assert says in str(done.exception)


@pytest.mark.parametrize("text", ["30", "30,", "0,128", "30,-1"])
def test_a_budget_is_two_positive_numbers(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="64,128"):
        budget_of(text)


def test_what_is_named_twice_is_asked_once(tmp_path: Path) -> None:
    command = ["needles", "--lengths", "1K,1024", "--depths", "1,1.0", "--prompts", "1"]
    names = ["--tasks", "pass-key,pass-key", "--variants", "dense,dense", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, [*command, *names]).exit_code == 0
    assert len(read_records(tmp_path / "prompts.jsonl")[1]) == 1
