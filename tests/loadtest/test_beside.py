"""Short prompts and streams beside a long prompt, against an endpoint that is as slow as said."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import cast

import pytest

from longreach.loadtest.beside import Sizes, Stream, measure
from longreach.loadtest.token_client import Client, Line

SIZES = Sizes(long=1000, short=10, streams=2, answer=1000, pause=0.005, rounds=2)


@dataclass
class Endpoint:
    """A long prompt takes twice as long, and each token of a stream, beside others."""

    shorts_under_way: int = 0
    longs: int = 0
    most_longs: int = 0
    asked: list[int] = field(default_factory=list)

    async def ask(self, tokens: int) -> float:
        started = time.perf_counter()
        self.asked.append(tokens)
        if tokens < SIZES.long:
            self.shorts_under_way += 1
            await asyncio.sleep(0.01)
        else:
            self.longs += 1
            self.most_longs = max(self.most_longs, self.longs)
            shorts = len(self.asked)
            await asyncio.sleep(0.1)
            if len(self.asked) > shorts:
                await asyncio.sleep(0.1)
            self.longs -= 1
        return time.perf_counter() - started

    async def listen(self, tokens: int, answer: int, came: list[tuple[float, int]]) -> None:
        while True:
            await asyncio.sleep(0.02 if self.longs else 0.01)
            came.append((time.perf_counter(), 2))


def figures(lines: list[Line]) -> dict[str, tuple[float, str]]:
    return {line.what: (line.value, line.unit) for line in lines}


def test_each_is_measured_alone_and_beside_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longreach.loadtest.beside._SETTLE_SECONDS", 0.05)
    endpoint = Endpoint()
    found = figures(asyncio.run(measure(cast(Client, endpoint), SIZES, undisturbed=0.2)))
    assert endpoint.most_longs == 1
    alone, beside = (found[f"1,000 tokens, 1 out, {how}"][0] for how in ("alone", "beside 10"))
    assert 0.1 <= alone < beside
    assert found["1,000 tokens, beside 10 over alone"] == (pytest.approx(beside / alone), "ratio")
    [median] = [name for name in found if name.startswith("10 tokens beside 1,000: median of")]
    assert 0.01 <= found[median][0] <= found["10 tokens beside 1,000: most"][0]
    before, during = (found[f"2 streams, {how}"][0] for how in ("undisturbed", "beside 1,000"))
    assert 5 <= before < during
    assert found["2 streams, beside 1,000 over undisturbed"][0] == pytest.approx(during / before)


def test_tokens_are_counted_between_two_moments() -> None:
    stream = Stream([(1.0, 1), (2.0, 3), (3.0, 1), (4.0, 1)])
    assert stream.per_token(1.0, 3.0) == pytest.approx(2 / 4)


def test_an_answer_that_ended_before_is_no_measure() -> None:
    with pytest.raises(ValueError, match="--answer"):
        Stream([(1.0, 1), (2.0, 1)]).per_token(1.0, 3.0)
