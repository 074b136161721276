"""The ingress's backend: it holds leases, and releases what its clients leave."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from longreach.cluster import listener, metrics, recovery
from longreach.cluster.decode.outbox import Outboxes, Said
from longreach.cluster.ingress import DecodeBackend, access_of, ingress_limits
from longreach.cluster.listener import Ear
from longreach.cluster.messages import Taken
from longreach.cluster.metrics import Metrics
from longreach.cluster.settings import IngressSettings
from longreach.engine.errors import (
    LongreachError,
    LostError,
    NotUpError,
    PoisonousError,
    UnavailableError,
)
from longreach.engine.messages import (
    ChosenToken,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Progress,
    SamplingParameters,
    Timings,
)

from .conftest import make_settings

FINISHED = Finished(1, 1, Timings(0, 0, 0, 0, 0))
DELTA = Delta(0, "a")
REQUEST = GenerationRequest(
    "a", np.zeros(1, dtype=np.int32), SamplingParameters(max_tokens=1), arrived=0.0
)


class Worker:
    """A decode worker's handle."""

    def __init__(self) -> None:
        self.released: list[str] = []
        self.outboxes = Outboxes()
        self.release = SimpleNamespace(remote=self.released.append)
        self.fetch = SimpleNamespace(remote=self._fetch)
        self.error: Exception | None = None
        self.heard = asyncio.Event()

    async def _fetch(self, listener: str) -> Said:
        if self.error is not None:
            raise self.error
        said = await self.outboxes.fetch(listener, 0.01)
        if said:
            self.heard.set()
        return said


class Replica:
    """The decode deployment's handle: takes a request when it is let, and says what it is told.

    What is generated its worker says.
    """

    def __init__(self, *events: Event | None, stays: bool = False) -> None:
        self.worker = Worker()
        self.takes = asyncio.Event()
        self.takes.set()
        self._events, self._stays = events, stays
        self.generate = self

    def options(self, **ignored: Any) -> "Replica":
        return self

    def remote(self, request: GenerationRequest, listener: str, model: str) -> "Replica":
        assert model == "pocket"
        self.begin(request, listener, self._events)
        return self

    def begin(
        self, request: GenerationRequest, listener: str, events: Iterable[Event | None]
    ) -> None:
        said = [each for each in events if isinstance(each, (Delta, Finished))]
        for event in said:
            self.worker.outboxes.say(listener, request.request_id, event)
        own = (each for each in events if each not in said)
        self._left = iter([Taken("worker", self.worker), *own])

    def __aiter__(self) -> "Replica":
        return self

    async def __anext__(self) -> Any:
        """As Ray's streams: who is cancelled while waiting may ask again."""
        await self.takes.wait()
        for message in self._left:
            return message
        if self._stays:
            await asyncio.Event().wait()
        raise StopAsyncIteration


class Leases:
    """What the backend's keeper was told."""

    def __init__(self, backend: DecodeBackend) -> None:
        self.held: set[tuple[str, str]] = set()
        self.most = 0
        keeper = backend._leases
        keeper.hold = self._hold
        keeper.drop = self._drop

    def _hold(self, worker_id: str, worker: Any, request_id: str) -> None:
        self.held.add((worker_id, request_id))
        self.most = max(self.most, len(self.held))

    def _drop(self, worker_id: str, request_id: str) -> None:
        self.held.discard((worker_id, request_id))


