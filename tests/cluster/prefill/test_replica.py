"""A prefill replica in this process, over a gang and a decode worker that do as they are told."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextvars import ContextVar
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

from longreach.cluster.messages import PrefillOrder, Standing
from longreach.cluster.metrics import render
from longreach.cluster.prefill.gang import ChunkUnderWay, Gang, OfPrompt
from longreach.cluster.prefill.rank import RankResult
from longreach.cluster.prefill.replica import PrefillReplica
from longreach.cluster.prefill.scheduler import Chunk
from longreach.engine.errors import (
    ChunkOutOfMemoryError,
    LostError,
    NotUpError,
    TransferError,
    UnavailableError,
)
from longreach.engine.kv.destination import Destination
from longreach.engine.messages import GenerationRequest, Prefilled, Progress, SamplingParameters

from ..conftest import CHUNK_TOKENS, make_settings

LONGEST = 10.0
"""Seconds after which something that waits is taken to wait for good."""


CALLER = ContextVar("CALLER", default="nobody")
"""Whose call something is, as Ray knows it: by a context variable."""


class FakeGang:
    """Computes every chunk at once; `outcome` says why its pages could not be handed off."""

    def __init__(self) -> None:
        self.computed: list[Chunk] = []
        self.have: set[str] = set()
        self.came_back: list[tuple[str, str, int]] = []
        self.finished = 0
        self.begun_while: list[int] = []  # how many others were under way
        self.seconds_to_finish: Iterator[float] = repeat(0.001)
        self.may_compute, self.may_finish = asyncio.Event(), asyncio.Event()
        self.may_fetch = asyncio.Event()
        self.may_fetch.set()
        self.may_compute.set()
        self.may_finish.set()
        self.released: list[str] = []
        self.released_by: list[str] = []
        self.killed = False
        self.rank_is_lost = asyncio.Event()
        self.may_flush = asyncio.Event()
        self.may_flush.set()
        self.flush_seconds = 0.0
        self.flush_failure: str | None = None
        self.num_ranks = 1
        self.is_whole = True
        self.lost: list[int] = []  # of each time that ranks meet again
        self.told: set[asyncio.Task[Any]] = set()
        self.regrouped_while: list[int] = []  # how many chunks were under way
        self.may_grow, self.may_meet = asyncio.Event(), asyncio.Event()
        self.may_meet.set()
        self.outcome: Callable[[Chunk], str | None] = lambda chunk: None

    def tell_trouble_to(self, on_trouble: Callable[[BaseException], None]) -> None:
        self.be_in_trouble = on_trouble

    def begin_chunk(self, chunk: Chunk, prompt: OfPrompt) -> ChunkUnderWay:
        self.have.add(chunk.request_id)
        self.computed.append(chunk)
        self.begun_while.append(len(self.computed) - 1 - self.finished)
        nearly = asyncio.get_running_loop().create_future()
        return ChunkUnderWay(nearly, asyncio.ensure_future(self._compute(chunk, nearly)))

    async def _compute(self, chunk: Chunk, nearly: "asyncio.Future[bool]") -> list[RankResult]:
        await self.may_compute.wait()
        await asyncio.sleep(0.001)
        try:
            failure = self.outcome(chunk)
        except (RayTaskError, ActorDiedError):
            nearly.set_result(False)
            self.finished += 1
            raise
        nearly.set_result(True)
        await self.may_finish.wait()
        await asyncio.sleep(next(self.seconds_to_finish))
        self.finished += 1
        logits = np.zeros(3, dtype=np.float32) if chunk.is_last else None
        return [RankResult(logits, {"linear": 0.1}, failure)]

    def begin_fetch(self, chunk: Chunk, prompt: OfPrompt) -> "asyncio.Future[list[RankResult]]":
        self.have.add(chunk.request_id)
        self.computed.append(chunk)
        return asyncio.ensure_future(self._fetch(chunk))

    async def _fetch(self, chunk: Chunk) -> list[RankResult]:
        await self.may_fetch.wait()
        await asyncio.sleep(0.001)
        self.finished += 1
        return [RankResult(None, {"hand-off": 0.1}, self.outcome(chunk))]

    async def flush(self, request_id: str) -> str | None:
        await self.may_flush.wait()
        await asyncio.sleep(self.flush_seconds)
        return self.flush_failure

    async def watch(self, is_busy: Callable[[], bool]) -> str:
        await self.rank_is_lost.wait()
        return "rank 0 died"

    def holds(self, request_id: str) -> bool:
        return request_id in self.have

    async def regroup(self) -> int:
        """So many ranks were lost as was said beforehand; all of them where nothing was."""
        self.regrouped_while.append(len(self.computed) - self.finished)
        if not self.lost:
            raise LostError("no rank is left")
        self.rank_is_lost.clear()
        lost, self.lost = self.lost[0], self.lost[1:]
        self.is_whole = not lost
        await self.may_meet.wait()
        return lost

    async def recruit(self) -> None:
        await self.may_grow.wait()

    def come_back(self, request_id: str, to: str, prompt: OfPrompt, done: int) -> None:
        assert request_id in self.have
        self.have.remove(request_id)
        self.have.add(to)
        self.came_back.append((request_id, to, done))

    def release(self, request_id: str) -> None:
        self.have.discard(request_id)
        self.released.append(request_id)
        self.released_by.append(CALLER.get())

    def kill(self) -> None:
        self.killed = True


class FakeWorker:
    """What a decode worker promises: pages, and to say when the request is over.

    Args:
        done: tokens whose pages it has.
    """

    def __init__(self, done: int = 0) -> None:
        self.done = done
        self.has_pages = asyncio.Event()
        self.has_pages.set()
        self.is_released = asyncio.Event()
        self.is_dead = False

    def die(self) -> None:
        self.is_dead = True
        self.is_released.set()

    def order(self, request: GenerationRequest) -> PrefillOrder:
        terms = make_settings(1).worker.terms
        return PrefillOrder(request, cast(Any, self._pages()), cast(Any, self._release()), terms)

    def _pages(self) -> "Promise":
        return Promise(self.has_pages, lambda: Destination("a", self.done))

    def _release(self) -> "Promise":
        def outcome() -> None:
            if self.is_dead:
                raise ActorDiedError

        return Promise(self.is_released, outcome)


class Promise:
    """An object reference that is ready when an event happens."""

    def __init__(self, kept: asyncio.Event, outcome: Callable[[], Any]) -> None:
        self._kept, self._outcome = kept, outcome

    def __await__(self) -> Generator[Any, None, Any]:
        yield from self._kept.wait().__await__()
        return self._outcome()


@pytest.fixture
def gang(monkeypatch: pytest.MonkeyPatch) -> FakeGang:
    fake = FakeGang()
    # A chunk at a time.
    monkeypatch.setattr("longreach.cluster.prefill.scheduler._BACK_TOKENS", CHUNK_TOKENS)

    async def start(settings: Any, metrics_directory: Path) -> FakeGang:
        return fake

    monkeypatch.setattr(Gang, "start", start)
    monkeypatch.setattr(ray, "put", lambda value: value)
    return fake


Scenario = Callable[[PrefillReplica], Awaitable[object]]


@pytest.fixture
def play(gang: FakeGang, tmp_path: Path) -> Callable[[Scenario], Any]:
    """Run a scenario against a new replica; waiting for good is a failure."""

    def run(scenario: Scenario) -> Any:
        async def scene() -> object:
            replica = PrefillReplica.__new__(PrefillReplica)
            await replica.__init__(make_settings(1).gangs[0], tmp_path)
            return await asyncio.wait_for(scenario(replica), LONGEST)

        return asyncio.run(scene())

    return run


async def prefill(
    replica: PrefillReplica,
    name: str,
    tokens: int,
    worker: FakeWorker | None = None,
    number: int = 0,
    **fields: Any,
) -> list[Progress | Prefilled | None]:
    prompt = np.zeros(tokens, dtype=np.int32)
    sampling = SamplingParameters(max_tokens=1, prompt_logprobs=fields.pop("scored", None))
    request = GenerationRequest(name, prompt, sampling, arrived=0.0, **fields)
    order = replace((worker or FakeWorker()).order(request), number=number)
    return [event async for event in replica.prefill(order)]


def test_a_prompt_is_computed_chunk_by_chunk(play: Any, gang: FakeGang) -> None:
    worker = FakeWorker()

    async def scenario(replica: PrefillReplica) -> list[Progress | Prefilled | None]:
        said = await prefill(replica, "a", CHUNK_TOKENS + 1, worker)
        assert gang.released == [], "its worker may die yet, and its pages be wanted again"
        assert replica._scheduler.usage == 0, "others may have them"
        worker.is_released.set()
        while not gang.released:
            await asyncio.sleep(0.001)
        return said

    events = play(scenario)
    assert gang.begun_while == [0, 1], "the next chunk waited for the results of the one before"
    assert events[:2] == [None, Progress(CHUNK_TOKENS, CHUNK_TOKENS + 1)]
    assert isinstance(events[2], Prefilled)
    assert gang.released == ["a"]


def test_a_gang_of_other_settings_takes_nothing_from_a_worker(play: Any, gang: FakeGang) -> None:
    """While a configuration takes the place of another, an old replica may ask a new gang."""

    async def scenario(replica: PrefillReplica) -> list[Standing]:
        order = FakeWorker().order(
            GenerationRequest(
                "a", np.zeros(9, dtype=np.int32), SamplingParameters(max_tokens=1), arrived=0.0
            )
        )
        narrow = order.terms.model.model_copy(update={"kv_cache_dtype": "fp8_e4m3"})
        for terms in (replace(order.terms, model=narrow), replace(order.terms, transport="nixl")):
            with pytest.raises(NotUpError):
                await anext(replica.prefill(replace(order, terms=terms)))
            assert await replica.standing(["a"], terms) == Standing(frozenset(), False)
        said = [await replica.standing(["a", "b"], order.terms)]
        taken = replica.prefill(order)
        await anext(taken)
        said.append(await replica.standing(["a", "b"], order.terms))
        await taken.aclose()
        replica._lose(RuntimeError("a rank died"))
        return [*said, await replica.standing(["b"], order.terms)]

    assert play(scenario) == [
        Standing(frozenset(), takes_others=True),
        Standing(frozenset("a"), takes_others=True),
        Standing(frozenset(), takes_others=False),
    ]
    assert not gang.computed


def test_chunks_under_way_say_what_they_did_in_order(play: Any, gang: FakeGang) -> None:
    """Whichever of their results comes first."""

    async def scenario(replica: PrefillReplica) -> list[Progress | Prefilled | None]:
        gang.may_finish.clear()
        prefilling = asyncio.create_task(prefill(replica, "a", 4 * CHUNK_TOKENS))
        while len(gang.computed) < 2:
            await asyncio.sleep(0.001)
        gang.seconds_to_finish = iter([0.05, 0.0, 0.0, 0.0])
        gang.may_finish.set()
        return await prefilling

    events = play(scenario)
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done == [CHUNK_TOKENS, 2 * CHUNK_TOKENS, 3 * CHUNK_TOKENS]


def test_whoever_leaves_before_a_chunk_is_nearly_computed_gets_no_other(
    play: Any, gang: FakeGang
) -> None:
    """And whoever comes until then is next."""
    worker = FakeWorker()

    async def scenario(replica: PrefillReplica) -> None:
        gang.may_compute.clear()
        leaving = asyncio.create_task(prefill(replica, "long", 9 * CHUNK_TOKENS, worker))
        while not gang.computed:
            await asyncio.sleep(0.001)
        coming = asyncio.create_task(prefill(replica, "short", 9))
        worker.is_released.set()
        with pytest.raises(UnavailableError):
            await leaving
        await asyncio.sleep(0.01)
        gang.may_compute.set()
        await coming

    play(scenario)
    assert [chunk.request_id for chunk in gang.computed] == ["long", "short"]


def test_a_rank_that_dies_under_way_ends_what_was_begun_after(play: Any, gang: FakeGang) -> None:
    async def scenario(replica: PrefillReplica) -> None:
        def outcome(chunk: Chunk) -> None:
            if chunk.start:
                raise RayTaskError("begin_chunk", "", RuntimeError("a device is lost"))

        gang.outcome = outcome
        with pytest.raises(UnavailableError):
            await prefill(replica, "a", 3 * CHUNK_TOKENS)

    play(scenario)
    assert gang.killed
    assert len(gang.computed) == 2


def test_no_call_that_must_arrive_belongs_to_a_request(play: Any, gang: FakeGang) -> None:
    """Serve cancels whatever a request has submitted when its client leaves."""
    worker = FakeWorker()

    async def scenario(replica: PrefillReplica) -> None:
        CALLER.set("a request")
        gang.outcome = lambda chunk: None if leaving.cancel() else "already over"
        leaving = asyncio.create_task(prefill(replica, "a", 3 * CHUNK_TOKENS, worker))
        with pytest.raises(asyncio.CancelledError):
            await leaving
        worker.is_released.set()
        while not gang.released:
            await asyncio.sleep(0.001)

    play(scenario)
    assert gang.released_by == ["nobody"]


def test_whatever_ends_the_loop_ends_the_requests(play: Any, gang: FakeGang) -> None:
    async def scenario(replica: PrefillReplica) -> None:
        def broken() -> Chunk:
            raise ZeroDivisionError

        replica._scheduler.next = broken
        with pytest.raises(UnavailableError):
            await prefill(replica, "a", 10)
        with pytest.raises(UnavailableError):
            await replica.check_health()
        with pytest.raises(UnavailableError):
            await prefill(replica, "b", 10)

    play(scenario)
    assert gang.killed


def test_a_request_that_waits_for_pages_is_there_and_ends_with_the_gang(
    play: Any, gang: FakeGang
) -> None:
    """Whoever stops a replica waits for what it has; what waits must not wait in vain."""
    worker = FakeWorker()

    async def scenario(replica: PrefillReplica) -> None:
        worker.has_pages.clear()
        waiting = asyncio.create_task(prefill(replica, "waiting", 10, worker))
        released = asyncio.create_task(prefill(replica, "served", 10))
        await released
        assert [chunk.request_id for chunk in gang.computed] == ["served"]
        gang.rank_is_lost.set()
        with pytest.raises(UnavailableError):
            await waiting

    play(scenario)


def test_a_released_request_stops(play: Any, gang: FakeGang) -> None:
    worker = FakeWorker()

    async def scenario(replica: PrefillReplica) -> None:
        gang.outcome = lambda chunk: worker.is_released.set()
        with pytest.raises(UnavailableError):
            await prefill(replica, "a", 30 * CHUNK_TOKENS, worker)
        while replica._scheduler.usage:
            await asyncio.sleep(0.001)

    play(scenario)
    assert len(gang.computed) < 10
    assert set(gang.released) == {"a"}


def test_after_a_failed_hand_off_nothing_more_is_computed(play: Any, gang: FakeGang) -> None:
    async def scenario(replica: PrefillReplica) -> None:
        gang.outcome = lambda chunk: "pages did not reach the decode replica"
        with pytest.raises(TransferError):
            await prefill(replica, "a", 3 * CHUNK_TOKENS)
        gang.outcome = lambda chunk: None
        await prefill(replica, "b", 1)

    play(scenario)
    # The second chunk was begun before anyone knew.
    assert [chunk.request_id for chunk in gang.computed] == ["a", "a", "b"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_too_little_memory_ends_one_request(play: Any, gang: FakeGang, num_ranks: int) -> None:
    """Of several ranks, the others wait in a collective until they are freed, and meet again."""
    gang.num_ranks = num_ranks
    gang.lost = [0]

    def outcome(chunk: Chunk) -> None:
        if chunk.request_id == "big" and chunk.start:
            raise RayTaskError("begin_chunk", "", ChunkOutOfMemoryError(chunk.start, chunk.end))

    gang.outcome = outcome

    async def scenario(replica: PrefillReplica) -> list[object]:
        requests = [prefill(replica, "big", 3 * CHUNK_TOKENS), prefill(replica, "small", 9)]
        outcomes = await asyncio.gather(*requests, return_exceptions=True)
        after = await asyncio.gather(prefill(replica, "next", 9), return_exceptions=True)
        assert not gang.killed
        return [*outcomes, *after]

    big, _, after = play(scenario)
    assert isinstance(big, ChunkOutOfMemoryError)
    assert big.end == 2 * CHUNK_TOKENS
    assert "big" in gang.released
    assert len(gang.regrouped_while) == num_ranks - 1
    assert isinstance(after, list)


def test_ranks_meet_again_where_one_had_no_memory_to_share(play: Any, gang: FakeGang) -> None:
    """The prompt is handed back, to be begun again; nobody is killed."""
    gang.num_ranks, gang.lost = 2, [0]
    gang.may_compute.clear()

    async def scenario(replica: PrefillReplica) -> list[Any]:
        first = asyncio.create_task(prefill(replica, "a", 2 * CHUNK_TOKENS))
        await asyncio.sleep(0.02)
        gang.be_in_trouble(RayTaskError("share", "", ChunkOutOfMemoryError(0, CHUNK_TOKENS)))
        gang.may_compute.set()
        [lost] = await asyncio.gather(first, return_exceptions=True)
        after = await prefill(replica, "next", 9)
        assert not gang.killed
        return [lost, after]

    lost, after = play(scenario)
    assert isinstance(lost, LostError)
    assert len(gang.regrouped_while) == 1
    assert isinstance(after, list)


@pytest.mark.parametrize("arrived", [0, 2 * CHUNK_TOKENS, 2 * CHUNK_TOKENS + 128])
@pytest.mark.parametrize("found_by", ["chunk", "pulse"])
def test_a_prompt_goes_on_with_the_ranks_that_are_left(
    play: Any, gang: FakeGang, tmp_path: Path, found_by: str, arrived: int
) -> None:
    """Behind its last whole chunk, with the pages that lie here, whatever lies at the worker.

    Whoever has not begun hears nothing of it.
    """
    gang.lost = [1]

    def outcome(chunk: Chunk) -> None:
        if chunk.request_id == "a" and chunk.start == 2 * CHUNK_TOKENS:
            if found_by == "chunk":
                raise ActorDiedError
            gang.rank_is_lost.set()

    async def scenario(replica: PrefillReplica) -> list[Any]:
        gang.outcome = outcome
        first = asyncio.create_task(prefill(replica, "a", 5 * CHUNK_TOKENS))
        other = FakeWorker()
        other.has_pages.clear()
        waiting = asyncio.create_task(prefill(replica, "other", 9, other))
        with pytest.raises(LostError) as lost:
            await first
        assert lost.value.begun
        other.has_pages.set()
        gang.outcome = lambda chunk: None
        await waiting
        await replica.check_health()
        assert not gang.killed
        there = FakeWorker(arrived)
        return await prefill(
            replica, "a", 5 * CHUNK_TOKENS, there, number=1, computed=2 * CHUNK_TOKENS
        )

    *_, prefilled = play(scenario)
    assert isinstance(prefilled, Prefilled)
    [(before, after, done)] = gang.came_back
    assert (before, after) == ("a", "a-order-1")
    if found_by == "chunk":
        assert done == 2 * CHUNK_TOKENS
        assert counted(tmp_path, AGAIN) == 0
    assert done >= 2 * CHUNK_TOKENS
    assert dealt(gang, after)[0] == (done, False)
    assert counted(tmp_path, "longreach_lost_total") == 1


def test_nothing_goes_on_before_the_ranks_have_met(play: Any, gang: FakeGang) -> None:
    """Pages would be pushed by as many ranks as there were."""
    gang.lost = [1]
    gang.may_meet.clear()

    async def scenario(replica: PrefillReplica) -> None:
        def outcome(chunk: Chunk) -> None:
            if chunk.start:
                raise ActorDiedError

        gang.outcome = outcome
        first = asyncio.create_task(prefill(replica, "a", 3 * CHUNK_TOKENS))
        while not gang.regrouped_while:
            await asyncio.sleep(0.001)
        gang.outcome = lambda chunk: None
        again = asyncio.create_task(prefill(replica, "a", 3 * CHUNK_TOKENS, number=1))
        await asyncio.sleep(0.02)
        assert gang.came_back == []
        gang.may_meet.set()
        with pytest.raises(UnavailableError):
            await first
        await again

    play(scenario)
    assert [done for _, _, done in gang.came_back] == [CHUNK_TOKENS]


def test_a_prompt_whose_pages_no_rank_has_begins_anew(play: Any, gang: FakeGang) -> None:
    """The ranks that had them are gone, and one that came later lives."""
    gang.lost = [1]

    async def scenario(replica: PrefillReplica) -> None:
        def outcome(chunk: Chunk) -> None:
            if chunk.start:
                gang.have.clear()
                raise ActorDiedError

        gang.outcome = outcome
        with pytest.raises(LostError):
            await prefill(replica, "a", 3 * CHUNK_TOKENS)
        gang.outcome = lambda chunk: None
        await prefill(replica, "a", 3 * CHUNK_TOKENS, number=1)

    play(scenario)
    assert gang.came_back == []
    assert dealt(gang, "a-order-1")[0] == (0, False)


def test_a_new_rank_comes_where_no_chunk_has_been_begun_since(play: Any, gang: FakeGang) -> None:
    gang.lost = [1, 0]

    async def scenario(replica: PrefillReplica) -> None:
        def outcome(chunk: Chunk) -> None:
            raise ActorDiedError

        gang.outcome = outcome
        with pytest.raises(LostError):
            await prefill(replica, "a", CHUNK_TOKENS)
        gang.may_grow.set()
        while not gang.is_whole:
            await asyncio.sleep(0.001)

    play(scenario)


def test_a_chunk_that_fails_without_a_death_ends_the_gang(play: Any, gang: FakeGang) -> None:
    gang.lost = [0]

    async def scenario(replica: PrefillReplica) -> None:
        def outcome(chunk: Chunk) -> None:
            raise RayTaskError("begin_chunk", "", RuntimeError("a device is lost"))

        gang.outcome = outcome
        with pytest.raises(LostError):
            await prefill(replica, "a", CHUNK_TOKENS)
        with pytest.raises(UnavailableError):
            await replica.check_health()

    play(scenario)


def test_a_new_rank_comes_between_two_chunks(play: Any, gang: FakeGang) -> None:
    """Nobody's prompt is interrupted by it, and nothing is under way when ranks meet."""
    gang.lost = [1, 0]

    async def scenario(replica: PrefillReplica) -> None:
        gang.rank_is_lost.set()
        while not gang.regrouped_while:
            await asyncio.sleep(0.001)
        prefilling = asyncio.create_task(prefill(replica, "a", 40 * CHUNK_TOKENS))
        while len(gang.computed) < 3:
            await asyncio.sleep(0.001)
        gang.may_grow.set()
        [*_, prefilled] = await prefilling
        assert isinstance(prefilled, Prefilled)

    play(scenario)
    assert gang.regrouped_while == [0, 0]
    assert len(gang.computed) == 40


