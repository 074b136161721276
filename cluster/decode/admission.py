"""Who gets pages next, when several requests wait for them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ...engine.decode.engine import DecodeEngine
from ...engine.errors import LongreachError, OutOfPagesError
from ...engine.messages import GenerationRequest
from ..tasks import forever


@dataclass(eq=False)
class _Waiting:
    request: GenerationRequest
    since: float
    admitted: asyncio.Future[None] = field(default_factory=asyncio.Future)


class Admission:
    """Reserves pages for one request after the other, from one task that page frees wake.

    As in prefill, shorter prompts go first, with ageing, and none passes one whose turn it is.

    Args:
        engine: whose pages they are.
        turn: held by whoever uses the engine.
        ageing: tokens by which a prompt seems shorter for each second that it has waited.
        changed: called when the number of waiting requests has changed.
        on_failure: called if the task ends, which it must not.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        turn: asyncio.Lock,
        ageing: float,
        changed: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._engine, self._turn, self._ageing = engine, turn, ageing
        self._changed = changed
        self._waiting: list[_Waiting] = []
        self._wake = asyncio.Event()
        self._task = forever(self._run(), on_failure)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for pages."""
        return len(self._waiting)

    async def reserve(self, request: GenerationRequest) -> None:
        """Return when a request has its pages.

        Whoever is cancelled may have got them at that moment: `DecodeEngine.cancel` frees them.

        Raises: as `DecodeEngine.reserve`, except that it waits for pages that are not free now.
        """
        self._engine.check(request)
        entry = _Waiting(request, time.monotonic())
        self._waiting.append(entry)
        self.wake()
        try:
            await entry.admitted
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._changed()
                # Whoever is next may fit into what this one waited for.
                self.wake()

    def wake(self) -> None:
        """Pages were freed, or whose turn it is has changed."""
        self._wake.set()

    def refuse(self, request_id: str, error: LongreachError) -> None:
        """End the wait of one request, if it waits."""
        for entry in [e for e in self._waiting if e.request.request_id == request_id]:
            self._settle(entry, error)

    def refuse_all(self, error: LongreachError) -> None:
        """End everybody's wait."""
        for entry in list(self._waiting):
            self._settle(entry, error)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            async with self._turn:
                while self._waiting and self._admit(self._next()):
                    pass
            self._changed()

    def _next(self) -> _Waiting:
        now = time.monotonic()
        return min(
            self._waiting,
            key=lambda entry: len(entry.request.prompt) - self._ageing * (now - entry.since),
        )

    def _admit(self, entry: _Waiting) -> bool:
        """Whether a request waits no longer: it has pages, or will never get any."""
        if entry.admitted.done():
            self._waiting.remove(entry)
            return True
        try:
            self._engine.reserve(entry.request)
        except OutOfPagesError:
            return False
        except LongreachError as error:
            self._settle(entry, error)
            return True
        self._settle(entry, None)
        return True

    def _settle(self, entry: _Waiting, error: LongreachError | None) -> None:
        self._waiting.remove(entry)
        if entry.admitted.done():
            return
        if error is None:
            entry.admitted.set_result(None)
        else:
            entry.admitted.set_exception(error)
