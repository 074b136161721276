"""Which ranks a gang calls for what, as they come and go; Ray is replaced."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from longreach.cluster.prefill import rows
from longreach.cluster.prefill.gang import Gang, OfPrompt
from longreach.cluster.prefill.placement import Placement
from longreach.cluster.prefill.rows import Row
from longreach.cluster.prefill.scheduler import Chunk
from longreach.engine.errors import ChunkOutOfMemoryError, LeftMeshError, LostError

from ..conftest import gangs_with, make_settings

PROMPT = OfPrompt(cast(Any, "tokens"), cast(Any, "destination"))


class FakeRank:
    """Writes down what it is called for."""

    def __init__(self, bundle: int) -> None:
        self.bundle = bundle
        self.calls: list[tuple[Any, ...]] = []
        for name in ("begin_chunk", "begin_fetch", "share", "come_back", "release"):
            setattr(self, name, SimpleNamespace(remote=self._call(name)))
        self.finish_chunk = self._with_options("finish_chunk")
        self.flush = self._with_options("flush")
        self.finish_fetch = self._with_options("finish_fetch")
        self.answers: dict[str, asyncio.Future[Any]] = {}

    def _call(self, name: str) -> Any:
        def remote(*given: Any) -> Any:
            self.calls.append((name, *given))
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if name in self.answers:
                return self.answers[name]
            answer.set_result(None)
            return answer

        return remote

    def _with_options(self, name: str) -> Any:
        call = SimpleNamespace(remote=self._call(name))
        return SimpleNamespace(options=lambda **given: call)

    def last(self, name: str) -> list[Any]:
        return next(given for called, *given in reversed(self.calls) if called == name)


class FakePlacement:
    """Has room for whoever comes."""

    def __init__(self) -> None:
        self.started: list[FakeRank] = []

    def start_rank(self, bundle: int) -> FakeRank:
        self.started.append(FakeRank(bundle))
        return self.started[-1]

    def remove(self) -> None: ...


class FakeRows:
    """Some die; all others meet whenever they are asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dead: list[Row] = []
        self.met: list[list[int]] = []
        self.fewest = 1
        self.failures: list[Exception] = []
        monkeypatch.setattr(rows, "join", self._join)
        monkeypatch.setattr(rows, "part", self._part)
        monkeypatch.setattr(rows, "meet", self._meet)
        monkeypatch.setattr(Row, "kill", lambda row: self.dead.append(row))

    async def _join(self, joining: list[Row]) -> int:
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop()
        return self.fewest

    async def _part(self, parting: list[Row]) -> list[Row]:
        return [row for row in parting if row not in self.dead]

    async def _meet(self, meeting: list[Row]) -> None:
        self.met.append([row.number for row in meeting])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRows:
    return FakeRows(monkeypatch)


async def started(
    monkeypatch: pytest.MonkeyPatch, tensor_parallel: int = 1, sequence_parallel: int = 3
) -> tuple[Gang, FakePlacement]:
    placement = FakePlacement()

    async def reserve(settings: Any, metrics_directory: Path) -> FakePlacement:
        return placement

    monkeypatch.setattr(Placement, "reserve", reserve)
    settings = make_settings(1)
    sizes = {"tensor_parallel": tensor_parallel, "sequence_parallel": sequence_parallel}
    settings = settings.model_copy(update={"prefill": gangs_with(settings, **sizes)})
    return await Gang.start(settings.gangs[0], Path()), placement


