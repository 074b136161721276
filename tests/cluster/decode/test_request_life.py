"""A request's life at a decode replica, over a worker and a prefill deployment that play along."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from longreach.cluster.decode import other_gangs
from longreach.cluster.decode.other_gangs import OtherGangs
from longreach.cluster.decode.request_life import RequestLife, State
from longreach.cluster.messages import AnswerOrder, ComputedHere, PrefillOrder, Standing
from longreach.cluster.metrics import Metrics, render
from longreach.cluster.recovery import Recovery
from longreach.cluster.settings import HandOffTerms, ModelSettings
from longreach.engine.errors import (
    LongreachError,
    LostError,
    NotUpError,
    PoisonousError,
    TransferError,
    UnavailableError,
)
from longreach.engine.messages import (
    GenerationRequest,
    Prefilled,
    Progress,
    SamplingParameters,
    Timings,
)

TERMS = HandOffTerms(ModelSettings(path="pocket", name="a model"), "object_store")
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

    def __init__(self, events: AsyncGenerator[Any, None], calls: list[tuple[Any, ...]]) -> None:
        self._events, self._calls = events, calls
        self.cancelled = False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._events)

    def cancel(self) -> None:
        self.cancelled = True
        self._calls.append(("cancel",))


class Promise:
    """An object reference that is ready."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self.value, LongreachError):
            raise RayTaskError("call", "", self.value)
        return self.value


async def ready(value: Any) -> Any:
    return value


@dataclass(eq=False)
class Deployment:
    """A handle of the gangs' deployment, which is the same as itself alone."""

    prefill: Remote
    broadcast: Callable[..., Any]


class Stage:
    """Everything around one life."""

    def __init__(
        self,
        folder: Path,
        at_the_worker: bool = False,
        retries: int = 2,
        scored: int | None = None,
    ) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.states: list[State] = []
        self.prefill_events: list[Any] = [None, Progress(1, 2), PREFILLED]
        self.gone: set[str] = set()  # orders whose gang is not on Serve's list any more
        self.later_events: list[list[Any]] = []  # what the gangs say that come after the first
        self.reservation: Any = None  # what goes wrong with it
        self.worker_is_gone = False
        self.folder = folder
        self.computing: list[Any] = []
        self.error: Exception | None = None
        self.waits = False
        self.streams: list[Stream] = []
        prompt = np.zeros(2, dtype=np.int32)
        sampling = SamplingParameters(max_tokens=1, prompt_logprobs=scored)
        request = GenerationRequest("a", prompt, sampling, arrived=0.0)
        worker = SimpleNamespace(
            reserve=Remote(self.calls, "reserve", lambda: Promise("a destination")),
            go_on=Remote(self.calls, "go_on", self._go_on),
            until_released=Remote(self.calls, "until_released", "a release"),
            answer=Remote(self.calls, "answer", self._answer),
            generate=Remote(self.calls, "generate", self._generate),
            release=Remote(self.calls, "release"),
        )
        prefill = Deployment(Remote(self.calls, "prefill", self._prefill), self._broadcast)
        gang = None if at_the_worker else cast(Any, prefill)
        sink = Metrics(folder, "decode", "a model")
        self.life = RequestLife(
            request, worker, TERMS, gang, OtherGangs(TERMS), Recovery(retries), sink, "an ingress"
        )

    def _go_on(self) -> "Promise":
        return Promise(LostError("the worker died") if self.worker_is_gone else "the rest")

    def _broadcast(self, method: str, names: list[str], terms: HandOffTerms) -> Any:
        said = Standing(frozenset(names) - self.gone, takes_others=True)
        return SimpleNamespace(results_async=lambda timeout_s: ready([said]))

    def _prefill(self) -> Stream:
        said = self.later_events.pop(0) if self.streams else self.prefill_events

        async def events() -> AsyncGenerator[Any, None]:
            for event in said:
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, asyncio.Event):
                    await asyncio.sleep(0.02)  # some looks at the other gangs
                    continue
                yield event
            if self.waits:
                await asyncio.Event().wait()

        self.streams.append(Stream(events(), self.calls))
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


def test_a_life_goes_from_reservation_to_release(tmp_path: Path) -> None:
    began = time.time()
    stage = Stage(tmp_path)
    assert stage.life.state is State.WAITING
    assert play(stage) == [Progress(1, 2)]
    assert stage.states == [State.PREFILLING, State.DECODING]
    assert stage.life.state is State.ENDED
    assert [call[0] for call in stage.calls] == [
        "reserve", "until_released", "prefill", "cancel", "answer", "release",
    ]  # fmt: skip
    [order] = stage.given_to("prefill")
    assert isinstance(order, PrefillOrder)
    assert cast(Any, order.destination).value == "a destination"
    assert order.released == "a release"
    name, logits, answer = stage.given_to("answer")
    assert (name, logits) == ("a", PREFILLED.logits)
    assert isinstance(answer, AnswerOrder)
    assert answer.listener == "an ingress"
    assert answer.prompt == Timings(0.5, 1.0, 0.25, 0.0, 0.0, {"linear": 0.1})
    assert began <= answer.taken <= answer.prompt_there <= time.time()
    assert answer.scores is None


def test_scores_of_a_prompt_go_to_the_worker_which_says_them_before_its_answer(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path)
    scores = np.ones((1, 2), dtype=np.float32)
    stage.prefill_events[-1] = replace(PREFILLED, scores=scores)
    play(stage)
    _, _, answer = stage.given_to("answer")
    assert answer.scores.values is scores