def test_no_rank_comes_while_pages_are_given_to_another(play: Any, gang: FakeGang) -> None:
    """Ranks part for it, and those would not come: a fetch that follows is no chunk under way."""
    gang.lost = [1, 0]

    async def scenario(replica: PrefillReplica) -> None:
        gang.rank_is_lost.set()
        while not gang.regrouped_while:
            await asyncio.sleep(0.001)
        are_given = asyncio.Event()
        gang.told = {asyncio.create_task(are_given.wait())}
        gang.may_grow.set()
        await asyncio.sleep(0.01)
        assert len(gang.regrouped_while) == 1
        are_given.set()
        gang.told = set()
        while len(gang.regrouped_while) < 2:
            await asyncio.sleep(0.001)

    play(scenario)


def test_a_rank_that_dies_while_another_waits_to_join_is_found(play: Any, gang: FakeGang) -> None:
    """The chunk under way never ends by itself."""
    gang.lost = [1, 1, 0]

    async def scenario(replica: PrefillReplica) -> None:
        gang.rank_is_lost.set()
        while not gang.regrouped_while:
            await asyncio.sleep(0.001)
        gang.may_compute.clear()
        prefilling = asyncio.create_task(prefill(replica, "a", 2 * CHUNK_TOKENS))
        while not gang.computed:
            await asyncio.sleep(0.001)
        gang.may_grow.set()
        await asyncio.sleep(0.01)
        assert len(gang.regrouped_while) == 1
        gang.rank_is_lost.set()
        gang.may_compute.set()  # as leaving the mesh frees those that wait
        with pytest.raises(LostError):
            await prefilling
        assert not gang.killed

    play(scenario)


