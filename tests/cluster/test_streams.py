"""Who listens to a replica knows whether it is there."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from longreach.cluster.streams import beating, listening
from longreach.engine.errors import UnavailableError


class Source:
    """Yields 1, 2 after a pause each; knows how it ended."""

    def __init__(self, pause: float = 0.0, error: Exception | None = None) -> None:
        self.ended = False
        self._pause, self._error = pause, error

    async def events(self) -> AsyncGenerator[int, None]:
        try:
            for event in (1, 2):
                await asyncio.sleep(self._pause)
                yield event
            if self._error is not None:
                raise self._error
        finally:
            self.ended = True


async def collected(events: AsyncGenerator[int | None, None]) -> list[int | None]:
    return [event async for event in events]


def test_events_come_in_order_and_beats_only_in_silence() -> None:
    async def run() -> None:
        quick, slow = Source(), Source(pause=0.05)
        assert await collected(beating(quick.events(), None, seconds=5)) == [1, 2]
        heard = await collected(beating(slow.events(), None, seconds=0.02))
        assert [event for event in heard if event is not None] == [1, 2]
        assert heard[0] is None
        assert quick.ended
        assert slow.ended

    asyncio.run(run())


def test_errors_pass_and_whoever_leaves_ends_the_source() -> None:
    async def run() -> None:
        source = Source(error=ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await collected(beating(source.events(), None))
        left = Source(pause=60)
        beats = beating(left.events(), None, seconds=0.01)
        assert await anext(beats) is None
        await beats.aclose()
        assert left.ended
        cancelled = Source(pause=60)
        task = asyncio.create_task(collected(beating(cancelled.events(), None)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancelled.ended

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_silent_stream_is_given_up() -> None:
    async def run() -> None:
        assert [event async for event in listening(Source().events(), 5)] == [1, 2]
        with pytest.raises(UnavailableError):
            async for _ in listening(Source(pause=60).events(), 0.02):
                pass

    asyncio.run(asyncio.wait_for(run(), 10))
