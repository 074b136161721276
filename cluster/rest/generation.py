"""The events of all prompts of one HTTP request, in one stream."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol

from ...engine.errors import CancelledElsewhereError, QueueFullError
from ...engine.messages import Event, GenerationRequest
from .plan import Plan

_EVENTS_AHEAD = 256
# Of one request; the others wait here, so that many prompts fill nobody's queue.
_PROMPTS_AT_ONCE = 4
_NEXT_TRY_SECONDS = 0.25


class Backend(Protocol):
    """What generates. The endpoint needs nothing else of a cluster."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate one request: an async generator that ends after Finished.

        Closing it, or cancelling whoever awaits it, must stop the work. It raises the errors of
        `engine.errors`: QueueFullError, OutOfPagesError, PromptTooLongError and so on.
        """
        ...

    async def ready(self) -> bool:
        """Whether requests would be served now."""
        ...


@dataclass(frozen=True)
class Arrival:
    """An event, the index of its prompt, and when it came (seconds, monotonic)."""

    index: int
    event: Event
    at: float


class Generation:
    """Runs the requests of a plan at once; leaving the context stops whatever still runs.

    async with Generation(backend, plan) as generation:
        while not generation.done:
            item = await generation.next(timeout)
    """

    def __init__(self, backend: Backend, plan: Plan) -> None:
        self._backend = backend
        self._plan = plan
        self._events: asyncio.Queue[tuple[int, float, Event | BaseException | None]]
        self._events = asyncio.Queue(_EVENTS_AHEAD)
        self._tasks: list[asyncio.Task[None]] = []
        self._running = len(plan.requests)
        self._places = asyncio.Semaphore(_PROMPTS_AT_ONCE)
        self._is_taken = False

    @property
    def done(self) -> bool:
        """Whether every request has ended."""
        return self._running == 0

    async def next(self, timeout: float | None = None) -> Arrival | None:
        """The next event; None when time is up or all have ended.

        Raises:
            Exception: whatever the backend raised for one of the requests.
        """
        try:
            async with asyncio.timeout(timeout):
                while not self.done:
                    index, arrived, event = await self._events.get()
                    if isinstance(event, BaseException):
                        raise event
                    if event is not None:
                        return Arrival(index, event, arrived)
                    self._running -= 1
        except TimeoutError:
            return None
        return None

    async def __aenter__(self) -> "Generation":
        self._tasks = [
            asyncio.create_task(self._pump(index, request), name=request.request_id)
            for index, request in enumerate(self._plan.requests)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, index: int, request: GenerationRequest) -> None:
        try:
            async with self._places:
                await self._run(index, request)
        except asyncio.CancelledError:
            if _is_asked_to_stop():
                raise
            # Of a call to another process, say. Whoever waits for the answer would wait forever.
            await self._put(index, CancelledElsewhereError())
        except Exception as error:
            await self._put(index, error)
        else:
            await self._put(index, None)

    async def _run(self, index: int, request: GenerationRequest) -> None:
        """Hand one prompt's events on; a full queue refuses the request by its first prompt alone.

        Raises:
            QueueFullError: for the first, before anything came for any prompt of the request.
        """
        for tries in itertools.count():
            # Whoever refused it has released it, and takes no request of that name any more.
            named = request if tries == 0 else _renamed(request, tries)
            try:
                async with aclosing(self._backend.generate(named)) as events:
                    async for event in events:
                        self._is_taken = True
                        await self._put(index, event)
                return
            except QueueFullError:
                if index == 0 and not self._is_taken:
                    raise
            await asyncio.sleep(_NEXT_TRY_SECONDS)

    async def _put(self, index: int, event: Event | BaseException | None) -> None:
        await self._events.put((index, time.monotonic(), event))


def _renamed(request: GenerationRequest, tries: int) -> GenerationRequest:
    return replace(request, request_id=f"{request.request_id}-try-{tries}")


def _is_asked_to_stop() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