def test_the_rest_of_a_hand_off_holds_nobody_up_and_is_what_hand_off_counts(
    play: Any, gang: FakeGang
) -> None:
    """Pages of one prompt travel to a decode worker that takes its time; others are computed."""
    gang.flush_seconds = 0.05

    async def scenario(replica: PrefillReplica) -> Prefilled:
        gang.may_flush.clear()
        slow = asyncio.create_task(prefill(replica, "slow", 10))
        while not gang.computed:
            await asyncio.sleep(0.001)
        other = asyncio.create_task(prefill(replica, "other", 3 * CHUNK_TOKENS))
        while len(gang.computed) < 4:
            await asyncio.sleep(0.001)
        assert not slow.done()
        assert gang.released == []
        gang.may_flush.set()
        await other
        [*_, prefilled] = await slow
        assert isinstance(prefilled, Prefilled)
        return prefilled

    assert play(scenario).hand_off >= 0.05


def counted(folder: Path, name: str) -> float:
    """Of the prefill replica; 0 where nothing was counted."""
    lines = render(folder).decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")), 0.0)


def test_pages_that_did_not_arrive_end_the_request(
    play: Any, gang: FakeGang, tmp_path: Path
) -> None:
    gang.flush_failure = "pages did not reach the decode worker"

    async def scenario(replica: PrefillReplica) -> None:
        with pytest.raises(TransferError):
            await prefill(replica, "a", 10)
        assert replica._scheduler.usage == 0

    play(scenario)
    assert counted(tmp_path, "longreach_handoff_failures_total") == 1
    assert counted(tmp_path, "longreach_lost_total") == 0