def test_a_new_row_gets_the_pages_of_a_prompt_before_it_computes(
    monkeypatch: pytest.MonkeyPatch, fake: FakeRows
) -> None:
    """From a row that has them, and once. Others already have them, and take part."""

    async def run() -> None:
        gang, placement = await started(monkeypatch, tensor_parallel=2)
        gang.begin_chunk(Chunk("a", 0, 256, False), PROMPT)
        assert placement.started[5].last("begin_chunk")[1:] == ["tokens", "destination"]
        fake.dead.append(gang._rows[0])
        assert await gang.regroup() == 2
        assert (gang.num_ranks, gang.is_whole) == (4, False)
        gang.begin_chunk(Chunk("b", 0, 256, False), PROMPT)
        await gang.recruit()
        assert [rank.bundle for rank in placement.started[6:]] == [0, 1]
        assert await gang.regroup() == 0
        assert gang.is_whole
        assert fake.met == [[1, 2], [1, 2, 0]]
        gang.begin_chunk(Chunk("a", 256, 512, False), PROMPT)
        gang.begin_chunk(Chunk("a", 512, 768, False), PROMPT)
        for number, rank in enumerate(placement.started[2:]):
            calls = [given for called, *given in rank.calls if called == "share"]
            assert calls == [["a", "tokens", "destination", 256, number >= 4]]
            assert rank.last("begin_chunk") == [Chunk("a", 512, 768, False), None, None]
        await gang.flush("b")
        assert not any(
            called == "flush" for rank in placement.started[6:] for called, *_ in rank.calls
        )
        gang.come_back("b", "c", PROMPT, 128)
        for number, rank in enumerate(placement.started[2:]):
            assert rank.last("share") == ["b", "tokens", "destination", 128, number >= 4]
            assert rank.last("come_back") == ["b", "c", "destination", 128]

    asyncio.run(run())


@pytest.mark.parametrize("outcome", ["computed", "lost", "renamed and lost"])
def test_pages_are_given_again_where_it_is_not_known_that_they_came(
    monkeypatch: pytest.MonkeyPatch, fake: FakeRows, outcome: str
) -> None:
    """A rank that dies meanwhile leaves the others with anything in place of what they wanted."""

    async def run() -> None:
        gang, placement = await started(monkeypatch)
        await gang.begin_chunk(Chunk("a", 0, 256, False), PROMPT).results
        fake.dead.append(gang._rows[2])
        await gang.regroup()
        await gang.recruit()
        await gang.regroup()
        kept, dies, comes = gang._rows[0].ranks[0], gang._rows[1], placement.started[-1]
        name = "a"
        if outcome == "renamed and lost":
            gang.come_back("a", name := "b", PROMPT, 256)
        elif outcome == "lost":
            for rank in (kept, comes):
                rank.answers["finish_chunk"] = failed = asyncio.get_running_loop().create_future()
                failed.set_exception(ActorDiedError())
        if outcome != "renamed and lost":
            await asyncio.wait({gang.begin_chunk(Chunk("a", 256, 512, False), PROMPT).results})
            await asyncio.sleep(0)
        for rank in (kept, comes):
            rank.answers.clear()
        fake.dead.append(dies)
        assert await gang.regroup() == 1
        gang.begin_chunk(Chunk(name, 256, 512, False), PROMPT)
        given = [done for called, *done in comes.calls if called == "share"]
        again = [] if outcome == "computed" else [[name, "tokens", "destination", 256, True]]
        assert given[1:] == again
        assert [called for called, *_ in kept.calls if called == "share"] == ["share"] * len(given)

    asyncio.run(run())


def test_pages_die_with_the_last_row_that_has_them(
    monkeypatch: pytest.MonkeyPatch, fake: FakeRows
) -> None:
    async def run() -> None:
        gang, _ = await started(monkeypatch, sequence_parallel=2)
        gang.begin_chunk(Chunk("a", 0, 256, False), PROMPT)
        fake.dead.append(gang._rows[0])
        await gang.regroup()
        assert gang.holds("a")
        await gang.recruit()
        await gang.regroup()
        assert gang.holds("a")
        fake.dead.append(gang._rows[0])
        await gang.regroup()
        assert not gang.holds("a")

    asyncio.run(run())


def test_too_few_rows_cannot_go_on(monkeypatch: pytest.MonkeyPatch, fake: FakeRows) -> None:
    """What each would have to compute does not fit beside its pages any more."""

    async def run() -> None:
        fake.fewest = 2
        gang, _ = await started(monkeypatch)
        fake.dead.append(gang._rows[1])
        assert await gang.regroup() == 1
        fake.dead.append(gang._rows[1])
        with pytest.raises(LostError):
            await gang.regroup()

    asyncio.run(run())


