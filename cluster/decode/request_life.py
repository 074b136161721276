"""A request's life at a decode replica: reserved, prefilled, decoded, ended.

It reads from top to bottom in `RequestLife.events`. States come in the order in which they are
listed, and any of them may be the last before ENDED: whatever goes wrong, or whoever leaves, ends a
life in one way, by releasing what the worker holds for it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from enum import Enum
from typing import Any, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ...engine.errors import LongreachError, LostError, TransferError
from ...engine.messages import (
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Prefilled,
    Progress,
    PromptScores,
    Timings,
)
from .. import metrics
from ..call_errors import CallError, as_ours, first_of
from ..messages import ComputedHere, PrefillOrder
from ..metrics import Metrics
from ..recovery import Recovery
from ..streams import listening
from ..tasks import as_nobody, tell

_Stream = DeploymentResponseGenerator[Progress | Prefilled | None]

logger = logging.getLogger(__name__)


class State(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    """For pages, and then for its prompt's first chunk."""
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


class RequestLife:
    """One request, from when a decode replica takes it until its last token.

    Args:
        worker: the handle of the decode worker's actor.
        prefill: the deployment that computes its prompt, with streamed answers; None where the
            worker does it itself.
        recovery: from gangs that die under it.
        sink: of the decode replica.
    """

    def __init__(
        self,
        request: GenerationRequest,
        worker: Any,
        prefill: DeploymentHandle | None,
        recovery: Recovery,
        sink: Metrics,
    ) -> None:
        self._request = request
        self._worker, self.prefill = worker, prefill
        self._recovery, self._sink = recovery, sink
        self._began = time.perf_counter()
        self.state = State.WAITING

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """What the client hears, those that come at the same time in one list."""
        try:
            whole = self._at_the_worker() if self.prefill is None else self._by(self.prefill)
            async with aclosing(whole) as messages:
                async for events in messages:
                    yield events
        finally:
            self.state = State.ENDED
            tell(self._worker.release.remote, self._request.request_id)

    async def _by(self, prefill: DeploymentHandle) -> AsyncGenerator[list[Event], None]:
        """Have the prompt computed by a gang, and handed off to the worker."""
        prefilled = None
        async with aclosing(self._prefilled_by_some(prefill)) as progress:
            async for event in progress:
                if isinstance(event, Prefilled):
                    prefilled = event
                else:
                    yield [event]
        assert prefilled is not None
        if prefilled.scores is not None:
            yield [PromptScores(prefilled.scores)]
        self.state = State.DECODING
        async with aclosing(self._decoding(prefilled)) as answer:
            async for events in answer:
                yield events

    async def _at_the_worker(self) -> AsyncGenerator[list[Event], None]:
        """Have the worker compute the prompt as well: one call, and no pages that travel."""
        answer = self._worker.generate.options(num_returns="streaming")
        clock = _AnswerClock(self._request, self._began)
        said = as_nobody(answer.remote, self._request)
        async with aclosing(self._said(said, clock)) as messages:
            async for events in messages:
                yield events

    async def _prefilled_by_some(
        self, prefill: DeploymentHandle
    ) -> AsyncGenerator[Progress | Prefilled, None]:
        """Have the prompt computed, by as many gangs one after the other as it takes.

        Where one is lost, the next goes on behind the pages that have come.
        """
        name = self._request.request_id
        order = PrefillOrder(
            self._request,
            destination=as_nobody(self._worker.reserve.remote, self._request),
            released=as_nobody(self._worker.until_released.remote, name),
        )
        while True:
            stream = cast(_Stream, prefill.prefill.remote(order))
            try:
                async with aclosing(self._prefilling(stream)) as events:
                    async for event in events:
                        yield event
                return
            except (*CallError, LongreachError) as error:
                seconds = self._failed(as_ours(error))
                # Before the stream is cancelled: a gang that lives may then use its pages for
                # others, and until then this worker copies out of them.
                order = await self._order_the_rest(order)
                logger.warning("request %s asks another gang in %.1f s: %s", name, seconds, error)
            finally:
                stream.cancel()
            self._sink.add(metrics.REQUEST_RECOVERIES)
            await asyncio.sleep(seconds)

    async def _prefilling(self, stream: _Stream) -> AsyncGenerator[Progress | Prefilled, None]:
        """What one gang says, to Prefilled."""
        await first_of(stream)
        async for event in listening(stream):
            if event is None:
                continue
            self.state = State.PREFILLING
            if isinstance(event, Progress):
                self._recovery.goes_on()
                self._recovery.reach(event.done)
            yield event
            if isinstance(event, Prefilled):
                return
        raise LostError("prefill ended early; send the request again")

    def _failed(self, error: LongreachError) -> float:
        """Seconds after which another gang is asked; see `Recovery.failed`."""
        if isinstance(error, TransferError):
            # It is this worker that takes no pages.
            raise error
        return self._recovery.failed(error)

    async def _order_the_rest(self, order: PrefillOrder) -> PrefillOrder:
        """What the next gang is asked for."""
        try:
            # Whoever computes has waited for pages first; there is nothing to go on behind else.
            await order.destination
            destination = as_nobody(self._worker.go_on.remote, self._request.request_id)
            await destination
        except CallError as error:
            raise as_ours(error) from error
        computed = max(self._request.computed, self._recovery.reached[0])
        request = replace(self._request, computed=computed)
        return replace(order, request=request, destination=destination, number=order.number + 1)

    async def _decoding(self, prefilled: Prefilled) -> AsyncGenerator[list[Event], None]:
        """Generate from them; ends with Finished."""
        clock = _AnswerClock(self._request, self._began)
        clock.prompt_is_there(prefilled)
        answer = self._worker.answer.options(num_returns="streaming")
        said = answer.remote(self._request.request_id, prefilled.logits)
        async with aclosing(self._said(said, clock)) as messages:
            async for events in messages:
                yield events

    async def _said(
        self, answer: AsyncIterable[Any], clock: "_AnswerClock"
    ) -> AsyncGenerator[list[Event], None]:
        """What the worker says, to its last token and Finished."""
        async for reference in answer:
            messages, ended = await reference
            events: list[Event] = []
            for message in messages:
                if isinstance(message, ComputedHere):
                    self.state = State.DECODING
                    clock.prompt_is_computed(message)
                else:
                    events.append(message)
            if self.state is State.WAITING:
                self.state = State.PREFILLING
            clock.count(events)
            if ended:
                events.append(clock.finished())
            yield events


