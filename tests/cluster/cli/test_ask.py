"""`longreach ask` against an endpoint without a cluster behind it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from longreach.cluster.cli import main as cli
from longreach.engine.errors import InvalidRequestError

from ..rest.backend import LIMITS, MODEL, Endpoint
from ..rest.server import serving


@pytest.fixture
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    limits = replace(LIMITS, max_model_len=1000, clamp_max_tokens=True)
    return Endpoint(tmp_path_factory.mktemp("endpoint"), limits=limits)


@pytest.fixture
def url(endpoint: Endpoint) -> Iterator[str]:
    with serving(endpoint.api) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("Call me Ishmael.")
    return str(path)


def ask(url: str, *arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(cli.app, ["ask", "--base-url", url, *arguments], input=typed)


def prompts(endpoint: Endpoint) -> list[str]:
    return [endpoint.tokenizer.decode(request.prompt) for request in endpoint.backend.requests]


def test_a_question_about_a_file(endpoint: Endpoint, url: str, book: str) -> None:
    result = ask(url, "--file", book, "Who?")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Yes.\n"
    [prompt] = prompts(endpoint)
    assert "user\nCall me Ishmael.\n\nWho?" in prompt
    count = len(endpoint.backend.requests[0].prompt)
    assert f"asking about {count} of 1,000 tokens" in result.stderr


def test_several_files_and_one_object(
    endpoint: Endpoint, url: str, book: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("Ahab")
    (folder / "b.bin").write_bytes(b"\x00")
    result = ask(url, "-f", book, "-f", str(folder), "--json", "Who?")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["text"], said["question"], said["model"]) == ("Yes.", "Who?", MODEL)
    assert said["documents"] == [book, str(folder / "a.txt")]
    assert [each["name"] for each in said["left_out"]] == [str(folder / "b.bin")]
    assert said["prompt_tokens"] == len(endpoint.backend.requests[0].prompt)
    assert f"# {book}\n\nCall me Ishmael.\n\n# {folder / 'a.txt'}\n\nAhab" in prompts(endpoint)[0]
    assert "left out" in result.stderr


def test_a_conversation_goes_on_over_the_same_document(
    endpoint: Endpoint, url: str, book: str
) -> None:
    result = ask(url, "--file", book, typed="Who?\n\nReally?\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "Yes.\nYes.\n"
    first, second = prompts(endpoint)
    assert first.count("Call me Ishmael.") == second.count("Call me Ishmael.") == 1
    assert "assistant\nYes." in second
    assert second.index("Who?") < second.index("Yes.") < second.index("Really?")


def test_a_conversation_outlives_a_question_that_fails(
    endpoint: Endpoint, url: str, book: str
) -> None:
    result = ask(url, "--file", book, "--json", typed=f"{'x' * 1000}\nWho?\n")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"] == "Yes."
    [prompt] = prompts(endpoint)
    assert "xxx" not in prompt


@pytest.mark.parametrize(
    "arguments",
    [
        ("Who?",),
        ("--file", "-"),
        ("--file", "BOOK", "x" * 1000),
        ("--file", "BOOK", "--model", "gpt-9", "Who?"),
    ],
)
def test_what_cannot_be_asked_is_not_sent(
    endpoint: Endpoint, url: str, book: str, arguments: tuple[str, ...]
) -> None:
    result = ask(url, *(book if each == "BOOK" else each for each in arguments))
    assert result.exit_code == 1
    assert isinstance(result.exception, Exception)
    assert not endpoint.backend.requests


def test_without_a_document_it_says_so(url: str) -> None:
    assert isinstance(ask(url, "Who?").exception, InvalidRequestError)