def test_a_rank_that_hangs_ends_the_requests_and_the_gang(
    play: Any, gang: FakeGang, tmp_path: Path
) -> None:
    async def scenario(replica: PrefillReplica) -> None:
        gang.may_flush.clear()
        waiting = asyncio.create_task(prefill(replica, "a", 10))
        while not gang.computed:
            await asyncio.sleep(0.001)
        gang.rank_is_lost.set()
        with pytest.raises(UnavailableError):
            await waiting
        with pytest.raises(UnavailableError):
            await replica.check_health()

    play(scenario)
    assert counted(tmp_path, "longreach_lost_total") == 1
    assert counted(tmp_path, "longreach_handoff_failures_total") == 0
    assert gang.killed


AGAIN = "longreach_prefill_tokens_again_total"
BACK = "longreach_prefill_tokens_back_total"
TOKENS = 3 * CHUNK_TOKENS + 5


def dealt(gang: FakeGang, name: str) -> list[tuple[int, bool]]:
    """Where the chunks of a request begin, and whether they were fetched."""
    return [(chunk.start, chunk.is_back) for chunk in gang.computed if chunk.request_id == name]


def test_chunks_whose_pages_the_worker_has_are_fetched(
    play: Any, gang: FakeGang, tmp_path: Path
) -> None:
    """And only the others are computed, progress or computed again."""
    worker = FakeWorker(done=2 * CHUNK_TOKENS + 128)

    async def scenario(replica: PrefillReplica) -> list[Any]:
        return await prefill(replica, "a", TOKENS, worker, computed=3 * CHUNK_TOKENS)

    none, progress, prefilled = play(scenario)
    assert none is None
    assert progress == Progress(3 * CHUNK_TOKENS, TOKENS)
    assert isinstance(prefilled, Prefilled)
    assert dealt(gang, "a") == [
        (0, True), (CHUNK_TOKENS, True), (2 * CHUNK_TOKENS, False), (3 * CHUNK_TOKENS, False)
    ]  # fmt: skip
    assert counted(tmp_path, "longreach_prefill_chunks_total") == 2
    assert counted(tmp_path, "longreach_prefill_tokens_total") == CHUNK_TOKENS + 5
    assert counted(tmp_path, BACK) == 2 * CHUNK_TOKENS
    assert counted(tmp_path, AGAIN) == CHUNK_TOKENS


