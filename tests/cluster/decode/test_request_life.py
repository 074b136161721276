"""A request's life at a decode replica, over a worker and a prefill deployment that play along."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from longreach.cluster.decode.request_life import RequestLife, State
from longreach.cluster.messages import ComputedHere, PrefillOrder
from longreach.engine.errors import TransferError, UnavailableError
from longreach.engine.messages import (
    ChosenToken,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Prefilled,
    Progress,
    SamplingParameters,
)

PREFILLED = Prefilled(np.zeros(3, dtype=np.float32), 0.5, 1.0, 0.25, {"linear": 0.1})
DELTA = Delta(0, "a", (ChosenToken(1, -0.5),), "length")


class Remote:
    """`worker.method.remote(...)`, which writes down that it was called."""

    def __init__(self, calls: list[tuple[Any, ...]], name: str, result: Any = None) -> None:
        self._calls, self._name, self._result = calls, name, result

    def options(self, **ignored: Any) -> "Remote":
        return self

    def remote(self, *given: Any) -> Any:
        self._calls.append((self._name, *given))
        return self._result() if callable(self._result) else self._result


class Stream:
    """A streamed answer of a deployment."""

    def __init__(self, events: AsyncGenerator[Any, None]) -> None:
        self._events = events
        self.cancelled = False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._events)

    def cancel(self) -> None:
        self.cancelled = True


async def ready(value: Any) -> Any:
    return value


class Stage:
    """Everything around one life."""

    def __init__(self, at_the_worker: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.states: list[State] = []
        self.prefill_events: list[Any] = [None, Progress(1, 2), PREFILLED]
        self.answers: list[Any] = [([DELTA], True)]
        self.waits = False
        self.streams: list[Stream] = []
        prompt = np.zeros(2, dtype=np.int32)
        request = GenerationRequest("a", prompt, SamplingParameters(max_tokens=1), arrived=0.0)
        worker = SimpleNamespace(
            reserve=Remote(self.calls, "reserve", "a destination"),
            until_released=Remote(self.calls, "until_released", "a release"),
            answer=Remote(self.calls, "answer", self._answer),
            generate=Remote(self.calls, "generate", self._answer),
            release=Remote(self.calls, "release"),
        )
        prefill = SimpleNamespace(prefill=Remote(self.calls, "prefill", self._prefill))
        gang = None if at_the_worker else cast(Any, prefill)
        self.life = RequestLife(request, worker, gang)

    def _prefill(self) -> Stream:
        async def events() -> AsyncGenerator[Any, None]:
            for event in self.prefill_events:
                if isinstance(event, Exception):
                    raise event
                yield event
            if self.waits:
                await asyncio.Event().wait()

        self.streams.append(Stream(events()))
        return self.streams[-1]

    async def _answer(self) -> AsyncGenerator[Awaitable[Any], None]:
        for answer in self.answers:
            if isinstance(answer, Exception):
                raise answer
            yield ready(answer)

    async def live(self) -> list[Event]:
        events = []
        async for message in self.life.events():
            self.states.append(self.life.state)
            events += message
        return events

    @property
    def releases(self) -> int:
        return self.calls.count(("release", "a"))


def play(stage: Stage, scenario: Callable[[Stage], Awaitable[Any]] | None = None) -> Any:
    whole = scenario(stage) if scenario else stage.live()
    return asyncio.run(asyncio.wait_for(whole, 5))


def test_a_life_goes_from_reservation_to_release() -> None:
    stage = Stage()
    assert stage.life.state is State.WAITING
    progress, delta, finished = play(stage)
    assert (progress, delta) == (Progress(1, 2), DELTA)
    assert isinstance(finished, Finished)
    assert (finished.prompt_tokens, finished.completion_tokens) == (2, 1)
    timings = finished.timings
    assert (timings.queued, timings.prefill, timings.hand_off) == (0.5, 1.0, 0.25)
    assert stage.states == [State.PREFILLING, State.DECODING]
    assert stage.life.state is State.ENDED
    assert [call[0] for call in stage.calls] == [
        "reserve", "until_released", "prefill", "answer", "release",
    ]  # fmt: skip
    [order] = [call[1] for call in stage.calls if call[0] == "prefill"]
    assert isinstance(order, PrefillOrder)
    assert (order.destination, order.released) == ("a destination", "a release")


def test_a_life_without_a_gang_is_one_call() -> None:
    stage = Stage(at_the_worker=True)
    computed = ComputedHere(began=2.0, ended=5.0, seconds=1.5)
    stage.answers = [([Progress(1, 2)], False), ([computed, DELTA], False), ([DELTA], True)]
    progress, *deltas, finished = play(stage)
    assert (progress, deltas) == (Progress(1, 2), [DELTA, DELTA])
    assert isinstance(finished, Finished)
    assert (finished.prompt_tokens, finished.completion_tokens) == (2, 2)
    timings = finished.timings
    assert (timings.queued, timings.prefill, timings.hand_off) == (2.0, 3.0, 0.0)
    assert timings.prefill_stages == {"steps": 1.5}
    assert 0 <= timings.first_token < timings.served
    assert stage.states == [State.PREFILLING, State.DECODING, State.DECODING]
    assert stage.life.state is State.ENDED
    assert [call[0] for call in stage.calls] == ["generate", "release"]


def test_whatever_goes_wrong_at_the_worker_ends_in_a_release() -> None:
    stage = Stage(at_the_worker=True)
    stage.answers = [UnavailableError("failed")]
    with pytest.raises(UnavailableError):
        play(stage)
    assert stage.releases == 1
    assert stage.life.state is State.ENDED


@pytest.mark.parametrize(
    ("where", "error"),
    [("prefill", TransferError("lost")), ("answer", UnavailableError("failed"))],
)
def test_whatever_goes_wrong_ends_in_a_release(where: str, error: Exception) -> None:
    stage = Stage()
    if where == "prefill":
        stage.prefill_events[1] = error
    else:
        stage.answers = [error]
    with pytest.raises(type(error)):
        play(stage)
    assert stage.releases == 1
    assert stage.life.state is State.ENDED
    assert stage.streams[0].cancelled


def test_a_prefill_that_ends_without_a_result_is_an_error() -> None:
    stage = Stage()
    stage.prefill_events.pop()
    with pytest.raises(UnavailableError):
        play(stage)
    assert stage.releases == 1


def test_whoever_leaves_releases() -> None:
    stage = Stage()
    stage.prefill_events.pop()
    stage.waits = True

    async def leave(stage: Stage) -> None:
        living = asyncio.create_task(stage.live())
        while not stage.states:
            await asyncio.sleep(0.001)
        living.cancel()
        with pytest.raises(asyncio.CancelledError):
            await living

    play(stage, leave)
    assert stage.releases == 1
    assert stage.life.state is State.ENDED
