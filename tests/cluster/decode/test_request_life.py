"""A request's life at a decode replica, over a worker and a prefill deployment that play along."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from longreach.cluster.decode.request_life import RequestLife, State
from longreach.cluster.messages import AnswerOrder, ComputedHere, PrefillOrder
from longreach.engine.errors import TransferError, UnavailableError
from longreach.engine.messages import (
    GenerationRequest,
    Prefilled,
    Progress,
    SamplingParameters,
    Timings,
)

PREFILLED = Prefilled(np.zeros(3, dtype=np.float32), 0.5, 1.0, 0.25, {"linear": 0.1})


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
        self.computing: list[Any] = []
        self.error: Exception | None = None
        self.waits = False
        self.streams: list[Stream] = []
        prompt = np.zeros(2, dtype=np.int32)
        request = GenerationRequest("a", prompt, SamplingParameters(max_tokens=1), arrived=0.0)
        worker = SimpleNamespace(
            reserve=Remote(self.calls, "reserve", "a destination"),
            until_released=Remote(self.calls, "until_released", "a release"),
            answer=Remote(self.calls, "answer", self._answer),
            generate=Remote(self.calls, "generate", self._generate),
            release=Remote(self.calls, "release"),
        )
        prefill = SimpleNamespace(prefill=Remote(self.calls, "prefill", self._prefill))
        gang = None if at_the_worker else cast(Any, prefill)
        self.life = RequestLife(request, worker, gang, "an ingress")

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

    async def _answer(self) -> None:
        self.states.append(self.life.state)
        if self.error is not None:
            raise self.error

    async def _generate(self) -> AsyncGenerator[Awaitable[Any], None]:
        for event in self.computing:
            yield ready(event)
        await self._answer()

    async def live(self) -> list[Progress]:
        events = []
        try:
            async with aclosing(self.life.events()) as said:
                async for event in said:
                    self.states.append(self.life.state)
                    events.append(event)
        finally:
            self.life.end()
        return events

    def given_to(self, name: str) -> tuple[Any, ...]:
        """What the only call of this name was given."""
        [given] = [call[1:] for call in self.calls if call[0] == name]
        return given

    @property
    def releases(self) -> int:
        return self.calls.count(("release", "a"))


def play(stage: Stage, scenario: Callable[[Stage], Awaitable[Any]] | None = None) -> Any:
    whole = scenario(stage) if scenario else stage.live()
    return asyncio.run(asyncio.wait_for(whole, 5))


def test_a_life_goes_from_reservation_to_release() -> None:
    stage = Stage()
    began = time.time()
    assert stage.life.state is State.WAITING
    assert play(stage) == [Progress(1, 2)]
    assert stage.states == [State.PREFILLING, State.DECODING]
    assert stage.life.state is State.ENDED
    assert [call[0] for call in stage.calls] == [
        "reserve", "until_released", "prefill", "answer", "release",
    ]  # fmt: skip
    [order] = stage.given_to("prefill")
    assert isinstance(order, PrefillOrder)
    assert (order.destination, order.released) == ("a destination", "a release")
    name, logits, answer = stage.given_to("answer")
    assert (name, logits) == ("a", PREFILLED.logits)
    assert isinstance(answer, AnswerOrder)
    assert answer.listener == "an ingress"
    assert answer.prompt == Timings(0.5, 1.0, 0.25, 0.0, 0.0, {"linear": 0.1})
    assert answer.taken <= began <= answer.prompt_there <= time.time()
    assert answer.scores is None


def test_scores_of_a_prompt_go_to_the_worker_which_says_them_before_its_answer() -> None:
    stage = Stage()
    scores = np.ones((1, 2), dtype=np.float32)
    stage.prefill_events[-1] = replace(PREFILLED, scores=scores)
    play(stage)
    _, _, answer = stage.given_to("answer")
    assert answer.scores.values is scores


def test_a_life_without_a_gang_is_one_call_which_is_made_at_once() -> None:
    stage = Stage(at_the_worker=True)
    assert [call[0] for call in stage.calls] == ["generate"]
    stage.computing = [Progress(1, 2), ComputedHere(began=2.0, ended=5.0, seconds=1.5)]
    assert play(stage) == [Progress(1, 2)]
    assert stage.states == [State.PREFILLING, State.DECODING]
    assert stage.life.state is State.ENDED
    assert [call[0] for call in stage.calls] == ["generate", "release"]
    request, order = stage.given_to("generate")
    assert (request.request_id, order.listener) == ("a", "an ingress")


def test_whatever_goes_wrong_at_the_worker_ends_in_a_release() -> None:
    stage = Stage(at_the_worker=True)
    stage.error = UnavailableError("failed")
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
        stage.error = error
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