@pytest.mark.parametrize("came", [0, 1])
def test_pages_that_could_not_be_fetched_are_never_used(
    play: Any, gang: FakeGang, came: int
) -> None:
    """And those that came before them are."""
    fails_at = came * CHUNK_TOKENS
    gang.outcome = lambda chunk: (
        "they did not come" if chunk.is_back and chunk.start == fails_at else None
    )

    async def scenario(replica: PrefillReplica) -> None:
        with pytest.raises(TransferError):
            await prefill(replica, "a", TOKENS, FakeWorker(done=2 * CHUNK_TOKENS))
        assert dealt(gang, "a")[-1] == (fails_at, True)
        await prefill(replica, "b", TOKENS, first_id="a")

    play(scenario)
    assert gang.came_back == ([("a", "b", fails_at)] if came else [])
    assert dealt(gang, "b")[0] == (fails_at, False)


def pages_do_not_come(chunk: Chunk, dies_at: int | None) -> str | None:
    """Of the first attempt; a rank dies under its chunks from there on, and hides the others'."""
    if chunk.request_id != "a":
        return None
    if dies_at is not None and chunk.start >= dies_at:
        raise ActorDiedError
    return "they did not come" if chunk.is_back else None


@pytest.mark.parametrize("later", [["b"], ["b", "c"]])
@pytest.mark.parametrize("dies_at", [None, 0, CHUNK_TOKENS])
@pytest.mark.parametrize("comes", ["before it fails", "after it failed"])
def test_no_later_attempt_uses_or_hands_off_pages_that_did_not_come(
    play: Any, gang: FakeGang, comes: str, dies_at: int | None, later: list[str]
) -> None:
    """The decode worker dies under the fetch, and a rank perhaps, and the request comes again."""
    gang.outcome = lambda chunk: pages_do_not_come(chunk, dies_at)
    gang.lost = [1]
    dying = FakeWorker(done=2 * CHUNK_TOKENS)

    async def scenario(replica: PrefillReplica) -> list[Any]:
        gang.may_fetch.clear()
        asked = [asyncio.create_task(prefill(replica, "a", TOKENS, dying))]
        while not gang.computed:
            await asyncio.sleep(0.001)
        if comes == "after it failed":
            gang.may_fetch.set()
            await asyncio.wait(asked)
        dying.die()
        for name in later:
            asked.append(asyncio.create_task(prefill(replica, name, TOKENS, first_id="a")))
            await asyncio.sleep(0.005)
        gang.may_fetch.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    first, *_, last = play(scenario)
    assert isinstance(first, (LostError, TransferError))
    assert isinstance(last[-1], Prefilled)
    assert "a" not in {before for before, _, _ in gang.came_back}
    if comes == "before it fails":
        assert dealt(gang, later[0])[0] == (0, False)


