"""A decode replica: takes a request, has it prefilled into its own pages, and generates."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ...engine.errors import QueueFullError, UnavailableError
from ...engine.messages import Event, Finished, GenerationRequest, Prefilled, Progress, Timings
from ..failures import CallError, as_ours, first_of
from ..outbox import Outbox
from ..router import PrefillRouter
from ..settings import Settings
from .worker import DecodeWorker

_PING_SECONDS = 10
# Of the worker: every waiting request is a call, and so is every page run under way.
_CALLS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Taken:
    """Which actor holds a request's pages.

    Its `release` is how to stop the request for certain, wherever it is: Serve's cancellation is
    best effort.
    """

    worker: str


class DecodeReplica:
    """A Serve deployment. Its worker, which holds the pages, lives and dies with it."""

    async def __init__(
        self, settings: Settings, metrics_directory: Path, prefill: list[DeploymentHandle]
    ) -> None:
        self._prefill = PrefillRouter(settings, prefill)
        self._most_waiting = settings.limits.max_queued_requests
        self._waiting = 0
        self._outbox = Outbox()
        decode = settings.decode
        self._worker_name = f"longreach-decode-{uuid.uuid4().hex}"
        actor = cast(Any, ray.remote(DecodeWorker)).options(
            name=self._worker_name,
            num_cpus=decode.cpus,
            num_gpus=decode.gpus,
            max_concurrency=_CALLS_AT_ONCE,
        )
        self._worker = actor.remote(settings, metrics_directory)
        await self._worker.ping.remote()

    async def check_health(self) -> None:
        """Raise if the worker is gone or cannot generate: Serve then replaces this replica."""
        await asyncio.wait_for(self._worker.ping.remote(), _PING_SECONDS)

    async def ready(self) -> None:
        """Return when this replica and a replica of each gang could serve; raise if not."""
        await self.check_health()
        await self._prefill.check_health()

    async def generate(
        self, request: GenerationRequest
    ) -> AsyncGenerator[Taken | list[Event], None]:
        """Serve one request from its prefill to its last token; see `rest.Backend`.

        Yields first who has taken it, then events, those that come at the same time in one
        message.
        """
        yield Taken(self._worker_name)
        try:
            async for events in self._generate(request):
                yield events
        except CallError as error:
            raise as_ours(error) from error

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        began = time.perf_counter()
        waiting = self._queue_up()
        try:
            prefilled = None
            gang = self._prefill.gang_for(len(request.prompt)).options(stream=True)
            stream = cast(
                DeploymentResponseGenerator[Progress | Prefilled],
                gang.prefill.remote(request, self._worker),
            )
            try:
                await first_of(stream)
                async for event in stream:
                    waiting.end()
                    if isinstance(event, Prefilled):
                        prefilled = event
                    else:
                        yield [event]
            finally:
                stream.cancel()
            if prefilled is None:
                raise UnavailableError("prefill ended early; send the request again")
            async for events in self._answer(request, prefilled, began):
                yield events
        finally:
            waiting.end()
            self._outbox.send(lambda: self._worker.release.remote(request.request_id))

    async def _answer(
        self, request: GenerationRequest, prefilled: Prefilled, began: float
    ) -> AsyncGenerator[list[Event], None]:
        started = time.perf_counter()
        first_token, completion_tokens = None, 0
        answer = self._worker.answer.options(num_returns="streaming")
        async for reference in answer.remote(request.request_id, prefilled.logits):
            deltas, ended = await reference
            now = time.perf_counter()
            first_token = first_token or now - started
            completion_tokens += sum(len(delta.tokens) for delta in deltas)
            events: list[Event] = list(deltas)
            if ended:
                timings = Timings(
                    queued=prefilled.queued,
                    prefill=prefilled.prefill,
                    hand_off=prefilled.hand_off,
                    first_token=first_token,
                    served=now - began,
                    prefill_stages=prefilled.stages,
                )
                events.append(Finished(len(request.prompt), completion_tokens, timings))
            yield events

    def _queue_up(self) -> "_Waiting":
        if self._waiting >= self._most_waiting + 1:
            raise QueueFullError(self._waiting - 1)
        return _Waiting(self)

    def count_waiting(self, by: int) -> None:
        """One more waits, or one fewer."""
        self._waiting += by


class _Waiting:
    """A request that has seen nothing of its prefill yet."""

    def __init__(self, replica: DecodeReplica) -> None:
        self._replica = replica
        self._waits = True
        replica.count_waiting(+1)

    def end(self) -> None:
        """It waits no longer; twice does no harm."""
        if self._waits:
            self._waits = False
            self._replica.count_waiting(-1)