def test_a_life_without_a_gang_is_one_call_which_is_made_at_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path, at_the_worker=True)
    assert [call[0] for call in stage.calls] == ["generate"]
    stage.computing = [Progress(1, 2), ComputedHere(began=2.0, ended=5.0, seconds=1.5)]
    assert play(stage) == [Progress(1, 2)]
    assert stage.states == [State.PREFILLING, State.DECODING]
    assert stage.life.state is State.ENDED
    assert [call[0] for call in stage.calls] == ["generate", "release"]
    request, order = stage.given_to("generate")
    assert (request.request_id, order.listener) == ("a", "an ingress")


def test_whatever_goes_wrong_at_the_worker_ends_in_a_release(tmp_path: Path) -> None:
    stage = Stage(tmp_path, at_the_worker=True)
    stage.error = UnavailableError("failed")
    with pytest.raises(UnavailableError):
        play(stage)
    assert stage.releases == 1
    assert stage.life.state is State.ENDED


@pytest.mark.parametrize(
    ("where", "error"),
    [("prefill", TransferError("lost")), ("answer", UnavailableError("failed"))],
)
def test_whatever_goes_wrong_ends_in_a_release(
    tmp_path: Path, where: str, error: Exception
) -> None:
    stage = Stage(tmp_path)
    if where == "prefill":
        stage.prefill_events[1] = error
    else:
        stage.error = error
    with pytest.raises(type(error)):
        play(stage)
    assert stage.releases == 1
    assert stage.life.state is State.ENDED
    assert stage.streams[0].cancelled


def test_a_prefill_that_ends_without_a_result_is_an_error(tmp_path: Path) -> None:
    stage = Stage(tmp_path, retries=0)
    stage.prefill_events.pop()
    with pytest.raises(UnavailableError):
        play(stage)
    assert stage.releases == 1


def test_whoever_leaves_releases(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
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


def recoveries(stage: Stage) -> float:
    lines = render(stage.folder).decode().splitlines()
    name = "longreach_request_recoveries_total{"
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


def orders(stage: Stage) -> list[PrefillOrder]:
    return [call[1] for call in stage.calls if call[0] == "prefill"]


@pytest.mark.parametrize(
    ("error", "counted"), [(LostError("it died"), 1), (NotUpError("it is not up"), 0)]
)
def test_another_gang_goes_on_where_the_pages_of_the_first_are(
    tmp_path: Path, error: LongreachError, counted: int
) -> None:
    """A gang that is not up is waited for, which is no other attempt."""
    stage = Stage(tmp_path)
    stage.prefill_events = [None, Progress(1, 2), error]
    stage.later_events = [[None, PREFILLED]]
    assert play(stage) == [Progress(1, 2)]
    first, second = orders(stage)
    assert cast(Any, second.destination).value == "the rest"
    assert second.released is first.released
    assert (first.request.computed, second.request.computed) == (0, 1)
    assert second.request.request_id == "a"
    assert first.name == "a" != second.name
    assert recoveries(stage) == counted
    # The gang may live, and use its pages for others when it hears of its end.
    assert [call[0] for call in stage.calls] == [
        "reserve", "until_released", "prefill", "go_on", "cancel", "prefill", "cancel", "answer",
        "release",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("retries", "scored", "moves"),
    [(0, None, False), (1, None, True), (2, None, True), (2, 1, False)],
)
def test_a_prompt_leaves_a_gang_that_is_asked_to_go_behind_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retries: int, scored: int | None, moves: bool
) -> None:
    """And no death is counted; where nothing is begun again, the gang finishes it.

    Nor are scores of finished chunks kept.
    """
    monkeypatch.setattr(other_gangs, "_LOOK_SECONDS", 0.0)
    stage = Stage(tmp_path, retries=retries, scored=scored)
    a_while = asyncio.Event()
    stage.gone = {"a", "a-order-1"}
    stage.prefill_events = [None, a_while, None, a_while, Progress(1, 9), Progress(2, 9), PREFILLED]
    stage.later_events = [
        [None, a_while, Progress(1, 9), PREFILLED],
        [None, a_while, Progress(4, 9), PREFILLED],
    ]
    said = play(stage)
    if not moves:
        assert said == [Progress(1, 9), Progress(2, 9)]
        assert (len(orders(stage)), recoveries(stage)) == (1, 0)
        return
    assert said == [Progress(1, 9), Progress(1, 9), Progress(4, 9)]
    assert [order.request.computed for order in orders(stage)] == [0, 1, 1]
    assert all(order.terms == TERMS for order in orders(stage))
    assert recoveries(stage) == 2


def test_a_prompt_that_kills_gangs_is_refused(tmp_path: Path) -> None:
    stage = Stage(tmp_path, retries=1)
    stage.prefill_events = [None, Progress(1, 2), LostError("it died")]
    stage.later_events = [[None, LostError("it died")]] * 2
    with pytest.raises(PoisonousError):
        play(stage)
    assert len(orders(stage)) == 2
    assert stage.releases == 1


def test_where_the_worker_is_gone_nothing_is_asked_for(tmp_path: Path) -> None:
    """Its pages are; the ingress begins again somewhere else."""
    stage = Stage(tmp_path)
    stage.prefill_events = [None, Progress(1, 2), LostError("the worker died")]
    stage.worker_is_gone = True
    with pytest.raises(LostError):
        play(stage)
    assert len(orders(stage)) == 1
    assert recoveries(stage) == 0
    assert stage.releases == 1
