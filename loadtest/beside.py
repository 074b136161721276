"""What short prompts and streams cost beside one long prompt, and what they cost it.

    python -m longreach.loadtest.beside --long 1000000 --csv short.csv

Sends only prompts of random token ids, each another, of any endpoint that takes them. It asks

- the long prompt alone, for one token, `--rounds` times after one that does not count;
- the same while one client asks short prompts of `--short` tokens, one after the other with
  `--pause` seconds between them, for one token each;
- the same while `--streams` answers are generated: milliseconds a token of these before the long
  prompt and while it is computed and handed off.

Prints a table; `--csv` appends lines `what, engine, value, unit` to a file.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .token_client import Client, Line, command_line, measure_and_report

_SETTLE_SECONDS = 2.0
"""Until all streams generate."""


@dataclass
class Stream:
    """When tokens of one answer came: a moment, and how many."""

    came: list[tuple[float, int]] = field(default_factory=list)

    def per_token(self, start: float, end: float) -> float:
        """Seconds a token between two moments.

        Raises:
            ValueError: none came, or the answer ended before.
        """
        tokens = sum(count for at, count in self.came if start < at <= end)
        if not tokens or self.came[-1][0] < end:
            raise ValueError("an answer ended before the long prompt: raise --answer")
        return (end - start) / tokens


@dataclass(frozen=True)
class Sizes:
    """What is sent: tokens of prompts and answers, how many streams, and the pause in seconds."""

    long: int
    short: int
    streams: int
    answer: int
    pause: float
    rounds: int


async def alone(client: Client, sizes: Sizes) -> list[float]:
    """Seconds of the long prompt by itself."""
    return [await client.ask(sizes.long) for _ in range(sizes.rounds + 1)][1:]


async def beside_short_prompts(client: Client, sizes: Sizes) -> tuple[list[float], list[float]]:
    """Seconds of the long prompt, and of the short ones that were answered meanwhile."""
    longs: list[float] = []
    shorts: list[float] = []
    for _ in range(sizes.rounds):
        long = asyncio.ensure_future(client.ask(sizes.long))
        await asyncio.sleep(sizes.pause)
        while not long.done():
            waited = await client.ask(sizes.short)
            if not long.done():
                shorts.append(waited)
            await asyncio.sleep(sizes.pause)
        longs.append(await long)
    return longs, shorts


async def beside_streams(client: Client, sizes: Sizes, undisturbed: float) -> tuple[float, float]:
    """Seconds a token of the streams: undisturbed, for so many seconds, and beside the prompt."""
    streams = [Stream() for _ in range(sizes.streams)]
    tasks = [
        asyncio.ensure_future(client.listen(sizes.short, sizes.answer, stream.came))
        for stream in streams
    ]
    try:
        while not all(stream.came for stream in streams):
            await asyncio.sleep(0.05)
        await asyncio.sleep(_SETTLE_SECONDS)
        began = time.perf_counter()
        await asyncio.sleep(undisturbed)
        middle = time.perf_counter()
        await client.ask(sizes.long)
        ended = time.perf_counter()
        # Whatever came until then has been noted when the next token of each has come.
        await asyncio.sleep(_SETTLE_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return (
        statistics.mean(each.per_token(began, middle) for each in streams),
        statistics.mean(each.per_token(middle, ended) for each in streams),
    )


async def measure(client: Client, sizes: Sizes, undisturbed: float) -> list[Line]:
    """Everything, as figures."""
    long, short = f"{sizes.long:,} tokens", f"{sizes.short:,} tokens beside {sizes.long:,}"
    lone = statistics.median(await alone(client, sizes))
    longs, shorts = await beside_short_prompts(client, sizes)
    beside = statistics.median(longs)
    lines = [
        Line(f"{long}, 1 out, alone", lone, "s"),
        Line(f"{long}, 1 out, beside {sizes.short:,}", beside, "s"),
        Line(f"{long}, beside {sizes.short:,} over alone", beside / lone, "ratio"),
        *_waits(short, shorts),
    ]
    if sizes.streams:
        before, during = await beside_streams(client, sizes, undisturbed)
        what = f"{sizes.streams} streams"
        lines += [
            Line(f"{what}, undisturbed", before * 1000, "ms/token"),
            Line(f"{what}, beside {sizes.long:,}", during * 1000, "ms/token"),
            Line(f"{what}, beside {sizes.long:,} over undisturbed", during / before, "ratio"),
        ]
    return lines


def _waits(what: str, seconds: Sequence[float]) -> list[Line]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return [
        Line(f"{what}: median of {len(seconds)}", statistics.median(seconds), "s"),
        Line(f"{what}: p99", cuts[-1], "s"),
        Line(f"{what}: most", max(seconds), "s"),
    ]


async def _run(options: argparse.Namespace) -> list[Line]:
    sizes = Sizes(
        options.long, options.short, options.streams, options.answer, options.pause, options.rounds
    )
    at_once = options.streams + 2
    async with Client(options.base_url, at_once, options.vocabulary, every_token=True) as client:
        return await measure(client, sizes, options.undisturbed)


def main() -> None:
    """Measure, print, and write down."""
    parser = command_line("What a long prompt and others cost each other.")
    parser.add_argument("--long", type=int, default=1_000_000)
    parser.add_argument("--short", type=int, default=1024)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--answer", type=int, default=4000, help="tokens of each stream")
    parser.add_argument("--pause", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--undisturbed", type=float, default=4.0, help="seconds")
    options = parser.parse_args()
    measure_and_report(_run(options), options)


if __name__ == "__main__":
    main()
