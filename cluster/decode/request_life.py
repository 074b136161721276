"""A request's life at a decode replica: reserved, prefilled, decoded, ended.

It reads from top to bottom in `RequestLife.events`. States come in the order in which they are
listed, and any of them may be the last before ENDED: whatever goes wrong, or whoever leaves, ends a
life in one way, by releasing what the worker holds for it.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from enum import Enum
from typing import Any, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ...engine.errors import LostError
from ...engine.messages import (
    Event,
    Finished,
    GenerationRequest,
    Prefilled,
    Progress,
    PromptScores,
    Timings,
)
from ..call_errors import first_of
from ..messages import PrefillOrder
from ..streams import listening
from ..tasks import as_nobody, tell


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
        prefill: the deployment that computes its prompt, with streamed answers.
    """

    def __init__(
        self,
        request: GenerationRequest,
        worker: Any,
        prefill: DeploymentHandle,
    ) -> None:
        self._request = request
        self._worker, self.prefill = worker, prefill
        self._began = time.perf_counter()
        self.state = State.WAITING

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """What the client hears, those that come at the same time in one list."""
        try:
            prefilled = None
            async with aclosing(self._prefilling(self._reserve())) as progress:
                async for event in progress:
                    if isinstance(event, Prefilled):
                        prefilled = event
                    else:
                        yield [event]
            if prefilled is None:
                raise LostError("prefill ended early; send the request again")
            if prefilled.scores is not None:
                yield [PromptScores(prefilled.scores)]
            self.state = State.DECODING
            async with aclosing(self._decoding(prefilled)) as answer:
                async for events in answer:
                    yield events
        finally:
            self.state = State.ENDED
            tell(self._worker.release.remote, self._request.request_id)

    def _reserve(self) -> PrefillOrder:
        """Have pages allocated, without waiting for them."""
        name = self._request.request_id
        return PrefillOrder(
            self._request,
            destination=as_nobody(self._worker.reserve.remote, self._request),
            released=as_nobody(self._worker.until_released.remote, name),
        )

    async def _prefilling(self, order: PrefillOrder) -> AsyncGenerator[Progress | Prefilled, None]:
        """Have the prompt computed into those pages; ends with Prefilled."""
        stream = cast(
            DeploymentResponseGenerator[Progress | Prefilled | None],
            self.prefill.prefill.remote(order),
        )
        try:
            await first_of(stream)
            async for event in listening(stream):
                if event is not None:
                    self.state = State.PREFILLING
                    yield event
        finally:
            stream.cancel()

    async def _decoding(self, prefilled: Prefilled) -> AsyncGenerator[list[Event], None]:
        """Generate from them; ends with Finished."""
        started = time.perf_counter()
        first_token, completion_tokens = None, 0
        answer = self._worker.answer.options(num_returns="streaming")
        async for reference in answer.remote(self._request.request_id, prefilled.logits):
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
                    served=now - self._began,
                    prefill_stages=prefilled.stages,
                )
                events.append(Finished(len(self._request.prompt), completion_tokens, timings))
            yield events
