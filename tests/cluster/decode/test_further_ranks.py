"""The further ranks of a decode worker: what it has them do, and what each does by itself."""

import asyncio
import pickle
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError

from longreach.cluster.decode.follower import DecodeFollower
from longreach.cluster.decode.meeting import WorkerMeeting
from longreach.cluster.decode.worker import DecodeWorker
from longreach.cluster.messages import WorkerDestination
from longreach.cluster.transports.actor_messages import WantedPages
from longreach.cluster.transports.object_store import PageRun
from longreach.engine.decode.follower import Follower, FollowerPages
from longreach.engine.decode.orders import CopyOrder
from longreach.engine.decode.portable_step import PortableStep
from longreach.engine.errors import LostError, TransferError, UnavailableError
from longreach.engine.kv.destination import PartedDestination
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import HeldPages, PageGeometry, PagePool, Pages

from ..conftest import make_settings
from .test_worker import Answer, engine_of, make_request

NO_MEETING = WorkerMeeting(("", 0), (), b"")
GEOMETRY = PageGeometry(2, 1, 4, torch.float32)
SECONDS = 20


class _Method:
    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self.remote = call


@dataclass
class Recorded:
    """In place of a follower's handle: notes what it is asked, and answers what it is told to."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    complete: int = 0
    error: Exception | None = None
    closing: asyncio.Event | None = None

    def __getattr__(self, name: str) -> _Method:
        async def call(*given: Any) -> Any:
            if self.error is not None:
                raise self.error
            if name == "close" and self.closing is not None:
                await self.closing.wait()
            return self.complete if name == "go_on" else None

        def remote(*given: Any) -> Awaitable[Any]:
            self.calls.append((name, *given))
            return asyncio.ensure_future(call(*given))

        return _Method(remote)

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


@pytest.fixture
def worker(tmp_path: Path) -> DecodeWorker:
    made = DecodeWorker(make_settings(1).worker, tmp_path)
    engine_of(made)._pool.memory.zero_()
    return made


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, SECONDS)

    asyncio.run(limited())


def test_a_request_goes_its_way_on_all_ranks(worker: DecodeWorker) -> None:
    async def work() -> None:
        first, second = Recorded(), Recorded()
        await worker.start("own", [first, second])
        destination = await worker.reserve(make_request("a", tokens=300))
        table = engine_of(worker).block_table("a")
        for each in (first, second):
            [(name, request_id, pages)] = each.calls
            assert (name, request_id, pages.tolist()) == ("expect", "a", table[:3])
        assert isinstance(destination, PartedDestination)
        # This worker has both of the model's heads, and so would each of the others.
        assert [part.kv_heads for part in destination.parts] == [range(2), range(2, 4), range(4, 6)]
        sent_to = [part.destination for part in destination.parts]
        assert [each.worker for each in sent_to if isinstance(each, WorkerDestination)] == [
            "own", first, second,
        ]  # fmt: skip
        answer = Answer()
        await answer.read(worker, "a")
        assert answer.tokens == 8
        await worker.release("a")
        for each in (first, second):
            assert each.names == ["expect", "all_came", "close"]

    run(work())


def test_what_all_ranks_have_is_not_computed_again(worker: DecodeWorker) -> None:
    async def work() -> None:
        follower = Recorded(complete=128)
        await worker.start("own", [follower])
        await worker.reserve(make_request("a", tokens=300))
        assert (await worker.go_on("a")).done == 0
        engine = engine_of(worker)
        for layer in range(engine.pool.geometry.num_layers):
            pages = engine.pool.layer(layer).at(slice(0, 2))
            engine.receive("a", Place(layer, 0, 0), Pages(pages.values.clone()))
        destination = await worker.go_on("a")
        assert follower.calls[1:] == [("go_on", "a", 1), ("go_on", "a", 2)]
        assert destination.done == 128
        assert isinstance(destination, PartedDestination)
        for part in destination.parts:
            assert isinstance(part.destination, WorkerDestination)
            assert (part.destination.done, part.destination.epoch) == (128, 2)

    run(work())


def test_pages_are_others_only_when_no_rank_copies_into_them(worker: DecodeWorker) -> None:
    async def work() -> None:
        follower = Recorded(closing=asyncio.Event())
        await worker.start("own", [follower])
        await worker.reserve(make_request("a"))
        releasing = asyncio.create_task(worker.release("a"))
        await asyncio.sleep(0.1)
        assert follower.names == ["expect", "close"]
        assert worker._engine.usage > 0
        assert follower.closing is not None
        follower.closing.set()
        await releasing
        assert worker._engine.usage == 0

    run(work())


def test_a_request_that_is_released_while_it_gets_its_pages_is_expected_nowhere(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        follower = Recorded()
        await worker.start("own", [follower])
        kept = worker._admission.reserve

        async def reserve(request: Any) -> None:
            await kept(request)
            await worker.release(request.request_id)

        monkeypatch.setattr(worker._admission, "reserve", reserve)
        with pytest.raises(UnavailableError):
            await worker.reserve(make_request("a"))
        assert follower.names == ["close"]
        assert worker._engine.usage == 0

    run(work())


@pytest.mark.parametrize("comes", [True, False])
def test_pages_that_an_engine_names_later_are_awaited_beside_everything(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    """Such an engine names them with its next step, which the event loop has to begin."""

    async def work() -> None:
        follower, named = Recorded(), threading.Event()
        await worker.start("own", [follower])
        kept = worker._engine.held

        def held(*given: Any) -> HeldPages:
            assert named.wait(SECONDS)
            if not comes:
                raise TransferError("it was cancelled")
            return kept(*given)

        monkeypatch.setattr(worker._engine, "held", held)
        reserving = asyncio.create_task(worker.reserve(make_request("a")))
        await asyncio.sleep(0.1)
        assert not reserving.done()
        named.set()
        if comes:
            assert isinstance(await reserving, PartedDestination)
            assert follower.names == ["expect"]
        else:
            with pytest.raises(UnavailableError):
                await reserving
            assert follower.names == []

    run(work())


def test_a_rank_that_is_gone_is_the_workers_end(worker: DecodeWorker) -> None:
    async def work() -> None:
        follower = Recorded()
        await worker.start("own", [follower])
        await worker.reserve(make_request("a"))
        follower.error = ActorDiedError()
        with pytest.raises(LostError):
            await worker.reserve(make_request("b"))
        await worker.check()
        await worker.release("a")
        with pytest.raises(LostError):
            await worker.check()

    run(work())


class Alone(DecodeFollower):
    """A follower that has met nobody: its pages hold their own numbers."""

    def _load(self, meeting: WorkerMeeting) -> Any:
        pool = PagePool(GEOMETRY, 8, torch.device("cpu"))
        for page in range(8):
            pool.memory[:, page] = page
        step: Any = PortableStep.__new__(PortableStep)
        self.orders, other = Pipe()
        return Follower(pool, step), FollowerPages(pool, first_kv_head=1), other


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Alone]:
    made = Alone(make_settings(1).worker, 1, tmp_path)
    yield made
    made.orders.close()


def page_of(value: int, layer: int = 0) -> PageRun:
    return PageRun.of(Place(layer, 0, 1), Pages(torch.full((1, 1, 2, 128, 4), float(value))))


def test_a_follower_takes_pages_of_one_gang_at_a_time(follower: Alone) -> None:
    async def work() -> None:
        await follower.join("own", NO_MEETING)
        pool = follower._pages.pool
        assert isinstance(pool, PagePool)
        with pytest.raises(TransferError):
            await follower.deliver("a", 0, [page_of(9)])
        await follower.expect("a", np.array([5, 2]))
        await follower.deliver("a", 0, [page_of(9), page_of(9, layer=1)])
        assert pool.memory[:, 5].unique().tolist() == [9]
        assert await follower.go_on("a", 1) == 128
        with pytest.raises(TransferError):
            await follower.deliver("a", 0, [page_of(10)])
        with pytest.raises(TransferError):
            await follower.send_back("a", 0, [WantedPages(Place(0, 0, 1), 1, 1)])
        [run] = await follower.send_back("a", 1, [WantedPages(Place(0, 0, 1), 1, 1)])
        assert run.pages.values.unique().tolist() == [9]
        await follower.close("a")
        assert follower._pages.num_expected == 0
        for late in (
            follower.deliver("a", 1, [page_of(10)]),
            follower.send_back("a", 1, [WantedPages(Place(0, 0, 1), 1, 1)]),
            follower.go_on("a", 2),
        ):
            with pytest.raises(TransferError):
                await late
        # Calls overtake each other: what was closed is not expected again.
        with pytest.raises(UnavailableError):
            await follower.expect("a", np.array([5, 2]))
        assert pool.memory[:, 5].unique().tolist() == [9]
        await follower.expect("b", np.array([1]))
        await follower.all_came("b")
        assert follower._pages.num_expected == 0
        with pytest.raises(TransferError):
            await follower.deliver("b", 0, [page_of(10)])
        await follower.close("b")

    run(work())


def test_a_follower_carries_orders_out_until_one_fails(follower: Alone) -> None:
    async def work() -> None:
        await follower.join("own", NO_MEETING)
        pool = follower._pages.pool
        assert isinstance(pool, PagePool)

        follower.orders.send_bytes(pickle.dumps(CopyOrder(7, 3)))
        while pool.memory[0, 3].unique().tolist() != [7]:
            await asyncio.sleep(0.01)
        assert (await follower.pulse()).running < SECONDS
        follower.orders.send_bytes(pickle.dumps(CopyOrder(7, 99)))
        await asyncio.wait({follower._following})
        await asyncio.sleep(0)
        with pytest.raises(LostError):
            await follower.pulse()

    run(work())


def test_a_follower_whose_leader_is_gone_says_so(follower: Alone) -> None:
    async def work() -> None:
        await follower.join("own", NO_MEETING)
        follower.orders.close()
        await asyncio.wait({follower._following})
        await asyncio.sleep(0)
        with pytest.raises(LostError):
            await follower.pulse()

    run(work())