def test_a_row_that_does_not_come_up_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, fake: FakeRows
) -> None:
    monkeypatch.setattr("longreach.cluster.prefill.gang._SECONDS_BETWEEN_TRIES", 0.001)

    async def run() -> None:
        gang, placement = await started(monkeypatch, sequence_parallel=2)
        fake.dead.append(gang._rows[0])
        await gang.regroup()
        fake.failures = [LostError("no card")]
        await gang.recruit()
        assert len(placement.started) == 4
        assert [row.ranks[0].bundle for row in fake.dead[1:]] == [0]
        await gang.regroup()
        assert gang.is_whole

    asyncio.run(run())


def test_a_fetch_is_over_when_no_rank_fetches_any_more(
    monkeypatch: pytest.MonkeyPatch, fake: FakeRows
) -> None:
    """Also where one has failed: another may still write into the prompt's pages."""

    async def run() -> None:
        gang, placement = await started(monkeypatch, sequence_parallel=2)
        first, second = placement.started
        for rank in (first, second):
            rank.answers["finish_fetch"] = asyncio.get_running_loop().create_future()
        chunk = Chunk("a", 0, 256, False, is_back=True)
        fetched = gang.begin_fetch(chunk, PROMPT)
        assert first.last("begin_fetch") == [chunk, "tokens", "destination"]
        first.answers["finish_fetch"].set_exception(ActorDiedError())
        await asyncio.sleep(0.01)
        assert not fetched.done()
        second.answers["finish_fetch"].set_result(None)
        with pytest.raises(ActorDiedError):
            await fetched
        gang.begin_chunk(Chunk("a", 256, 512, True), PROMPT)
        assert second.last("begin_chunk")[1:] == [None, None]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "is_trouble"),
    [
        (RayTaskError("share", "", ChunkOutOfMemoryError(0, 256)), True),
        (RayTaskError("share", "", LeftMeshError()), False),
        (ActorDiedError(), False),
    ],
)
def test_a_rank_that_cannot_share_is_told_of_at_once(
    monkeypatch: pytest.MonkeyPatch, fake: FakeRows, error: Exception, is_trouble: bool
) -> None:
    """The others wait for it; deaths, and what follows from them, are found by others."""

    async def run() -> None:
        gang, placement = await started(monkeypatch, sequence_parallel=2)
        troubles: list[BaseException] = []
        gang.tell_trouble_to(troubles.append)
        gang.begin_chunk(Chunk("a", 0, 256, False), PROMPT)
        fake.dead.append(gang._rows[1])
        await gang.regroup()
        await gang.recruit()
        await gang.regroup()
        gives, comes = placement.started[0], placement.started[-1]
        gives.answers["share"] = asyncio.get_running_loop().create_future()
        comes.answers["share"] = failed = asyncio.get_running_loop().create_future()
        gang.begin_chunk(Chunk("a", 256, 512, False), PROMPT)
        failed.set_exception(error)
        await asyncio.sleep(0.01)
        assert len(gang.told) == 1
        assert troubles == ([error] if is_trouble else [])
        gives.answers["share"].set_result(None)
        await asyncio.wait(gang.told)

    asyncio.run(run())


@pytest.mark.parametrize("name", ["share", "come_back", "begin_fetch"])
def test_what_ranks_are_told_is_known_until_they_have_done_it_and_logged_where_they_fail(
    monkeypatch: pytest.MonkeyPatch,
    fake: FakeRows,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """A chunk later it would show as a request that a rank does not know."""

    async def run() -> None:
        gang, placement = await started(monkeypatch, sequence_parallel=2)
        gang.begin_chunk(Chunk("a", 0, 256, False), PROMPT)
        fake.dead.append(gang._rows[1])
        await gang.regroup()
        await gang.recruit()
        await gang.regroup()
        comes = placement.started[-1]
        comes.answers[name] = answer = asyncio.get_running_loop().create_future()
        if name == "begin_fetch":
            gang.begin_fetch(Chunk("b", 0, 256, False, is_back=True), PROMPT)
        else:
            gang.come_back("a", "c", PROMPT, 256)
        await asyncio.sleep(0.01)
        assert len(gang.told) == 1
        assert not caplog.records
        answer.set_exception(LeftMeshError())
        await asyncio.wait(gang.told)
        assert not gang.told
        [record] = caplog.records
        assert "LeftMeshError" in record.getMessage()

    asyncio.run(run())
