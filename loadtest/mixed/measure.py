"""Sends a plan's requests when they are due, and waits for what comes of them."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

import aiohttp

from ..endpoint import Endpoint
from .client import new_session, send
from .plan import Bounds, ClosedLoad, Plan
from .prepare import Prepared
from .record import Ask, Record


class Watch(Protocol):
    """Is told of every request as it happens."""

    def sent(self, ask: Ask) -> None:
        """It is under way now."""
        ...

    def ended(self, record: Record) -> None:
        """It is over, whichever way."""
        ...


async def measure(
    plan: Plan,
    prepared: Sequence[Prepared],
    endpoint: Endpoint,
    watch: Watch,
    stop: asyncio.Event,
) -> list[Record]:
    """Records of all requests that were sent, in the order in which they were planned.

    When `stop` is set, no more are sent, and those under way are given up.
    """
    async with new_session() as session:
        sender = _Sender(plan.bounds, endpoint, watch, stop, session)
        stopping = asyncio.create_task(sender.give_up_when_stopped())
        if isinstance(plan.load, ClosedLoad):
            await sender.send_in_turn(prepared, plan.load.concurrency)
        else:
            await sender.send_when_due(prepared)
        stopping.cancel()
    return sorted(sender.records, key=lambda record: record.ask.number)


class _Sender:
    def __init__(
        self,
        bounds: Bounds,
        endpoint: Endpoint,
        watch: Watch,
        stop: asyncio.Event,
        session: aiohttp.ClientSession,
    ) -> None:
        self.records: list[Record] = []
        self._bounds = bounds
        self._endpoint = endpoint
        self._watch = watch
        self._stop = stop
        self._session = session
        self._under_way: set[asyncio.Task[None]] = set()
        self._clock = asyncio.get_running_loop().time
        self._start = self._clock()

    async def send_when_due(self, prepared: Sequence[Prepared]) -> None:
        """Open loop."""
        for each in prepared:
            assert each.ask.at is not None, "in an open loop every request has its moment"
            if await self._stopped_before(self._start + each.ask.at):
                break
            self._begin(each)
        await asyncio.gather(*self._under_way)

    async def send_in_turn(self, prepared: Sequence[Prepared], clients: int) -> None:
        """Closed loop: each client takes the next one when it has been answered."""
        waiting = iter(prepared)
        await asyncio.gather(*(self._ask_in_turn(waiting) for _ in range(clients)))

    async def _ask_in_turn(self, waiting: Iterator[Prepared]) -> None:
        while not self._stop.is_set() and self._clock() - self._start <= self._bounds.seconds:
            following = next(waiting, None)
            if following is None:
                return
            await self._begin(following)

    async def give_up_when_stopped(self) -> None:
        """Ends when there is nothing left to give up."""
        await self._stop.wait()
        for task in self._under_way:
            task.cancel()

    async def _stopped_before(self, moment: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), max(0.0, moment - self._clock()))
        return self._stop.is_set()

    def _begin(self, prepared: Prepared) -> "asyncio.Task[None]":
        task = asyncio.create_task(self._send(prepared))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _send(self, prepared: Prepared) -> None:
        self._watch.sent(prepared.ask)
        timeout = self._bounds.timeout
        record = await send(self._session, self._endpoint, prepared, timeout, self._start)
        self.records.append(record)
        self._watch.ended(record)