def hold_fetch(gang: FakeGang, start: int) -> None:
    """A fetch from there on does not end before `may_fetch` is set, and then nothing has come."""
    fetch = gang._fetch

    async def held(chunk: Chunk) -> list[RankResult]:
        gang.may_fetch = asyncio.Event() if chunk.start == start else gang.may_fetch
        return await fetch(chunk)

    gang._fetch = held
    gang.outcome = lambda chunk: (
        "they did not come" if chunk.is_back and chunk.start == start else None
    )


async def until_fetched_from(gang: FakeGang, start: int) -> None:
    while (start, True) not in dealt(gang, "a"):
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.005)


@pytest.mark.parametrize("why", ["first", "another prompt", "scored"])
def test_no_later_attempt_waits_for_a_fetch_that_it_cannot_gain_by(
    play: Any, gang: FakeGang, why: str
) -> None:
    """Ray takes up to a minute to say that a node has died, and so would the fetch."""
    fails_at = 0 if why == "first" else CHUNK_TOKENS
    hold_fetch(gang, fails_at)
    dying = FakeWorker(done=2 * CHUNK_TOKENS)

    async def scenario(replica: PrefillReplica) -> list[Any]:
        first = asyncio.create_task(prefill(replica, "a", TOKENS, dying))
        await until_fetched_from(gang, fails_at)
        dying.die()
        tokens = TOKENS + 1 if why == "another prompt" else TOKENS
        scored = 0 if why == "scored" else None
        said = await prefill(replica, "b", tokens, first_id="a", scored=scored)
        with pytest.raises((LostError, UnavailableError)):
            await first
        assert gang.released == [], "its pages are written to"
        gang.may_fetch.set()
        while not gang.released:
            await asyncio.sleep(0.001)
        assert gang.released == ["a"]
        return said

    *_, prefilled = play(scenario)
    assert isinstance(prefilled, Prefilled)
    assert gang.came_back == []
    assert dealt(gang, "b")[0] == (0, False)