class _AnswerClock:
    """Counts and times what comes out of a request."""

    def __init__(self, request: GenerationRequest, began: float) -> None:
        self._request, self._began = request, began
        self._tokens = 0
        self._first: float | None = None
        self._prompt = Timings(0.0, 0.0, 0.0, 0.0, 0.0)
        self._there = began

    def prompt_is_there(self, prefilled: Prefilled) -> None:
        """A gang has computed and handed off the prompt."""
        self._there = time.perf_counter()
        self._prompt = replace(
            self._prompt,
            queued=prefilled.queued,
            prefill=prefilled.prefill,
            hand_off=prefilled.hand_off,
            prefill_stages=prefilled.stages,
        )

    def prompt_is_computed(self, computed: ComputedHere) -> None:
        """The worker has computed it itself."""
        self._there = time.perf_counter()
        self._prompt = replace(
            self._prompt,
            queued=max(computed.began - self._request.arrived, 0.0),
            prefill=max(computed.ended - computed.began, 0.0),
            prefill_stages={"steps": computed.seconds},
        )

    def count(self, events: Sequence[Event]) -> None:
        """Note what has come."""
        tokens = sum(len(event.tokens) for event in events if isinstance(event, Delta))
        self._tokens += tokens
        if tokens and self._first is None:
            self._first = time.perf_counter()

    def finished(self) -> Finished:
        """What is said at the end."""
        now = time.perf_counter()
        first = now if self._first is None else self._first
        timings = replace(self._prompt, first_token=first - self._there, served=now - self._began)
        return Finished(len(self._request.prompt), self._tokens, timings)