def make_backend(replica: "Replica", folder: Path, retries: int = 2) -> DecodeBackend:
    return DecodeBackend(
        cast(Any, replica), "pocket", retries, Metrics(folder, "ingress", "pocket")
    )


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_an_answer_to_its_end_releases_nothing_and_holds_its_lease_until_then(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        replica = Replica(None, DELTA, FINISHED)
        backend = make_backend(replica, tmp_path)
        leases = Leases(backend)
        events = [event async for event in backend.generate(REQUEST)]
        assert events == [DELTA, FINISHED]
        assert replica.worker.released == []
        assert (leases.most, leases.held) == (1, set())

    asyncio.run(run())


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken yet"])
def test_a_client_that_leaves_has_its_request_released(tmp_path: Path, taken: bool) -> None:
    async def run() -> None:
        replica = Replica(DELTA, stays=True)
        backend = make_backend(replica, tmp_path)
        leases = Leases(backend)
        if not taken:
            replica.takes.clear()

        async def listen() -> None:
            async for _ in backend.generate(REQUEST):
                pass

        listening = asyncio.create_task(listen())
        await settle()
        assert replica.worker.released == []
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening
        replica.takes.set()
        await settle()
        assert replica.worker.released == ["a"]
        assert leases.held == set()

    asyncio.run(run())


class Dying(Replica):
    """Each call meets one of several fates: messages, then an error where there is one."""

    def __init__(self, *fates: tuple[list[Event], LongreachError | None]) -> None:
        super().__init__()
        self._fates = iter(fates)
        self.asked: list[GenerationRequest] = []

    def remote(self, request: GenerationRequest, listener: str, model: str) -> "Dying":
        self.asked.append(request)
        events, self._error = next(self._fates)
        self.worker.heard.clear()
        if not events:
            self.worker.heard.set()
        self.begin(request, listener, events)
        return self

    async def __anext__(self) -> Any:
        for message in self._left:
            return message
        await self.worker.heard.wait()
        if self._error is not None:
            raise RayTaskError("generate", "a trace", self._error).as_instanceof_cause()
        raise StopAsyncIteration


def counted(folder: Path, metric: metrics.Counter) -> float:
    lines = metrics.render(folder).decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{metric.name}{{"))


def test_a_request_goes_on_elsewhere_when_what_serves_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "_FIRST_WAIT", 0.0)
    first, second = (Delta(0, text, (ChosenToken(ord(text), -1.0),)) for text in "ab")

    async def run() -> None:
        lost = LostError("the worker died")
        replica = Dying(([first], lost), ([], NotUpError("not yet")), ([second, FINISHED], None))
        backend = make_backend(replica, tmp_path)
        leases = Leases(backend)
        events = [event async for event in backend.generate(REQUEST)]
        assert events == [first, second, replace(FINISHED, completion_tokens=2)]
        assert [request.replayed for request in replica.asked] == [(), ((97,),), ((97,),)]
        names = [request.request_id for request in replica.asked]
        # What is left of an attempt is released, by its own name.
        assert replica.worker.released == names[:2]
        assert len(set(names)) == 3
        assert leases.held == set()
        # What was not up yet is waited for, and does not count.
        assert counted(tmp_path, metrics.REQUEST_RECOVERIES) == 1

    asyncio.run(run())


def test_progress_that_comes_behind_what_is_generated_is_left_out() -> None:
    """It comes another way."""

    async def run() -> None:
        ear = Ear()
        for event in (Progress(1, 2), DELTA, Progress(2, 2), FINISHED):
            ear.hear(event)
        assert [await ear.next() for _ in range(3)] == [Progress(1, 2), DELTA, FINISHED]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ActorDiedError(), LostError),
        (TimeoutError(), LostError),
        (RuntimeError("as nobody expects"), UnavailableError),
    ],
)
def test_a_worker_that_is_heard_no_more_ends_its_requests(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    raised: type[LongreachError],
) -> None:
    monkeypatch.setattr(listener, "REPLICA_SECONDS", 0.01)

    async def run() -> None:
        replica = Replica(stays=True)
        replica.worker.error = error
        backend = make_backend(replica, tmp_path, retries=0)
        with pytest.raises(raised):
            async for _ in backend.generate(REQUEST):
                pass
        assert replica.worker.released == ["a"]
        replica.worker.error = None
        after = Replica(DELTA, FINISHED)
        backend._streams = cast(Any, after)
        again = replace(REQUEST, request_id="b")
        assert [event async for event in backend.generate(again)] == [DELTA, FINISHED]

    asyncio.run(asyncio.wait_for(run(), 5))