@pytest.mark.parametrize("ends", ["it fails", "its request is over"])
def test_a_later_attempt_waits_for_a_fetch_before_which_pages_lie(
    play: Any, gang: FakeGang, ends: str
) -> None:
    """Until it has ended, or these are nobody's any more."""
    hold_fetch(gang, CHUNK_TOKENS)
    dying = FakeWorker(done=2 * CHUNK_TOKENS)

    async def scenario(replica: PrefillReplica) -> list[Any]:
        first = asyncio.create_task(prefill(replica, "a", TOKENS, dying))
        await until_fetched_from(gang, CHUNK_TOKENS)
        second = asyncio.create_task(prefill(replica, "b", TOKENS, first_id="a"))
        with pytest.raises(UnavailableError):
            await first
        await asyncio.sleep(0.01)
        assert not dealt(gang, "b")
        if ends == "it fails":
            gang.may_fetch.set()
        else:
            dying.is_released.set()
        return await second

    *_, prefilled = play(scenario)
    assert isinstance(prefilled, Prefilled)
    whole = CHUNK_TOKENS if ends == "it fails" else 0
    assert gang.came_back == ([("a", "b", whole)] if whole else [])
    assert dealt(gang, "b")[0] == (whole, False)


FAILURES = [ActorDiedError(), RayTaskError("begin_chunk", "", ChunkOutOfMemoryError(0, 1))]


@pytest.mark.parametrize("failure", FAILURES, ids=["rank lost", "out of memory"])
@pytest.mark.parametrize("comes", ["before it fails", "after it failed"])
def test_no_later_attempt_hands_off_a_chunk_that_failed_under_way(
    play: Any, gang: FakeGang, comes: str, failure: Exception
) -> None:
    """Pages of a collective that was given up are anything, and would count as arrived.

    A rank that ran out of memory has dropped the prompt, and has nothing to go on with.
    """
    gang.lost = [1]
    worker = FakeWorker()

    def outcome(chunk: Chunk) -> None:
        if chunk.request_id == "a" and chunk.start == CHUNK_TOKENS:
            raise failure
        if chunk.request_id == "a":
            gang.may_compute.clear()  # of the next one

    async def scenario(replica: PrefillReplica) -> list[Any]:
        gang.outcome = outcome
        first = asyncio.create_task(prefill(replica, "a", TOKENS, worker))
        while len(gang.computed) < 2:
            await asyncio.sleep(0.001)
        if comes == "after it failed":
            gang.may_compute.set()
            await asyncio.wait({first})
        worker.die()
        again = asyncio.create_task(prefill(replica, "b", TOKENS, first_id="a"))
        await asyncio.sleep(0.005)
        gang.may_compute.set()
        with pytest.raises((LostError, ChunkOutOfMemoryError)):
            await first
        said = await again
        assert not gang.killed
        return said

    *_, prefilled = play(scenario)
    assert isinstance(prefilled, Prefilled)
    whole = CHUNK_TOKENS if isinstance(failure, ActorDiedError) else 0
    assert gang.came_back == ([("a", "b", whole)] if whole else [])
    assert dealt(gang, "b")[0] == (whole, False)


def test_an_earlier_order_does_not_end_a_later_one(play: Any, gang: FakeGang) -> None:
    """Both wait for ranks to meet; who came last is the one that somebody waits for."""
    gang.lost = [1]
    gang.may_meet.clear()

    async def scenario(replica: PrefillReplica) -> list[Any]:
        gang.rank_is_lost.set()
        while not gang.regrouped_while:
            await asyncio.sleep(0.001)
        first = asyncio.create_task(prefill(replica, "a", TOKENS))
        await asyncio.sleep(0.005)
        second = asyncio.create_task(prefill(replica, "b", TOKENS, first_id="a"))
        await asyncio.sleep(0.005)
        gang.may_meet.set()
        with pytest.raises(UnavailableError):
            await first
        return await second

    *_, prefilled = play(scenario)
    assert isinstance(prefilled, Prefilled)


def test_a_prompt_that_waits_for_pages_to_come_back_holds_no_other_up(
    play: Any, gang: FakeGang
) -> None:
    """The worker that has them may be dead, and nobody know yet."""

    async def scenario(replica: PrefillReplica) -> list[Any]:
        gang.may_fetch.clear()
        waiting = asyncio.create_task(
            prefill(replica, "waits", TOKENS, FakeWorker(done=2 * CHUNK_TOKENS))
        )
        while not gang.computed:
            await asyncio.sleep(0.001)
        await prefill(replica, "others", TOKENS)
        [*_, prefilled] = await prefill(replica, "another", TOKENS)
        assert isinstance(prefilled, Prefilled)
        assert dealt(gang, "waits") == [(0, True)]
        gang.may_fetch.set()
        return await waiting

    *_, prefilled = play(scenario)
    assert isinstance(prefilled, Prefilled)
    assert [is_back for _, is_back in dealt(gang, "waits")] == [True, True, False, False]
    assert prefilled.stages["hand-off"] == pytest.approx(0.2)


@pytest.mark.parametrize("ends", ["released", "its worker dies"])
def test_pages_are_not_freed_while_something_is_being_fetched_into_them(
    play: Any, gang: FakeGang, ends: str
) -> None:
    """Whoever got them next would compute with what comes."""
    worker = FakeWorker(done=2 * CHUNK_TOKENS)
    large = 262144 - 128  # of 262144 tokens of pages that are there

    async def scenario(replica: PrefillReplica) -> None:
        gang.may_fetch.clear()
        fetching = asyncio.create_task(prefill(replica, "a", TOKENS, worker))
        while not gang.computed:
            await asyncio.sleep(0.001)
        worker.die() if ends == "its worker dies" else worker.is_released.set()
        with pytest.raises((LostError, UnavailableError)):
            await fetching
        waiting = asyncio.create_task(prefill(replica, "large", large))
        await prefill(replica, "small", 9)
        await asyncio.sleep(0.01)
        assert gang.released == []
        assert dealt(gang, "large") == []
        gang.may_fetch.set()
        await waiting
        assert "a" in gang.released

    play(scenario)


