"""The same questions to a real endpoint, without a cluster behind it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from longreach.cluster.client import EndpointError
from longreach.cluster.rest import IngressLimits, SignsOfLife
from longreach.engine.errors import ConfigurationError
from longreach.lab.evaluation.cli import app
from longreach.lab.evaluation.endpoint import EndpointAnswerer
from longreach.lab.evaluation.records import RecordFile, read_records
from longreach.lab.evaluation.running import Grid, run
from longreach.lab.evaluation.tasks import NEEDLES

from ...cluster.rest.backend import MODEL, Endpoint
from ...cluster.rest.server import serving

TOKENS = 2000
PASS_KEY = NEEDLES[0]


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    limits = IngressLimits(
        MODEL, 8192, 512, clamp_max_tokens=False, max_body_bytes=1 << 20, max_choices=1,
        max_prompts=1, max_scored_tokens=64, max_logprobs=0, receive_seconds=120.0,
        signs_of_life=SignsOfLife(1),
    )  # fmt: skip
    return Endpoint(tmp_path, limits=limits)


@pytest.fixture
def url(endpoint: Endpoint) -> Iterator[str]:
    """Of a real server."""
    with serving(endpoint.api) as port:
        yield f"http://127.0.0.1:{port}"


def tokens_of(content: str) -> int:
    return len(content.encode()) + len("<user\n>\n<assistant\n")


@pytest.mark.parametrize("has_tokenize", [True, False])
def test_prompts_have_their_length_and_right_answers_count(
    endpoint: Endpoint, url: str, tmp_path: Path, has_tokenize: bool
) -> None:
    if not has_tokenize:
        routes = endpoint.api.router.routes
        routes[:] = [route for route in routes if getattr(route, "path", "") != "/tokenize"]
    answerer = EndpointAnswerer(url)
    [key] = PASS_KEY.prompt(TOKENS, 0, None, tokens_of).expected
    endpoint.backend.text = f"It is {key}."
    file = RecordFile(tmp_path / "prompts.jsonl", answerer.settings)
    run(answerer, Grid([PASS_KEY], [TOKENS], [None], 2, 2), file, Console(quiet=True))
    assert [record.prompt_tokens for record in file.records] == [TOKENS, TOKENS]
    assert [record.score for record in file.records] == [1, 0]
    asked = endpoint.backend.requests[-1]
    assert (asked.sampling.temperature, asked.sampling.max_tokens) == (0, 48)
    assert (file.records[0].model, file.records[0].variant) == (MODEL, "served")


def test_characters_per_token_asks_for_nothing(endpoint: Endpoint, url: str) -> None:
    answerer = EndpointAnswerer(url, MODEL, characters_per_token=4)
    assert answerer.counter("sample")("x" * 400) == 100
    assert endpoint.backend.requests == []


@pytest.mark.parametrize("other", [["--characters-per-token", "1.25"], []])
def test_prompts_of_another_ratio_are_not_mixed_in(
    endpoint: Endpoint, url: str, tmp_path: Path, other: list[str]
) -> None:
    def ask(*ratio: str) -> Result:
        command = ["--endpoint", url, *ratio, "needles", "--lengths", "1K", "--depths", "0"]
        out = ["--prompts", "1", "--out", str(tmp_path / "out")]
        return CliRunner().invoke(app, [*command, *out])

    assert ask("--characters-per-token", "1").exit_code == 0
    asked = len(endpoint.backend.requests)
    assert ask("--characters-per-token", "1.0").exit_code == 0, "the same ratio goes on"
    refused = ask(*other)
    assert isinstance(refused.exception, ConfigurationError)
    assert "characters_per_token was 1.0 and is" in str(refused.exception)
    assert len(endpoint.backend.requests) == asked


def test_an_endpoint_that_fails_leaves_what_was_answered(
    endpoint: Endpoint, url: str, tmp_path: Path
) -> None:
    answerer = EndpointAnswerer(url)
    file = RecordFile(tmp_path / "prompts.jsonl", answerer.settings)
    grid = Grid([PASS_KEY], [TOKENS], [None], 1, 1)
    run(answerer, grid, file, Console(quiet=True))
    endpoint.backend.error = RuntimeError("broken")
    more = Grid([PASS_KEY], [TOKENS], [None], 2, 2)
    with pytest.raises(EndpointError):
        run(answerer, more, file, Console(quiet=True))
    assert len(read_records(tmp_path / "prompts.jsonl")[1]) == 1


def test_the_command_asks_the_endpoint(endpoint: Endpoint, url: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["--endpoint", url, "needles", "--lengths", "2K", "--depths", "0.5"]
    done = CliRunner().invoke(app, [*command, "--prompts", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"prompts.jsonl", "summary.json", "picture.png"}
    assert len(endpoint.backend.requests) == 2
    before = (out / "picture.png").stat().st_mtime_ns
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    assert (out / "picture.png").stat().st_mtime_ns > before
    assert len(endpoint.backend.requests) == 2


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["needles", "--variants", "sparse"], "--variants is for checkpoints"),
        (["recall", "--length", "1K"], "does not show its attention"),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused(command: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["--endpoint", "http://127.0.0.1:9", *command])
    assert says in str(done.exception)
