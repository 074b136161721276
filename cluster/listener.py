"""What decode workers say to an ingress: one call at a time to each, for all requests there.

What is generated comes this way, from the worker itself; what goes wrong comes from the decode
replica. A worker that can no longer be heard is told of by its replica as well, which then knows it
and gives it no request again, so that is waited for.
"""

import asyncio
import logging
import uuid
from collections import defaultdict
from typing import Any

from ..engine.errors import LongreachError, LostError
from ..engine.messages import Delta, Event, Progress
from .call_errors import as_ours
from .streams import SILENT_SECONDS
from .tasks import as_nobody, detached

logger = logging.getLogger(__name__)

_EVENT_SECONDS = 0.0004
"""What an event costs an ingress, with some room: 3,700 a second kept one busy. With more it would
send them later and later, many at a time; so it asks again when it has had time for one of each."""
_LONGEST_PAUSE = 0.05
REPLICA_SECONDS = 3.0
"""How long a replica has to say itself that its worker is gone."""

END_SECONDS = SILENT_SECONDS
"""How long the end of an answer may take that was said before its replica had done."""

_SILENT = "a decode worker was silent for too long; send the request again"
_NO_END = "the end of an answer was lost; send the request again"


class Ear:
    """What is heard of one request."""

    def __init__(self) -> None:
        self._heard: asyncio.Queue[Event | LongreachError] = asyncio.Queue()
        self._closed = asyncio.Event()
        self._has_begun = False

    def hear(self, event: Event) -> None:
        """Something was said."""
        self._heard.put_nowait(event)

    def fail(self, error: LongreachError) -> None:
        """Nothing more will be said."""
        self._heard.put_nowait(error)

    def close(self) -> None:
        """Nobody wants to hear more."""
        self._closed.set()

    async def expect_the_end(self) -> None:
        """Fail unless somebody has heard the end soon: it was said."""
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._closed.wait()
        except TimeoutError:
            self.fail(LostError(_NO_END))

    async def next(self) -> Event:
        """What was said next; Finished is the last.

        Progress comes another way than what is generated: where it comes later, it is left out.

        Raises:
            LongreachError: as it was told to `fail`.
        """
        while True:
            event = await self._heard.get()
            if isinstance(event, LongreachError):
                raise event
            self._has_begun |= isinstance(event, Delta)
            if not (self._has_begun and isinstance(event, Progress)):
                return event


class Listener:
    """An ingress's, for all its requests. For one event loop.

    `name` is what workers know it by.
    """

    def __init__(self) -> None:
        self.name = f"ingress-{uuid.uuid4().hex}"
        self._ears: dict[str, Ear] = {}
        self._workers: defaultdict[str, set[str]] = defaultdict(set)
        self._calls: dict[str, asyncio.Task[None]] = {}

    def expect(self, request_id: str) -> Ear:
        """Before anybody is asked to serve a request: a worker may say something at once."""
        ear = self._ears[request_id] = Ear()
        return ear

    def listen(self, worker_id: str, worker: Any, request_id: str) -> None:
        """A worker has taken a request of ours."""
        self._workers[worker_id].add(request_id)
        if worker_id not in self._calls:
            self._calls[worker_id] = detached(self._hear(worker_id, worker))

    def forget(self, request_id: str) -> None:
        """A request of ours is over."""
        self._ears.pop(request_id).close()
        for requests in self._workers.values():
            requests.discard(request_id)

    async def _hear(self, worker_id: str, worker: Any) -> None:
        """Ask a worker again and again, while there are requests of ours."""
        try:
            while self._workers[worker_id]:
                async with asyncio.timeout(SILENT_SECONDS):
                    said = await as_nobody(worker.fetch.remote, self.name)
                for request_id, events in said:
                    self._tell(request_id, events)
                await asyncio.sleep(min(len(said) * _EVENT_SECONDS, _LONGEST_PAUSE))
        except TimeoutError:
            logger.warning("decode worker %s was silent for %g s", worker_id, SILENT_SECONDS)
            await self._give_up(worker_id, LostError(_SILENT))
        except Exception as failure:
            await self._give_up(worker_id, as_ours(failure))
        finally:
            # Nothing was awaited since it was last looked who wants to listen.
            del self._calls[worker_id], self._workers[worker_id]

    def _tell(self, request_id: str, events: list[Event]) -> None:
        if (ear := self._ears.get(request_id)) is not None:
            for event in events:
                ear.hear(event)

    async def _give_up(self, worker_id: str, error: LongreachError) -> None:
        await asyncio.sleep(REPLICA_SECONDS)
        for request_id in self._workers[worker_id]:
            self._ears[request_id].fail(error)
