"""Pages that come from prefill, put in their place beside everything else."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...engine.kv.hand_off import Receiver
from ..pulse import Pulse


class PageCopier:
    """Runs a transport's receiver on one thread: one message after the other.

    It needs no turn on the engine: it writes pages that no step looks at. It has done with a
    request before the request's pages are freed.

    Args:
        receiver: of the transport.
        pulse: counts each message as a piece of work.
        set_up: called once on the thread.
    """

    def __init__(self, receiver: Receiver, pulse: Pulse, set_up: Callable[[], None]) -> None:
        self._receiver, self._pulse = receiver, pulse
        self._thread = ThreadPoolExecutor(1, "copy", set_up)

    async def copy(self, request_id: str, message: Any) -> int:
        """Put a message's pages in their place; returns their bytes when they are there.

        Raises: as `Receiver.receive`; and whatever a device raises that has broken.
        """
        return await self._do(self._receiver.receive, request_id, message)

    async def close(self, request_id: str) -> None:
        """Return when no copy of a request is under way any more."""
        await self._do(self._receiver.close, request_id)

    def close_soon(self, request_id: str) -> None:
        """As `close`, without waiting: all pages of the request have arrived."""
        self._thread.submit(self._receiver.close, request_id)

    async def _do(self, call: Callable[..., Any], *given: Any) -> Any:
        def timed() -> Any:
            with self._pulse.piece():
                return call(*given)

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)
