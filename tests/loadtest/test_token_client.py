"""Prompts of token ids, asked of an endpoint that answers as it is told to."""

import argparse
import asyncio
import csv
from pathlib import Path

import pytest

from longreach.loadtest import short_prompts
from longreach.loadtest.short_prompts import Answer, stream
from longreach.loadtest.token_client import AnswerError, Client, Line, command_line, report

from .endpoint import Script


def ask(port: int) -> Answer:
    async def asked() -> Answer:
        async with Client(f"http://127.0.0.1:{port}", 1, 256) as client:
            return await stream(client, 5, 3)

    return asyncio.run(asked())


def test_every_event_of_a_stream_is_noted(script: Script, port: int) -> None:
    script.gap = 0.05
    answer = ask(port)
    assert len(answer.gaps) == 1
    assert answer.gaps[0] >= 0.04
    assert answer.first > 0
    [body] = script.bodies
    assert len(body["prompt"]) == 5
    assert body["max_tokens"] == 3


@pytest.mark.parametrize(
    ("answer", "error"),
    [("error", AnswerError), ("refuse", AnswerError), ("empty", ValueError)],
)
def test_what_is_no_answer_is_no_figure(
    script: Script, port: int, answer: str, error: type[Exception]
) -> None:
    """A worker that dies under load must not look like a fast one."""
    script.answer = answer
    with pytest.raises(error):
        ask(port)


def test_a_refusal_ends_a_measurement_with_what_was_said(
    script: Script, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.answer = "refuse"
    options = ["--base-url", f"http://127.0.0.1:{port}", "--warm-up", "0", "--lengths", "5"]
    monkeypatch.setattr("sys.argv", ["short_prompts", *options])
    with pytest.raises(SystemExit) as ended:
        short_prompts.main()
    assert str(ended.value).startswith(f"http://127.0.0.1:{port}: 503 ")


def test_figures_are_appended_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    options: argparse.Namespace = command_line("").parse_args(
        ["--csv", str(path), "--engine", "it"]
    )
    for _ in range(2):
        report([Line("1,024 tokens", 0.123456, "s")], options)
    with path.open(newline="", encoding="utf-8") as file:
        assert [*csv.reader(file)] == [["1,024 tokens", "it", "0.1235", "s"]] * 2
