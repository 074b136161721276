"""What short prompts cost: the wait for one, how many a second, and how fast many are answered.

    python -m longreach.loadtest.short_prompts --base-url http://127.0.0.1:8000 --csv short.csv

Sends only prompts of random token ids, each another, of any endpoint that takes them. It asks

- `--lengths`: one prompt after the other of each length, for one token;
- `--rate`: so many prompts of 1,024 tokens for one token each, 32 at once;
- `--answers`: so many clients at once, each with four prompts of 1,024 tokens one after the other
  for 257 tokens each, streamed. With `--every-token` the chosen tokens' log-probabilities are asked
  for as well, so that each token is an event of the stream even where it has no text, as most have
  none with random weights: without it the figures between events say little there.

Prints a table; `--csv` appends lines `what, engine, value, unit` to a file.
"""

import argparse
import asyncio
import csv
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx

from .endpoint import Endpoint

_WARM_UP = 3
_AT_ONCE = 32
_TOKENS = 1024
_ANSWER = 257
_ROUNDS = 4


@dataclass(frozen=True)
class Line:
    """One figure."""

    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class Answer:
    """One streamed answer: seconds until its first token, and between one and the next."""

    first: float
    gaps: tuple[float, ...]

    @classmethod
    def of(cls, started: float, moments: Sequence[float]) -> "Answer":
        """From when its events came.

        Raises:
            ValueError: there were none, since no token had text of its own.
        """
        if not moments:
            raise ValueError("an answer had no text, so no event: ask with --every-token")
        return cls(moments[0] - started, tuple(b - a for a, b in pairwise(moments)))


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
        """Seconds until the whole answer of one token is there."""
        body = self._body(tokens, 1)
        started = time.perf_counter()
        (await self._client.post("/v1/completions", json=body)).raise_for_status()
        return time.perf_counter() - started

    async def stream(self, tokens: int, answer: int) -> Answer:
        """Ask for an answer of so many tokens, and note when each comes."""
        started = time.perf_counter()
        came: list[tuple[float, int]] = []
        await self.listen(tokens, answer, came)
        return Answer.of(started, [at for at, _ in came])

    async def listen(self, tokens: int, answer: int, came: list[tuple[float, int]]) -> None:
        """Note every event of an answer as it comes: its moment, and how many tokens it has.

        Without `every_token` nobody says how many: each event counts for one.
        """
        body = {**self._body(tokens, answer), **self._streamed}
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {") and (choices := json.loads(line[6:]).get("choices")):
                    scored = choices[0].get("logprobs") or {}
                    came.append((time.perf_counter(), len(scored.get("tokens") or [None])))

    def _body(self, tokens: int, answer: int) -> dict[str, object]:
        prompt = [self._random.randrange(self._vocabulary) for _ in range(tokens)]
        return {
            "model": self._model, "prompt": prompt, "max_tokens": answer, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip


async def waits(client: Client, tokens: int, requests: int) -> list[Line]:
    """One prompt after the other, after a few that do not count."""
    seconds = [await client.ask(tokens) for _ in range(_WARM_UP + requests)][_WARM_UP:]
    what = f"{tokens:,} tokens, 1 out"
    return [
        Line(f"{what}, median", statistics.median(seconds) * 1000, "ms"),
        Line(f"{what}, most of {requests}", max(seconds) * 1000, "ms"),
    ]


async def rate(client: Client, prompts: int) -> list[Line]:
    """Prompts a second."""
    await _at_once(_AT_ONCE, [lambda: client.ask(_TOKENS)] * _AT_ONCE)
    started = time.perf_counter()
    await _at_once(_AT_ONCE, [lambda: client.ask(_TOKENS)] * prompts)
    seconds = time.perf_counter() - started
    what = f"{prompts} prompts of {_TOKENS:,}, 1 out, {_AT_ONCE} at once"
    return [Line(what, prompts / seconds, "prompts/s")]


async def answers(client: Client, clients: int) -> list[Line]:
    """Generated tokens a second, and what each client sees."""
    came: list[Answer] = []

    async def ask() -> None:
        came.append(await client.stream(_TOKENS, _ANSWER))

    started = time.perf_counter()
    await _at_once(clients, [ask] * (clients * _ROUNDS))
    seconds = time.perf_counter() - started
    gaps = sorted(gap for answer in came for gap in answer.gaps)
    what = f"{clients} at once, {_TOKENS:,} in, {_ANSWER} out"
    first = statistics.median(answer.first for answer in came)
    return [
        Line(what, len(came) * _ANSWER / seconds, "tokens/s"),
        Line(f"{what}: first token, median", first * 1000, "ms"),
        Line(f"{what}: between tokens, median", statistics.median(gaps) * 1000, "ms"),
        Line(f"{what}: between tokens, p99", gaps[int(len(gaps) * 0.99)] * 1000, "ms"),
    ]


async def _at_once(most: int, calls: list[Callable[[], Awaitable[object]]]) -> None:
    """Make all calls, so many at a time."""
    left: Iterator[Callable[[], Awaitable[object]]] = iter(calls)

    async def work() -> None:
        for call in left:
            await call()

    await asyncio.gather(*(work() for _ in range(most)))


async def measure(options: argparse.Namespace) -> list[Line]:
    """Everything that the options ask for."""
    most = max(_AT_ONCE, options.answers)
    lines: list[Line] = []
    client = Client(options.base_url, most, options.vocabulary, options.every_token)
    async with client:
        for tokens in options.lengths:
            lines += await waits(client, tokens, options.requests)
        if options.rate:
            lines += await rate(client, options.rate)
        if options.answers:
            lines += await answers(client, options.answers)
    return lines


def write(lines: list[Line], engine: str, path: Path) -> None:
    """Append to a file of figures."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for line in lines:
            writer.writerow([line.what, engine, f"{line.value:.4g}", line.unit])


def main() -> None:
    """Measure, print, and write down."""
    parser = argparse.ArgumentParser(description="What short prompts cost.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--engine", default="longreach")
    parser.add_argument("--lengths", type=int, nargs="*", default=[16, 1024, 8192])
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--answers", type=int, default=48)
    parser.add_argument("--every-token", action="store_true", help="an event for each token")
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    lines = asyncio.run(measure(options))
    for line in lines:
        print(f"{line.what:<60} {line.value:10.2f} {line.unit}")
    if options.csv is not None:
        write(lines, options.engine, options.csv)


if __name__ == "__main__":
    main()
