"""Pages that come from prefill, put in their place beside everything else."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...engine.kv.hand_off import Receiver, RequestPages
from ..pulse import Pulse


class PageCopier:
    """Runs a transport's receiver on one thread: one message after the other.

    Messages that need another process to go on (`Receiver.source_of`) have a thread for each such
    process, which may hang without holding up anything else.

    It needs no turn on the engine: it writes pages that no step looks at. It has done with a
    request before the request's pages are freed.

    Args:
        receiver: of the transport.
        pages: of the engine.
        pulse: counts each message as a piece of work, where it needs nobody else.
        set_up: called once on each thread.
    """

    def __init__(
        self, receiver: Receiver, pages: RequestPages, pulse: Pulse, set_up: Callable[[], None]
    ) -> None:
        self._receiver, self._pages, self._pulse = receiver, pages, pulse
        self._set_up = set_up
        self._thread = ThreadPoolExecutor(1, "copy", set_up)
        self._sources: dict[str, _Source] = {}
        self._reading: defaultdict[str, set[asyncio.Future[int]]] = defaultdict(set)

    async def copy(self, request_id: str, message: Any) -> int:
        """Put a message's pages in their place; returns their bytes when they are there.

        Raises: as `Receiver.receive`; and whatever a device raises that has broken.
        """
        source = self._receiver.source_of(message)
        if source is None:
            return await self._do(self._receiver.receive, request_id, message)
        reading = asyncio.ensure_future(self._read_from(source, request_id, message))
        under_way = self._reading[request_id]
        under_way.add(reading)
        reading.add_done_callback(under_way.discard)
        # Whoever asks may be cancelled, and the pages are written all the same.
        return await asyncio.shield(reading)

    async def send_back(self, request_id: str, message: Any) -> Any:
        """What the transport answers to a rank that fetches pages.

        Raises: as `Receiver.send_back`.
        """
        return await self._do(self._receiver.send_back, request_id, message)

    async def complete_tokens(self, request_id: str) -> int:
        """As `RequestPages.complete_tokens`, when what came before has been copied."""
        await self._end_of_reading(request_id)
        return await self._do(self._pages.complete_tokens, request_id)

    async def close(self, request_id: str) -> None:
        """Return when no copy of a request is under way any more."""
        await self._end_of_reading(request_id)
        self._reading.pop(request_id, None)
        await self._do(self._receiver.close, request_id)

    def close_soon(self, request_id: str) -> None:
        """As `close`, without waiting: all pages of the request have arrived."""
        self._thread.submit(self._receiver.close, request_id)

    async def _read_from(self, name: str, request_id: str, message: Any) -> int:
        if name not in self._sources:
            self._sources[name] = _Source(ThreadPoolExecutor(1, "read", self._set_up))
        source = self._sources[name]
        source.messages += 1
        loop, receive = asyncio.get_running_loop(), self._receiver.receive
        try:
            return await loop.run_in_executor(source.thread, receive, request_id, message)
        finally:
            source.messages -= 1
            if not source.messages:
                # It may never be heard of again.
                del self._sources[name]
                source.thread.shutdown(wait=False)

    async def _end_of_reading(self, request_id: str) -> None:
        reading = self._reading.get(request_id)
        if reading:
            await asyncio.wait(set(reading))

    async def _do(self, call: Callable[..., Any], *given: Any) -> Any:
        def timed() -> Any:
            with self._pulse.piece():
                return call(*given)

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)


class _Source:
    """A process that pages are read from, the thread that waits for it, and how often it will."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self.thread, self.messages = thread, 0