def test_what_a_replica_says_of_its_workers_death_comes_first(tmp_path: Path) -> None:
    """It gives that worker no request again, and one that comes again counts no second death."""

    async def run() -> None:
        replica = Dying(([], LostError("the worker died", begun=False)))
        replica.worker.error = ActorDiedError()
        with pytest.raises(LostError) as raised:
            async for _ in make_backend(replica, tmp_path, retries=0).generate(REQUEST):
                pass
        assert not raised.value.begun

    asyncio.run(asyncio.wait_for(run(), 5))


def test_an_ingress_asks_again_when_it_has_had_time_for_what_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_EVENT_SECONDS", 0.02)
    asked: list[float] = []

    async def run() -> None:
        replica = Replica(stays=True)
        backend = make_backend(replica, tmp_path)
        fetch = replica.worker.outboxes.fetch

        async def timed(name: str, seconds: float) -> Said:
            asked.append(time.perf_counter())
            return await fetch(name, seconds)

        monkeypatch.setattr(replica.worker.outboxes, "fetch", timed)
        answers = [
            asyncio.create_task(anext(backend.generate(replace(REQUEST, request_id=name))))
            for name in "ab"
        ]
        await settle()
        for name in "ab":
            replica.worker.outboxes.say(backend._listener.name, name, DELTA)
        assert await asyncio.gather(*answers) == [DELTA, DELTA]
        told = len(asked)
        while len(asked) == told:
            await asyncio.sleep(0.001)
        assert asked[told] - asked[told - 1] >= 0.04

    asyncio.run(asyncio.wait_for(run(), 5))


def test_an_answer_whose_end_is_lost_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "END_SECONDS", 0.1)

    async def run() -> None:
        backend = make_backend(Replica(DELTA), tmp_path, retries=0)
        with pytest.raises(LostError):
            async for _ in backend.generate(REQUEST):
                pass

    asyncio.run(asyncio.wait_for(run(), 5))


@pytest.mark.parametrize(("retries", "refused"), [(0, LostError), (1, PoisonousError)])
def test_a_request_under_which_everything_dies_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    retries: int,
    refused: type[LongreachError],
) -> None:
    monkeypatch.setattr(recovery, "_FIRST_WAIT", 0.0)

    async def run() -> None:
        replica = Dying(*[([], LostError("the worker died"))] * 3)
        with pytest.raises(refused):
            async for _ in make_backend(replica, tmp_path, retries).generate(REQUEST):
                pass
        assert len(replica.asked) == retries + 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("host", "keyed", "allowed", "known"),
    [
        ("127.0.0.1", False, [], ("localhost", "127.0.0.1", "::1")),
        ("127.0.0.1", True, [], ()),
        ("0.0.0.0", False, [], ()),
        ("127.0.0.1", False, ["llm.example"], ("llm.example",)),
        ("0.0.0.0", True, ["llm.example"], ("llm.example",)),
    ],
)
def test_a_server_for_this_machine_alone_goes_by_local_names(
    tmp_path: Path, host: str, keyed: bool, allowed: list[str], known: tuple[str, ...]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key")
    file = keys if keyed else None
    settings = IngressSettings(host=host, api_keys_file=file, allowed_hosts=allowed)
    access = access_of(settings)
    assert access.hosts == known
    assert access.api_keys == (("key",) if keyed else ())


def test_every_limit_of_the_settings_reaches_the_endpoint() -> None:
    settings = make_settings(1)
    own = settings.limits.model_copy(update={"receive_seconds": 7.0, "max_body_bytes": 1234})
    limits = ingress_limits(settings.model_copy(update={"limits": own}))
    assert (limits.receive_seconds, limits.max_body_bytes) == (7.0, 1234)
    assert limits.max_model_len == settings.limits.max_model_len
