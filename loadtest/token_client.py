"""A client that sends prompts of random token ids, and the figures that come of it."""

import argparse
import asyncio
import csv
import json
import random
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from .endpoint import Endpoint
from .events import LineSplitter

_MOST_SAID = 500
"""Characters of a refusal: what is in front of an endpoint may say it with a whole page."""


@dataclass(frozen=True)
class Line:
    """One figure."""

    what: str
    value: float
    unit: str


class AnswerError(Exception):
    """There was no answer, or one that had begun ended with an error; with what was said of it."""


class Client:
    """Sends one endpoint prompts, each another.

    Args:
        vocabulary: ids below it are sent.
        every_token: have an event of a stream for each token, with or without text.
    """

    def __init__(
        self, base_url: str, at_once: int, vocabulary: int, every_token: bool = False
    ) -> None:
        limits = httpx.Limits(max_connections=at_once)
        self._model = Endpoint(base_url).model
        self._client = httpx.AsyncClient(base_url=base_url, timeout=600, limits=limits)
        self._vocabulary = vocabulary
        self._streamed = {"stream": True, **({"logprobs": 0} if every_token else {})}
        self._random = random.Random(0)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *ignored: object) -> None:
        await self._client.aclose()

    async def ask(self, tokens: int) -> float:
        """Seconds until the whole answer of one token is there.

        Raises:
            AnswerError: the endpoint refused.
        """
        body = self._body(tokens, 1)
        started = time.perf_counter()
        await _check(await self._client.post("/v1/completions", json=body))
        return time.perf_counter() - started

    async def listen(self, tokens: int, answer: int, came: list[tuple[float, int]]) -> None:
        """Note every event of an answer as it comes: its moment, and how many tokens it has.

        Without `every_token` nobody says how many: each event counts for one.

        Raises:
            AnswerError: the endpoint refused, or an event tells of an error.
        """
        body = {**self._body(tokens, answer), **self._streamed}
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            await _check(response)
            splitter = LineSplitter()
            async for part in response.aiter_bytes():
                for line in splitter.lines(part):
                    if count := _tokens_of(line):
                        came.append((time.perf_counter(), count))

    def _body(self, tokens: int, answer: int) -> dict[str, object]:
        prompt = [self._random.randrange(self._vocabulary) for _ in range(tokens)]
        return {
            "model": self._model, "prompt": prompt, "max_tokens": answer, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip


async def _check(response: httpx.Response) -> None:
    """
    Raises:
        AnswerError: it is a refusal.
    """
    if not response.is_success:
        said = (await response.aread()).decode(errors="replace")
        raise AnswerError(f"{response.status_code} {response.reason_phrase}: {said[:_MOST_SAID]}")


def _tokens_of(line: str) -> int:
    """How many tokens a line of a stream brings, one where it does not say.

    Raises:
        AnswerError: it tells of an error.
    """
    if not line.startswith("data: {"):
        return 0
    event = json.loads(line[6:])
    if error := event.get("error"):
        raise AnswerError(error.get("message", error))
    if not (choices := event.get("choices")):
        return 0
    scored = choices[0].get("logprobs") or {}
    return len(scored.get("tokens") or [None])


def command_line(says: str) -> argparse.ArgumentParser:
    """What every command has that asks by a `Client` and has figures to write down."""
    parser = argparse.ArgumentParser(description=says)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--engine", default="longreach", help="its name beside the figures")
    parser.add_argument("--vocabulary", type=int, default=256, help="token ids below it are sent")
    parser.add_argument("--csv", type=Path, help="append the figures to a file")
    return parser


def measure_and_report(
    measuring: Coroutine[Any, Any, list[Line]], options: argparse.Namespace
) -> None:
    """Run, print and write down; where there is no answer, end the program with what was said."""
    try:
        lines = asyncio.run(measuring)
    except AnswerError as error:
        sys.exit(f"{options.base_url}: {error}")
    report(lines, options)


def report(lines: Sequence[Line], options: argparse.Namespace) -> None:
    """Print figures as a table, and append them to `--csv`: what, engine, value, unit."""
    for line in lines:
        print(f"{line.what:<60} {line.value:10.4g} {line.unit}")
    if options.csv is None:
        return
    with options.csv.open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerows(
            [line.what, options.engine, f"{line.value:.4g}", line.unit] for line in lines
        )