@pytest.mark.parametrize("found_by", ["fetch", "pulse"])
def test_a_rank_that_dies_under_a_fetch_is_replaced_once(
    play: Any, gang: FakeGang, tmp_path: Path, found_by: str
) -> None:
    """Whoever hears of it first; what is heard later, of calls to the dead one, means no other."""
    gang.lost = [1]

    def outcome(chunk: Chunk) -> None:
        if chunk.is_back and chunk.request_id == "a":
            raise ActorDiedError

    async def scenario(replica: PrefillReplica) -> list[Any]:
        gang.outcome = outcome
        gang.may_fetch.clear()
        first = asyncio.create_task(prefill(replica, "a", TOKENS, FakeWorker(done=CHUNK_TOKENS)))
        while not gang.computed:
            await asyncio.sleep(0.001)
        if found_by == "pulse":
            gang.rank_is_lost.set()
        else:
            gang.may_fetch.set()
        with pytest.raises(LostError):
            await first
        gang.may_fetch.set()
        await asyncio.sleep(0.01)
        there = FakeWorker(done=CHUNK_TOKENS)
        said = await prefill(replica, "a", TOKENS, there, number=1)
        await replica.check_health()
        assert not gang.killed
        return said

    *_, prefilled = play(scenario)
    assert isinstance(prefilled, Prefilled)
    assert len(gang.regrouped_while) == 1
    assert dealt(gang, "a-order-1")[0] == (0, True)


@pytest.mark.parametrize("ends", ["in prefill", "after prefill"])
def test_a_prompt_whose_worker_died_goes_on_with_the_pages_that_it_left(
    play: Any, gang: FakeGang, tmp_path: Path, ends: str
) -> None:
    worker = FakeWorker()

    async def scenario(replica: PrefillReplica) -> list[Any]:
        if ends == "in prefill":
            gang.outcome = lambda chunk: worker.die() if chunk.start else None
            with pytest.raises(LostError):
                await prefill(replica, "a", TOKENS, worker)
            gang.outcome = lambda chunk: None
        else:
            await prefill(replica, "a", TOKENS, worker)
            worker.die()
        # It fits in beside what lies there.
        await prefill(replica, "other", CHUNK_TOKENS)
        whole = {"first_id": "a", "computed": TOKENS}
        return await prefill(replica, "a-again-1", TOKENS, FakeWorker(), **whole)

    *_, prefilled = play(scenario)
    assert isinstance(prefilled, Prefilled)
    [(before, after, done)] = gang.came_back
    assert (before, after) == ("a", "a-again-1")
    # Its last chunk brings the logits, and is computed again; and one may have been under way.
    assert 2 * CHUNK_TOKENS <= done <= 3 * CHUNK_TOKENS
    assert dealt(gang, "a-again-1") == [
        (start, False) for start in range(done, TOKENS, CHUNK_TOKENS)
    ]
    assert counted(tmp_path, BACK) == done
    assert counted(tmp_path, AGAIN) == TOKENS - done


@pytest.mark.parametrize("why", ["another prompt", "scored", "taken"])
def test_pages_that_do_not_help_are_computed_anew(play: Any, gang: FakeGang, why: str) -> None:
    worker = FakeWorker()

    async def scenario(replica: PrefillReplica) -> None:
        await prefill(replica, "a", TOKENS, worker)
        worker.die()
        if why == "taken":  # 262144 tokens of pages are there
            await prefill(replica, "large", 262144 - 128)
            assert gang.released == ["a"]
        tokens = TOKENS + 1 if why == "another prompt" else TOKENS
        scored = 0 if why == "scored" else None
        await prefill(replica, "b", tokens, first_id="a", scored=scored)

    play(scenario)
    assert gang.came_back == []
    assert dealt(gang, "b")[0] == (0, False)


def test_pages_that_were_left_go_with_a_later_attempts(play: Any, gang: FakeGang) -> None:
    """Also where that one had to begin anew: there is one set of pages for each origin."""

    async def scenario(replica: PrefillReplica) -> None:
        first, second = FakeWorker(), FakeWorker()
        await prefill(replica, "a", TOKENS, first)
        await prefill(replica, "b", 2 * TOKENS, second, first_id="a")
        while not gang.released:
            await asyncio.sleep(0.001)
        assert gang.released == ["a"]
        first.is_released.set()
        second.is_released.set()
        while len(gang.released) < 2:
            await asyncio.sleep(0.001)
        assert gang.released == ["a", "b"]
        assert not replica._left

    play(scenario)


@pytest.mark.parametrize("later", [{"name": "b", "first_id": "a"}, {"name": "a", "number": 1}])
def test_a_later_order_takes_the_pages_of_one_that_seems_to_go_on(
    play: Any, gang: FakeGang, later: dict[str, Any]
) -> None:
    """Whoever gave it is dead, or gave this replica up, and nobody has told it yet."""

    async def scenario(replica: PrefillReplica) -> list[Any]:
        gang.may_compute.clear()
        first = asyncio.create_task(prefill(replica, "a", TOKENS))
        while not gang.computed:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(prefill(replica, tokens=TOKENS, **later))
        with pytest.raises(UnavailableError):
            await first
        gang.may_compute.set()
        return await second

    *_, prefilled = play(scenario)
    assert isinstance(prefilled, Prefilled)
    [(before, after, done)] = gang.came_back
    assert before == "a" != after
    assert done == CHUNK_TOKENS
    assert dealt(gang, after) == [
        (start, False) for start in range(CHUNK_TOKENS, TOKENS, CHUNK_TOKENS)
    ]
