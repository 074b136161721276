"""What short prompts cost: the wait for one, how many a second, and how fast many are answered.

    python -m longreach.loadtest.short_prompts --base-url http://127.0.0.1:8000 --csv short.csv

Sends only prompts of random token ids, each another, of any endpoint that takes them. It asks

- `--lengths`: one prompt after the other of each length, for one token, `--requests` of each after
  `--warm-up` that do not count;
- `--rate`: so many prompts of 1,024 tokens for one token each, 32 at once;
- `--answers`: so many clients at once, each with four prompts of 1,024 tokens one after the other
  for 257 tokens each, streamed. With `--every-token` the chosen tokens' log-probabilities are asked
  for as well, so that each token is an event of the stream even where it has no text, as most have
  none with random weights: without it the figures between events say little there.

Prints a table; `--csv` appends lines `what, engine, value, unit` to a file.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .token_client import Client, Line, command_line, measure_and_report

_AT_ONCE = 32
_TOKENS = 1024
_ANSWER = 257
_ROUNDS = 4


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


async def stream(client: Client, tokens: int, answer: int) -> Answer:
    """Ask for an answer of so many tokens, and note when each comes."""
    started = time.perf_counter()
    came: list[tuple[float, int]] = []
    await client.listen(tokens, answer, came)
    return Answer.of(started, [at for at, _ in came])


async def waits(client: Client, tokens: int, requests: int, warm_up: int) -> list[Line]:
    """One prompt after the other, after a few that do not count."""
    seconds = [await client.ask(tokens) for _ in range(warm_up + requests)][warm_up:]
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
        came.append(await stream(client, _TOKENS, _ANSWER))

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
            lines += await waits(client, tokens, options.requests, options.warm_up)
        if options.rate:
            lines += await rate(client, options.rate)
        if options.answers:
            lines += await answers(client, options.answers)
    return lines


def main() -> None:
    """Measure, print, and write down."""
    parser = command_line("What short prompts cost.")
    parser.add_argument("--lengths", type=int, nargs="*", default=[16, 1024, 8192])
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3, help="of each length, not counted")
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--answers", type=int, default=48)
    parser.add_argument("--every-token", action="store_true", help="an event for each token")
    options = parser.parse_args()
    measure_and_report(measure(options), options)


if __name__ == "__main__":
    main()
